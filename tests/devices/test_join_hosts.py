# SPDX-License-Identifier: Apache-2.0
"""How the processes of a run find each other: the scheduler's environment, or a clear message."""

import os
import subprocess
import sys

PROGRAM = """
from worldenv_jax.errors import run_main
from worldenv_jax.mesh import initialize_hosts, own_rows
import jax, numpy as np
def main():
    initialize_hosts()
    print(jax.process_index(), jax.process_count(), jax.device_count(), own_rows(np.arange(4)))
run_main(main)
"""


def start(**environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "OMPI", "JAX_COORD"))}
    clean |= {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **environment}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=clean, **output)


def test_slurm_variables_are_enough():
    port_number = str(os.getpid())  # JAX makes the port out of it
    job = {"SLURM_JOB_ID": port_number, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    processes = [start(**job, SLURM_PROCID=str(n), SLURM_LOCALID=str(n)) for n in (0, 1)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [out for out, _ in outputs] == ["0 2 2 [0 1]\n", "1 2 2 [2 3]\n"], outputs


def test_without_a_cluster_it_says_what_to_pass():
    process = start()
    out, error = process.communicate(timeout=120)
    assert process.returncode == 2 and out == ""
    assert "--coordinator=HOST:PORT" in error and "Traceback" not in error
