# SPDX-License-Identifier: Apache-2.0
"""Speed of the parts of a run, one JSON line each, beside what this machine can do.

    python tools/benchmark.py rollout --config=tabletop            # imagined frames/s: fused scan, and separate parts
    python tools/benchmark.py policy --config=tabletop --batch=64
    python tools/benchmark.py simulator --batch=4 --set=simulator.unet.channels=64
    python tools/benchmark.py reflector --config=tabletop
    python tools/benchmark.py data --config=tabletop               # training windows/s from episodes on disk
    python tools/benchmark.py load --config=libero_full --dtype=bfloat16 --set=policy.llama.layers=8
    python tools/benchmark.py machine

Devices are those of the config's mesh, as in the scripts: with `mesh.data=0` all of them, on a CPU one per core;
batches are split over them. Seconds are medians over `--repeats` calls after one that is not counted. Models have
random parameters. `flops` are counted in the jaxpr (matrix products and convolutions, scans times their length;
`tools/flops.py`), `utilisation` is flops/s over the matmul rate that the machine itself reached just before.
`peak_bytes` are arguments, outputs and temporaries of the compiled program on one device; `device_peak_bytes` what the
device's allocator saw, where it tells. Compilation is not served from a cache.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402

from tools.benchmarks.data import benchmark_data  # noqa: E402
from tools.benchmarks.loading import benchmark_load  # noqa: E402
from tools.benchmarks.measure import measure_machine  # noqa: E402
from tools.benchmarks.models import benchmark_policy, benchmark_reflector, benchmark_simulator  # noqa: E402
from tools.benchmarks.rollout import benchmark_rollout  # noqa: E402
from worldenv_jax.configs import PRESETS, ExperimentConfig, get_config  # noqa: E402
from worldenv_jax.data.image_codec import IMAGE_ENCODINGS  # noqa: E402
from worldenv_jax.errors import WorldEnvError, run_main  # noqa: E402
from worldenv_jax.evaluation.summary import peak_rss_bytes  # noqa: E402
from worldenv_jax.manifest import git_commit  # noqa: E402
from worldenv_jax.mesh import use_every_core  # noqa: E402
from worldenv_jax.overrides import apply_overrides  # noqa: E402
from worldenv_jax.training.workdir import mesh_from_config  # noqa: E402


def benchmark_machine(config: ExperimentConfig, options: argparse.Namespace) -> dict[str, Any]:
    """What the machine can do."""
    return {"figure": "matmul_gflops", "machine": measure_machine(options.repeats, options.dtype)}


BENCHMARKS = {
    "machine": benchmark_machine,
    "rollout": benchmark_rollout,
    "policy": benchmark_policy,
    "simulator": benchmark_simulator,
    "reflector": benchmark_reflector,
    "data": benchmark_data,
    "load": benchmark_load,
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--config", default="tabletop", help=f"preset: {', '.join(PRESETS)}")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override; repeatable")
    parser.add_argument("--batch", type=int, help="rows; by default those of the preset's post-training")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the parameters")
    parser.add_argument("--episodes", type=int, default=16, help="data: how many synthetic ones")
    parser.add_argument("--folder", type=Path, help="data: an RLDS folder or synthetic; load: for the file")
    parser.add_argument("--encoding", default="png", choices=IMAGE_ENCODINGS, help="data: of the synthetic episodes")
    return parser.parse_args()


def main() -> None:
    """Prints the JSON line."""
    options = parse_arguments()
    if options.repeats < 1 or (options.batch is not None and options.batch < 1):
        raise WorldEnvError("--repeats and --batch must be at least 1")
    jax.config.update("jax_enable_compilation_cache", False)
    config = apply_overrides(get_config(options.config), options.set)
    if config.mesh.data == 0 and options.benchmark != "load":
        use_every_core()
    mesh = mesh_from_config(config.mesh)
    with jax.set_mesh(mesh):
        result = BENCHMARKS[options.benchmark](config, options)
    device = jax.devices()[0]
    device_peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    line = {
        "benchmark": options.benchmark,
        "config": options.config,
        "overrides": options.set,
        **result,
        "repeats": options.repeats,
        "param_dtype": options.dtype,
        "mesh": dict(mesh.shape),
        "device_peak_bytes": device_peak,
        "peak_rss_bytes": peak_rss_bytes(),
        "device": f"{device.device_kind} ({device.platform}), {os.cpu_count()} host cores",
        "jax": jax.__version__,
        "commit": git_commit(),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run_main(main)
