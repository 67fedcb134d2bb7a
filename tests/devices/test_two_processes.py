# SPDX-License-Identifier: Apache-2.0
"""Two processes on this machine train through `jax.distributed`, stop, lose one of them, and finish all the same."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from worldenv_jax.checkpoints import load_params
from worldenv_jax.metrics import read_json_lines

SCRIPT = Path(__file__).with_name("two_process_run.py")
STEPS = 16


def start(workdir: Path, pause: float = 0.0) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = dict(os.environ) | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    commands = [[sys.executable, SCRIPT, workdir, str(STEPS), str(n), port, str(pause)] for n in (0, 1)]
    logs = [(workdir / f"process{n}.log").open("a") for n in (0, 1)]
    return [
        subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        for command, log in zip(commands, logs)
    ]


def wait_for_step(workdir: Path, step: int, processes: list[subprocess.Popen]) -> None:
    limit = time.monotonic() + 120
    while not any(row["step"] >= step for row in read_json_lines(workdir / "tiny.jsonl")):
        assert time.monotonic() < limit and all(process.poll() is None for process in processes), logs(workdir)
        time.sleep(0.05)


def logs(workdir: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted(workdir.glob("process*.log")))


def finish(workdir: Path, processes: list[subprocess.Popen]) -> dict[str, np.ndarray]:
    codes = [process.wait(timeout=180) for process in processes]
    assert codes == [0, 0], logs(workdir)
    return dict(np.load(workdir / "final.npz"))


@pytest.mark.slow
def test_stopped_and_broken_run_ends_with_the_same_bits(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    straight.mkdir()
    broken.mkdir()
    expected = finish(straight, start(straight))
    assert int(expected.pop("step")) == STEPS

    processes = start(broken, pause=0.1)
    wait_for_step(broken, 4, processes)
    for process in processes:  # what a scheduler does before it takes the machines back
        process.send_signal(signal.SIGTERM)
    assert [process.wait(timeout=120) for process in processes] == [143, 143], logs(broken)
    stopped = read_json_lines(broken / "tiny.jsonl")[-1]["step"]
    assert (broken / "checkpoints" / "last" / str(stopped)).is_dir()

    processes = start(broken, pause=0.1)
    wait_for_step(broken, stopped + 4, processes)
    processes[1].kill()  # a lost machine: the launcher ends the others too
    time.sleep(0.5)
    processes[0].kill()
    for process in processes:
        process.wait(timeout=60)

    result = finish(broken, start(broken))
    assert int(result.pop("step")) == STEPS
    for name in expected:
        assert result[name].tobytes() == expected[name].tobytes()
    params, _ = load_params(broken / "checkpoints")
    np.testing.assert_array_equal(params["w"], expected["average.w"])
    assert jax.process_count() == 1  # the checkpoint of two processes was read by one
