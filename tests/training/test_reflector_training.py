# SPDX-License-Identifier: Apache-2.0
"""Frames of a batch, padding, and the replay of recorded actions in a world whose answer is known."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.configs import MeshConfig, get_config
from worldenv_jax.data.episodes import Episode
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.training import reflector_training
from worldenv_jax.training.reflector_training import calibrate, labels_of, pad_steps, replay_episodes, train_reflector
from worldenv_jax.types import Camera, Prediction, SimulatorFns, Starts, Statistics, Text

ONES = np.ones(7, np.float32)
STATISTICS = Statistics(-ONES, ONES, np.full(8, -2, np.float32), np.full(8, 2, np.float32))


def test_pad_steps():
    stacked, valid = pad_steps([np.ones((2, 3)), np.ones((6, 3))], 4)
    np.testing.assert_array_equal(valid, [[True, True, False, False], [True] * 4])
    np.testing.assert_array_equal(stacked.sum((1, 2)), [6, 12])


def make_episode(steps, first):
    frames = np.full((steps + 1, 1, 2, 2, 3), first, np.uint8)
    actions = np.zeros((steps, 7), np.float32)
    actions[:, 0] = 1.0
    cameras = np.ones((steps + 1, 1, 3, 3), np.float32), np.ones((steps + 1, 1, 4, 4), np.float32)
    success = np.arange(steps + 1) >= steps
    return Episode(
        frames,
        np.zeros((steps + 1, 8), np.float32),
        actions,
        success,
        *cameras,
        "go",
        0,
        0,
        "train",
        "shifted",
        "expert",
    )


@pytest.mark.parametrize("stride", [1, 4])
def test_replay_counts_the_recorded_actions(monkeypatch, stride):
    """The world adds each action's first number to the picture: frame n of an episode shows its first frame + n.

    With a stride the picture of the steps 1 to 4 is that after the fourth, and so is its label.
    """
    monkeypatch.setattr(reflector_training, "REPLAY_BATCH", 4)

    def step(params, key, state, actions):
        total = state[:, None] + jnp.cumsum(actions[..., 0], axis=1)
        frames = jnp.broadcast_to(total[:, :, None, None, None, None], (*total.shape, 1, 2, 2, 3)).astype(jnp.uint8)
        return total[:, -1], Prediction(frames, jnp.zeros((*total.shape, 8)))

    world = SimulatorFns(lambda params, key, starts: starts.images[:, 0, 0, 0, 0].astype(jnp.float32), step)
    text = Text(np.ones((1, 2), np.int32), np.ones((1, 2), bool))

    def starts(episodes):
        pick = lambda name: np.stack([getattr(episode, name)[0] for episode in episodes])
        words = jax.tree.map(lambda leaf: np.repeat(leaf, len(episodes), axis=0), text)
        camera = Camera(pick("intrinsics"), pick("camera_pose"))
        return Starts(pick("images"), pick("proprio"), words, words, camera, np.zeros(len(episodes), np.int32))

    config = SimpleNamespace(
        policy=SimpleNamespace(chunk=4), simulator=SimpleNamespace(frame_stride=stride), mesh=MeshConfig()
    )
    models = type("Models", (), {})()
    models.config, models.simulator, models.statistics, models.starts = config, world, STATISTICS, starts
    episodes = [make_episode(steps, first) for steps, first in ((8, 10), (3, 20), (12, 30), (8, 40), (5, 50))]
    dreams = replay_episodes(models, {}, episodes, jax.random.key(0), num_chunks=2)
    assert [dream.num_steps for dream in dreams] == [8, 3, 8, 8, 5]  # at most T * K = 8
    for dream, first in zip(dreams, (10, 20, 30, 40, 50)):
        np.testing.assert_array_equal(dream.images[:, 0, 0, 0, 0], first + np.arange(dream.num_steps + 1))
        assert dream.actor == "imagined" and len(dream.success) == dream.num_steps + 1
    succeeds = [8, 3, None, 8, 5] if stride == 1 else [5, 1, None, 5, 5]
    assert [np.flatnonzero(dream.success).min() if dream.success.any() else None for dream in dreams] == succeeds


def test_an_episode_longer_than_the_reflector_reads_is_refused(tmp_path):
    config = get_config("debug")
    with pytest.raises(WorldEnvError, match="an episode has 50 frames, reflector.max_frames is 49"):
        train_reflector(config, tmp_path, None, [make_episode(8, 0), make_episode(49, 0)], ("go",))


def test_calibrating_again_changes_nothing(monkeypatch):
    """R is judged with the temperature found before; what is fitted to it multiplies that one."""
    config = get_config("debug")
    config = replace(config, rollout=replace(config.rollout, num_chunks=4))
    rng = np.random.default_rng(0)
    episodes = [make_episode(16, 0), make_episode(12, 0)]
    logit = 4.0 * labels_of(config, episodes) - 2.0 + rng.normal(size=(2, 16))
    logit[:, :2] *= -1.0  # false alarms

    def judge(models, params, episodes):
        mask = pad_steps([episode.success[1:] for episode in episodes], 16)[1]
        return 1 / (1 + np.exp(-logit / models.config.reflector.temperature)), mask

    monkeypatch.setattr(reflector_training, "judge_episodes", judge)
    first = calibrate(config, SimpleNamespace(config=config), {}, [episodes])
    assert first["temperature"] != pytest.approx(1.0, rel=0.01)
    told = replace(config, reflector=replace(config.reflector, temperature=first["temperature"]))
    again = calibrate(config, SimpleNamespace(config=told), {}, [episodes])
    assert again["temperature"] == pytest.approx(first["temperature"], rel=1e-5)
    assert again["threshold"] == first["threshold"]
