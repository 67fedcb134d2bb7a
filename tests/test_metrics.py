# SPDX-License-Identifier: Apache-2.0
"""Metric files survive restarts; progress without a terminal."""

import io
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog

from worldenv_jax import metrics
from worldenv_jax.data.tfrecord import TFRecordFile


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
    with metrics.make_writer(tmp_path, "cloning") as writer:
        writer.resume(0)
        for step in (10, 20, 30):
            writer.write(step, {"loss": jnp.float32(1 / step), "n": np.int32(step), "bad": np.float32("nan")})
    path = tmp_path / "cloning.jsonl"
    path.write_text(path.read_text() + '{"step": 40, "lo')  # a process killed while writing
    with metrics.make_writer(tmp_path, "cloning") as writer:
        writer.resume(20)
        writer.write(30, {"loss": 7.0})
    rows = metrics.read_json_lines(path)
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[0]["n"] == 10 and rows[0]["bad"] is None and rows[2]["loss"] == 7.0
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]


def test_the_row_of_the_start_stays(tmp_path):
    with metrics.make_writer(tmp_path, "post_train") as writer:
        for _ in range(2):  # a run that is stopped before its first step measures the start again
            writer.resume(-1)
            writer.write(0, {"held_out_reward": 0.5})
        writer.resume(0)
        writer.write(1, {"reward": 0.4})
    rows = metrics.read_json_lines(tmp_path / "post_train.jsonl")
    assert [row["step"] for row in rows] == [0, 1] and rows[1]["reward"] == 0.4


def test_console_and_tensorboard_get_the_same_rows(tmp_path, capsys):
    with metrics.make_writer(tmp_path, "reflector") as writer:
        writer.resume(5)
        writer.write(6, {"loss": 0.123456, "count": 3})
    shown = capsys.readouterr().out
    assert "reflector: resumed at step 5" in shown
    assert "reflector 6: loss 0.1235  count 3" in shown
    (path,) = (tmp_path / "tensorboard" / "reflector").iterdir()
    version, restart, *events = (Event.FromString(bytes(record)) for record in TFRecordFile(path))
    assert version.file_version == "brain.Event:2"
    assert (restart.step, restart.session_log.status) == (6, SessionLog.START)
    values = {event.summary.value[0].tag: (event.step, event.summary.value[0].simple_value) for event in events}
    assert values == {"loss": (6, np.float32(0.123456)), "count": (6, 3.0)}


def test_full_disk_is_one_line(tmp_path):
    """The limit on the size of files stands for the disk: the write fails in the same way."""
    program = """
import resource, signal, sys
from worldenv_jax.errors import run_main
from worldenv_jax.metrics import make_writer

def main():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
    with make_writer(sys.argv[1], "cloning") as writer:
        for step in range(100):
            writer.write(step, {"loss": 0.5})

run_main(main)
"""
    for limit, name in ((300, "cloning.jsonl"), (2000, "tensorboard/cloning")):
        if "tensorboard" in name:  # its file is the larger one: the other must not be the first to fail
            (tmp_path / "cloning.jsonl").unlink()
            (tmp_path / "cloning.jsonl").symlink_to("/dev/null")
        command = [sys.executable, "-c", program, tmp_path, str(limit)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2, result.stderr
        expected = f"error: cannot write {tmp_path / name}: no space left on the device"
        assert result.stderr.splitlines()[-1].startswith(expected)
        assert "Traceback" not in result.stderr and "Exception" not in result.stderr


def test_missing_file_has_no_rows(tmp_path):
    assert metrics.read_json_lines(tmp_path / "none.jsonl") == []


def test_progress_without_a_terminal_is_a_line_every_ten_seconds(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    progress = metrics.Progress("cloning", 40, start=10, stream=stream)
    for step in range(11, 31):
        clock[0] += 1.0
        progress.update(step)
    clock[0] += 1.0
    progress.update(40)
    progress.close()
    assert stream.getvalue().splitlines() == [
        "cloning: step 10 of 40",
        "cloning: step 20 of 40, 1 steps/s, 20 s left",
        "cloning: step 30 of 40, 1 steps/s, 10 s left",
        "cloning: step 40 of 40, 1.43 steps/s, 0 s left",
    ]
