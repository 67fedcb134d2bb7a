# SPDX-License-Identifier: Apache-2.0
"""One of two processes that train together on CPU: `two_process_run.py WORKDIR STEPS PROCESS PORT [PAUSE]`."""

import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from worldenv_jax import mesh as meshes
from worldenv_jax.errors import run_main

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import tiny_run  # noqa: E402


def main() -> None:
    workdir, steps, process, port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    pause = float(sys.argv[5]) if len(sys.argv) > 5 else 0.0
    jax.config.update("jax_num_cpu_devices", 4)
    meshes.initialize_hosts(f"localhost:{port}", 2, process)
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    rules = (("w$", ("fsdp", "tensor")), ("v$", ("tensor", None)))

    def batch_fn(step):
        time.sleep(pause)
        return meshes.shard_batch(meshes.own_rows(tiny_run.batch_fn(step), mesh), mesh)

    state = tiny_run.train(workdir, steps, batch_fn=batch_fn, mesh=mesh, rules=rules)
    final = process_allgather({"params": state.params, "average": state.ema}, tiled=True)
    if process == 0:
        arrays = {f"{kind}.{name}": array for kind, tree in final.items() for name, array in tree.items()}
        np.savez(workdir / "final.npz", step=int(state.step), **arrays)


if __name__ == "__main__":
    run_main(main)
