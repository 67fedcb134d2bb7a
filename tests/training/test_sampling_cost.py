# SPDX-License-Identifier: Apache-2.0
"""The table of few-step sampling against a replay whose error is known."""

from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.configs import get_config
from worldenv_jax.data.episodes import Episode
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.simulator import Kinematics
from worldenv_jax.training import sampling_cost as module
from worldenv_jax.training.models import Models
from worldenv_jax.types import Statistics

ONES = np.ones(7, np.float32)


def _episode(steps, success):
    frames, camera = steps + 1, np.tile(np.eye(4, dtype=np.float32), (steps + 1, 1, 1, 1))
    return Episode(
        images=np.full((frames, 1, 32, 32, 3), 100, np.uint8),
        proprio=np.zeros((frames, 8), np.float32),
        actions=np.zeros((steps, 7), np.float32),
        success=np.full(frames, success),
        intrinsics=np.tile(np.array([[32, 0, 16], [0, 32, 16], [0, 0, 1]], np.float32), (frames, 1, 1, 1)),
        camera_pose=camera, instruction="lift", task=0, seed=0, split="train", starts="shifted", actor="policy",
    )  # fmt: skip


@pytest.fixture
def models():
    config = get_config("debug")
    statistics = Statistics(-ONES, ONES, np.full(8, -4, np.float32), np.full(8, 4, np.float32))
    return Models.make(config, statistics, Kinematics.osc_pose(), ["lift"])


def test_rows_by_hand(models, monkeypatch):
    """A success of 8 steps and a failure of 3; every imagined pixel is off by 10 / steps."""

    def fake(changed, num_chunks):
        error = 10 // changed.config.simulator.ddim_steps
        shape = (2, num_chunks, changed.config.policy.chunk, 1, 32, 32, 3)
        return lambda params, keys, starts, actions: SimpleNamespace(frames=jnp.full(shape, 100 + error, jnp.uint8))

    monkeypatch.setattr(module, "make_replay", fake)
    monkeypatch.setattr(module.jax, "block_until_ready", lambda result: result)
    rows = module.sampling_cost(models, {}, [_episode(8, True), _episode(3, False)], steps=(1, 2))
    still, *rows = rows
    assert still["steps"] == 0 and still["psnr"] == pytest.approx(10 * np.log10(255**2 * 12))  # nothing moves
    assert [row["steps"] for row in rows] == [1, 2] and [row["trained"] for row in rows] == [False, True]
    for row, error in zip(rows, (10, 5)):
        expected = pytest.approx(20 * np.log10(255 / error), abs=1e-9)
        assert [row["psnr"], row["psnr_success"], row["psnr_failure"]] == [expected] * 3
        assert row["frames_per_second"] == pytest.approx(2 * 8 / row["seconds"])


def test_what_cannot_be_replayed_is_refused(models):
    with pytest.raises(WorldEnvError, match="no held-out episodes"):
        module.sampling_cost(models, {}, [])
    with pytest.raises(WorldEnvError, match="simulator starts: images are uint8"):
        episode = _episode(8, True)
        module.sampling_cost(models, {}, [replace(episode, images=episode.images[:, :, :16])])
    with pytest.raises(WorldEnvError, match=r"actions \[0, 0\] is nan"):
        module.sampling_cost(models, {}, [replace(_episode(8, True), actions=np.full((8, 7), np.nan, np.float32))])
