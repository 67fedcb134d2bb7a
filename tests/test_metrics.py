# SPDX-License-Identifier: Apache-2.0
"""Metric files survive restarts; progress without a terminal."""

import io
import json

import jax.numpy as jnp
import numpy as np

from worldenv_jax import metrics


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


def test_console_and_tensorboard_get_the_same_rows(tmp_path, capsys):
    with metrics.make_writer(tmp_path, "reflector") as writer:
        writer.resume(5)
        writer.write(6, {"loss": 0.123456, "count": 3})
    shown = capsys.readouterr().out
    assert "reflector: resumed at step 5" in shown
    assert "reflector 6: loss 0.1235  count 3" in shown
    events = list((tmp_path / "tensorboard" / "reflector").iterdir())
    assert len(events) == 1 and events[0].stat().st_size > 100


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
