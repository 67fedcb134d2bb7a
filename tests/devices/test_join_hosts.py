# SPDX-License-Identifier: Apache-2.0
"""How the processes of a run find each other: the scheduler's environment, or a clear message."""

import os
import subprocess
import sys

PROGRAM = """
from worldenv_jax.errors import run_main
from worldenv_jax.mesh import initialize_hosts, make_mesh, own_rows, shard_batch
from jax.experimental.multihost_utils import process_allgather
import jax, numpy as np, os
jax.config.update("jax_num_cpu_devices", 4)
def main():
    initialize_hosts()
    rows = np.arange(8)
    for layout in ((8, 1, 1), (2, 2, 2), (1, 1, 8)):
        mesh = make_mesh(*layout)
        own = own_rows(rows, mesh)
        assert (process_allgather(shard_batch(own, mesh), tiled=True) == rows).all(), layout
        with open(os.environ["ROWS"], "a") as rows_file:
            print(jax.process_index(), jax.process_count(), layout, own, file=rows_file)
run_main(main)
"""


def start(**environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "OMPI", "JAX_COORD"))}
    clean |= {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **environment}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=clean, **output)


def test_slurm_variables_are_enough(tmp_path):
    port_number = str(os.getpid())  # JAX makes the port out of it
    job = {"SLURM_JOB_ID": port_number, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    files = [tmp_path / "rows0", tmp_path / "rows1"]  # gloo writes into the lines of the standard output
    processes = [start(**job, SLURM_PROCID=str(n), SLURM_LOCALID=str(n), ROWS=str(files[n])) for n in (0, 1)]
    outputs = [process.communicate(timeout=120) for process in processes]
    halves, mixed, all_rows = ("[0 1 2 3]", "[4 5 6 7]"), ("[0 1 4 5]", "[2 3 6 7]"), "[0 1 2 3 4 5 6 7]"
    for n, path in enumerate(files):
        rows = {"(8, 1, 1)": halves[n], "(2, 2, 2)": mixed[n], "(1, 1, 8)": all_rows}
        assert path.exists(), outputs
        assert path.read_text().splitlines() == [f"{n} 2 {layout} {own}" for layout, own in rows.items()], outputs


def test_without_a_cluster_it_says_what_to_pass():
    process = start()
    out, error = process.communicate(timeout=120)
    assert process.returncode == 2 and out == ""
    assert "--coordinator=HOST:PORT" in error and "Traceback" not in error
