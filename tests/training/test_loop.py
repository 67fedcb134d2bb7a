# SPDX-License-Identifier: Apache-2.0
"""The host loop: resumed runs are bit-equal, signals leave a resumable run, divergence stops it."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run

from worldenv_jax.checkpoints import Checkpointer, load_params
from worldenv_jax.metrics import read_json_lines
from worldenv_jax.training.loop import run_stage
from worldenv_jax.training.train_state import TrainingDiverged, make_train_step

SCRIPT = Path(tiny_run.__file__)


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def timeless(rows):
    return [{k: v for k, v in row.items() if k not in ("time", "steps_per_second")} for row in rows]


def start(workdir: Path, steps: int, pause: float = 0.0) -> subprocess.Popen:
    environment = dict(os.environ) | {"PYTHONPATH": str(SCRIPT.parents[2])}  # XLA's flags, too: the same bits
    command = [sys.executable, str(SCRIPT), str(workdir), str(steps), str(pause)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_rows(workdir: Path, count: int) -> None:
    limit = time.monotonic() + 60
    while len(read_json_lines(workdir / "tiny.jsonl")) < count:
        assert time.monotonic() < limit, "the run makes no progress"
        time.sleep(0.01)


def test_two_steps_and_resume_to_four_equals_four(tmp_path):
    straight = tiny_run.train(tmp_path / "straight", 4)
    tiny_run.train(tmp_path / "resumed", 2)
    resumed = tiny_run.train(tmp_path / "resumed", 4)
    assert_same_bits(straight, resumed)
    rows = [read_json_lines(tmp_path / name / "tiny.jsonl") for name in ("straight", "resumed")]
    assert [row["step"] for row in rows[0]] == [2, 3, 4]  # 3 is a save
    assert timeless(rows[0])[-1] == timeless(rows[1])[-1]


def test_donating_the_state_does_not_change_what_is_being_saved(tmp_path):
    step = jax.jit(lambda state: {"params": {"w": state["params"]["w"] + 1}}, donate_argnums=0)
    state = {"params": {"w": jax.numpy.zeros((1024, 1024))}}
    with Checkpointer(tmp_path) as saver:
        for done in range(1, 20):
            state = step(state)
            if done == 10:
                saver.save(done, state)
    params, _ = load_params(tmp_path)
    np.testing.assert_array_equal(params["w"], 10.0)


def test_finished_stage_returns_its_state_at_once(tmp_path):
    straight = tiny_run.train(tmp_path, 4)
    no_batch = lambda step: pytest.fail("a finished stage asked for a batch")
    with Checkpointer(tmp_path / "checkpoints", {"width": 64}) as saver:
        again = run_stage("tiny", tiny_run.initial_state(1), None, no_batch, 4, checkpointer=saver)
    assert_same_bits(straight, again)


def test_callbacks_run_on_their_steps_and_after_the_last(tmp_path):
    seen = []

    def callback(step, state):
        seen.append((step, int(state.step)))
        return {"score": step / 10}

    tiny_run.train(tmp_path, 7, callbacks=[(5, callback)])
    assert seen == [(5, 5), (7, 7)]
    rows = {row["step"]: row for row in read_json_lines(tmp_path / "tiny.jsonl")}
    assert rows[5]["score"] == 0.5 and "loss" not in rows[5]
    assert rows[7]["score"] == 0.7 and "loss" in rows[7]


def test_rows_are_means_and_counters_are_last_values():
    rows = []

    class Recorder:
        resume = staticmethod(lambda step: None)
        write = staticmethod(lambda step, metrics: rows.append((step, metrics)))

    def step_fn(state, batch):
        return state + 1, {"mean": np.float32(batch), "count": np.int32(batch)}

    run_stage("x", np.zeros(()), step_fn, lambda step: step, 5, writer=Recorder(), log_every=2)
    assert [(step, row["mean"], row["count"]) for step, row in rows] == [(2, 0.5, 1), (4, 2.5, 3), (5, 4.0, 4)]


def test_steps_that_stay_non_finite_stop_the_run(tmp_path):
    step_fn = make_train_step(tiny_run.loss_fn, dataclasses.replace(tiny_run.OPTIMIZER, clip_norm=None))
    bad = lambda step: np.full((16, 8), np.nan if step >= 3 else 1.0, np.float32)
    with Checkpointer(tmp_path) as saver, pytest.raises(TrainingDiverged, match="not finite in 5 steps"):
        run_stage("tiny", tiny_run.initial_state(), step_fn, bad, 100, checkpointer=saver, save_every=2, log_every=8,
                  skip_limit=5)  # fmt: skip
    params, _ = load_params(tmp_path)
    assert np.isfinite(params["w"]).all()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_leaves_a_resumable_run(tmp_path, number):
    process = start(tmp_path, 10_000, pause=0.01)
    wait_for_rows(tmp_path, 3)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"{number.name} after step" in error and "the same command goes on from there" in error
    assert "Traceback" not in error
    with Checkpointer(tmp_path / "checkpoints") as saver:
        stopped = saver.latest_step
    assert stopped == read_json_lines(tmp_path / "tiny.jsonl")[-1]["step"]
    assert_same_bits(tiny_run.train(tmp_path, stopped + 5), tiny_run.train(tmp_path / "straight", stopped + 5))


@pytest.mark.slow
def test_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    straight = tiny_run.train(tmp_path / "straight", 60)
    chance = random.Random(0)
    for kill in range(6):
        process = start(tmp_path / "killed", 60, pause=0.02)
        wait_for_rows(tmp_path / "killed", 2 + 4 * kill)
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    assert_same_bits(straight, tiny_run.train(tmp_path / "killed", 60))
    rows = [timeless(read_json_lines(tmp_path / name / "tiny.jsonl")) for name in ("straight", "killed")]
    assert rows[0] == rows[1]
