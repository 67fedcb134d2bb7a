# SPDX-License-Identifier: Apache-2.0
"""The tabletop behind `Environment`, its expert, and the true world in the simulator's place."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.data.episodes import episodes_equal, validate_episode
from worldenv_jax.envs.tabletop import (
    TabletopConfig,
    TabletopEnvironment,
    camera,
    oracle_reflector_fns,
    stack_states,
    tabletop_simulator_fns,
)
from worldenv_jax.rollout import RolloutConfig, RolloutParams, imagine_rollout
from worldenv_jax.types import Camera, EpisodeSpec, Starts, Statistics, Text

CONFIG = TabletopConfig(image_size=32)
SPECS = [EpisodeSpec(task=n % 10, seed=n // 10, split=("train", "test")[n % 2]) for n in range(64)]


@pytest.fixture(scope="module")
def environment():
    return TabletopEnvironment(CONFIG, num_slots=32)


@pytest.fixture(scope="module")
def demonstrations(environment):
    return list(environment.expert_episodes(SPECS, noise=0.0))


def test_expert_solves_nearly_every_start(environment, demonstrations):
    assert sum(episode.succeeded for episode in demonstrations) >= 63
    assert np.mean([episode.num_steps for episode in demonstrations]) < 34
    perturbed = list(environment.expert_episodes(SPECS, noise=0.1))
    assert sum(episode.succeeded for episode in perturbed) >= 58
    assert perturbed[0].actor == "perturbed_expert"


def test_expert_episodes_are_valid_and_end_after_the_aftermath(demonstrations):
    for spec, episode in zip(SPECS, demonstrations):
        validate_episode(episode)
        assert (episode.task, episode.seed, episode.split, episode.actor) == (*spec[:3], "expert")
        assert episode.num_steps == min(episode.first_success + CONFIG.aftermath_steps, CONFIG.max_steps)
        assert np.abs(episode.actions).max() <= 1.0
    np.testing.assert_allclose(demonstrations[0].intrinsics[3, 0], camera.intrinsics(32))
    np.testing.assert_allclose(demonstrations[0].camera_pose[3, 0], camera.pose())


def test_expert_episodes_do_not_depend_on_their_batch(environment, demonstrations):
    again = list(environment.expert_episodes(SPECS[5:7], noise=0.0))
    assert episodes_equal(again[0], demonstrations[5])
    assert episodes_equal(again[1], demonstrations[6])


def test_replayed_actions_repeat_the_episode(environment, demonstrations):
    episode = demonstrations[7]
    first = environment.reset([3], [SPECS[7]])
    assert np.abs(first.images[0, 0].astype(int) - episode.images[0].astype(int)).mean() < 0.1
    for begin in range(0, episode.num_steps - 3, 4):
        frames = environment.step([3], episode.actions[None, begin : begin + 4], every_frame=True)
        np.testing.assert_array_equal(frames.success[0], episode.success[begin + 1 : begin + 5])
        np.testing.assert_allclose(frames.proprio[0], episode.proprio[begin + 1 : begin + 5], atol=1e-4)
    for name, leaf in environment.start_state(3).items():
        np.testing.assert_allclose(leaf, episode.environment[name], atol=1e-6)


def test_slots_are_independent_of_each_other(environment):
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 4, 7)).astype(np.float32)
    environment.reset([0, 1, 2], SPECS[:3])
    together = environment.step([0, 1, 2], actions, every_frame=True)
    environment.reset([9], SPECS[1:2])
    alone = environment.step([9], actions[1:2], every_frame=True)
    np.testing.assert_array_equal(alone.images[0], together.images[1])
    np.testing.assert_array_equal(alone.proprio[0], together.proprio[1])
    untouched = environment.step([0], np.zeros((1, 4, 7)), every_frame=True)
    np.testing.assert_allclose(untouched.proprio[0, -1, :3], together.proprio[0, -1, :3], atol=1e-6)


def test_the_last_frame_alone_is_the_last_of_all_frames(environment):
    actions = np.full((2, 4, 7), 0.3, np.float32)
    environment.reset([4, 8], SPECS[:2])
    every = environment.step([4, 8], actions, every_frame=True)
    environment.reset([4, 8], SPECS[:2])
    last = environment.step([4, 8], actions, every_frame=False)
    assert every.images.shape == (2, 4, 1, 32, 32, 3)
    assert last.images.shape == (2, 1, 1, 32, 32, 3)
    assert last.camera.pose.shape == (2, 1, 1, 4, 4)
    assert last.success.shape == (2, 4)
    assert np.abs(last.images[:, -1].astype(int) - every.images[:, -1].astype(int)).mean() < 0.1
    np.testing.assert_allclose(last.proprio[:, -1], every.proprio[:, -1], atol=1e-6)


def test_bad_input_is_named(environment):
    environment.reset([0], SPECS[:1])
    good = np.zeros((1, 4, 7), np.float32)
    with pytest.raises(ValueError, match=r"shape \[1, K, 7\], got \[1, 4, 6\]"):
        environment.step([0], good[..., :6], every_frame=True)
    with pytest.raises(ValueError, match="NaN"):
        environment.step([0], good * np.nan, every_frame=True)
    with pytest.raises(ValueError, match="different numbers from 0 to 31"):
        environment.reset([32], SPECS[:1])
    with pytest.raises(ValueError, match="2 specs for 1 slots"):
        environment.reset([0], SPECS[:2])
    with pytest.raises(ValueError, match="call reset first"):
        TabletopEnvironment(CONFIG, num_slots=2).step([1], good, every_frame=True)
    with pytest.raises(ValueError, match="task: got 10"):
        environment.reset([0], [EpisodeSpec(task=10, seed=0)])
    with pytest.raises(ValueError, match="official"):
        environment.reset([0], [EpisodeSpec(task=0, seed=0, starts="official")])


def test_protocol_holds_every_number_of_the_world(environment):
    protocol = json.loads(json.dumps(environment.protocol))
    assert protocol["max_steps"] == environment.max_steps == 24
    assert protocol["tabletop"]["object_jitter"] == CONFIG.object_jitter


def test_the_true_world_behind_the_simulators_border(demonstrations):
    episodes, count = demonstrations[:4], 4
    padded = np.zeros((count, 32, 7), np.float32)
    padded[..., 6] = -1.0
    for row, episode in enumerate(episodes):
        padded[row, : episode.num_steps] = episode.actions
    statistics = Statistics(-jnp.ones(7), jnp.ones(7), -jnp.ones(8), jnp.ones(8))
    text = Text(jnp.zeros((count, 1), jnp.int32), jnp.ones((count, 1), bool))
    starts = Starts(
        images=jnp.stack([episode.images[0] for episode in episodes]),
        proprio=jnp.stack([episode.proprio[0] for episode in episodes]),
        policy_text=text,
        reflector_text=text,
        camera=Camera(*(jnp.zeros((count, 1, n, n)) for n in (3, 4))),
        task=jnp.array([episode.task for episode in episodes]),
        environment=stack_states([episode.environment for episode in episodes]),
    )
    actions = statistics.normalize_action(jnp.asarray(padded)).reshape(count, 4, 8, 7)
    rollout = imagine_rollout(
        actions,
        tabletop_simulator_fns(statistics, CONFIG),
        oracle_reflector_fns(),
        RolloutParams((), (), ()),
        jax.random.key(0),
        starts,
        RolloutConfig(num_chunks=4, samples=1),
    )
    np.testing.assert_array_equal(rollout.length, [episode.first_success for episode in episodes])
    np.testing.assert_array_equal(rollout.reward, np.ones(count))
    for row, episode in enumerate(episodes):
        frames = rollout.frames[row].reshape(32, 1, 32, 32, 3)[: episode.first_success]
        assert np.abs(frames.astype(int) - episode.images[1 : episode.first_success + 1]).mean() < 0.1
