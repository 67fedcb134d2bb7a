# SPDX-License-Identifier: Apache-2.0
"""The stages of the simulator's training with all that LIBERO's presets use, on made-up episodes of two views."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from worldenv_jax.configs import libero_debug
from worldenv_jax.data.episodes import Episode
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.simulator import Kinematics, init_simulator
from worldenv_jax.training import simulator_training as training
from worldenv_jax.training.workdir import Workdir
from worldenv_jax.types import Statistics

CONFIG = libero_debug()
ONES = np.ones(8, np.float32)
STATISTICS = Statistics(-ONES[:7], ONES[:7], -ONES, ONES)
KINEMATICS = Kinematics.osc_pose()._replace(
    momentum=np.full(6, 0.5, np.float32),
    position_low=-np.ones(3, np.float32),
    position_high=np.ones(3, np.float32),
)


def _episode(seed, steps=40):
    rng = np.random.default_rng(seed)
    frames = steps + 1
    images = rng.integers(0, 256, (1, 2, 8, 8, 3), dtype=np.uint8).repeat(8, 2).repeat(8, 3).repeat(frames, 0)
    proprio = np.tile(np.array([0, 0, 0.3, np.pi, 0, 0, 0.04, -0.04], np.float32), (frames, 1))
    proprio[:, 0] = 0.002 * np.arange(frames)
    pose = np.diag([1.0, -1.0, -1.0, 1.0]).astype(np.float32)
    pose[:3, 3] = 0, 0, 0.4
    intrinsics = np.array([[-40, 0, 32], [0, 40, 32], [0, 0, 1]], np.float32)
    return Episode(
        images=images, proprio=proprio, actions=rng.uniform(-1, 1, (steps, 7)).astype(np.float32),
        success=np.zeros(frames, bool), intrinsics=np.tile(intrinsics, (frames, 2, 1, 1)),
        camera_pose=np.tile(pose, (frames, 2, 1, 1)), instruction="lift", task=0, seed=seed, split="train",
        starts="shifted", actor="policy",
        photographs=np.full(CONFIG.simulator.photographs_shape, seed, np.uint8),
    )  # fmt: skip


def test_every_part_is_trained_in_turn(tmp_path):
    episodes, workdir = [_episode(seed) for seed in range(3)], Workdir(tmp_path, {})
    linear = replace(CONFIG, autoencoder=replace(CONFIG.autoencoder, steps=0))
    params = training.train_autoencoder(linear, workdir, episodes)
    latents = training.cache_latents(CONFIG.simulator, params, episodes)
    assert latents[0].shape == (41, 2, *CONFIG.simulator.latent_size, 8)

    with_arm = training.train_arm_motion(CONFIG, workdir, params, episodes, KINEMATICS)
    assert any(leaf.any() for leaf in jax.tree.leaves(with_arm["arm_motion"]["out"]))  # starts at zero
    untrained = jax.tree.map(np.asarray, with_arm)  # training may reuse the memory of what it starts from
    with_pictures = training.train_compositor(CONFIG, workdir, with_arm, episodes, STATISTICS, KINEMATICS)
    before = jax.tree.map(np.asarray, with_pictures)
    bias = lambda tree: tree["compositor"]["drawing"]["trunk"]["pixels"]["bias"]
    assert np.any(bias(before) != bias(untrained))
    trained = training.train_denoiser(CONFIG, workdir, with_pictures, episodes, STATISTICS, KINEMATICS)
    for name in ("autoencoder", "arm_motion", "compositor"):
        jax.tree.map(np.testing.assert_array_equal, trained[name], before[name])
    kernel = lambda tree: np.asarray(tree["denoiser"]["unet"]["conv_out"]["kernel"])
    assert np.any(kernel(trained) != kernel(before))


def test_batches_know_where_the_hand_was_last_open():
    """Beside episodes of other lengths; the hand closes after step 12 and opens at step 30."""
    episodes = [_episode(seed, steps) for seed, steps in ((0, 40), (1, 25), (2, 33))]
    for episode in episodes:
        episode.proprio[13:30, 6:] = 0.02, -0.02
    config = CONFIG.simulator
    params = init_simulator(config, jax.random.key(0))
    sampler = training.make_sampler(config, params, episodes, STATISTICS, KINEMATICS, 16, 0)
    batches = [sampler(step) for step in range(4)]
    times = np.concatenate([np.rint(batch.proprio[:, -1, 0] / 0.002).astype(int) for batch in batches])
    grasps = np.concatenate([batch.grasp for batch in batches])
    assert ((times > 12) & (times < 30)).any() and (times >= 30).any() and (times < 12).any()
    expected = np.where((times > 12) & (times < 30), 12, times)
    np.testing.assert_array_equal(np.rint(grasps[:, 0] / 0.002), expected)
    np.testing.assert_allclose(grasps[:, 6], 0.04)


def test_batches_have_the_photographs_of_their_episodes():
    episodes, config = [_episode(seed, steps) for seed, steps in ((0, 20), (1, 25), (2, 23))], CONFIG.simulator
    params = init_simulator(config, jax.random.key(0))
    first = np.stack([episode.images[0] for episode in episodes])
    batch = training.make_sampler(config, params, episodes, STATISTICS, KINEMATICS, 16, 0)(0)
    seeds = batch.photographs[:, 0, 0, 0, 0]
    assert set(seeds) == {0, 1, 2} and (batch.photographs == seeds[:, None, None, None, None]).all()
    np.testing.assert_array_equal(batch.first_images, first[seeds])
    plain = replace(config, photograph_size=0, glance_size=0)
    assert training.make_sampler(plain, params, episodes, STATISTICS, KINEMATICS, 2, 0)(0).photographs is None


def test_the_arms_motion_is_fitted_again_to_imagined_pictures(tmp_path):
    episodes, workdir, asked = [_episode(seed) for seed in range(2)], Workdir(tmp_path, {}), []
    params = jax.tree.map(np.asarray, init_simulator(CONFIG.simulator, jax.random.key(0)))
    params["autoencoder"] = jax.tree.map(lambda x: x + 0.1, params["autoencoder"])

    def replay():
        asked.append(1)
        return [replace(episode, images=255 - episode.images) for episode in episodes]

    run = lambda *replay: training.train_arm_motion(CONFIG, workdir, params, episodes, KINEMATICS, *replay)
    true, imagined, again = run(), run(replay), run(replay)
    bias = lambda tree: tree["arm_motion"]["out"]["bias"]
    assert np.any(bias(true) != bias(imagined)) and len(asked) == 1  # a finished stage needs no replays
    np.testing.assert_array_equal(bias(imagined), bias(again))


def test_stretches_lie_around_the_closing_of_the_hand():
    actions = np.full((100, 7), -1.0)
    actions[60:, 6] = 1.0
    starts = np.array([training._stretch_start(np.random.default_rng(seed), actions, 32) for seed in range(400)])
    assert starts.min() == 0 and starts.max() <= 68
    assert 0.15 < np.mean(starts == 0) < 0.27
    assert np.mean((starts > 60 - 32) & (starts < 60)) > 0.5  # 0.31 / 0.69 of the others are there by chance
    never = [training._stretch_start(np.random.default_rng(seed), -np.ones((32, 7)), 32) for seed in range(20)]
    assert set(never) == {0}


def test_the_arms_motion_goes_on_where_it_was_stopped(tmp_path):
    episodes = [_episode(seed) for seed in range(2)]
    params = jax.tree.map(np.asarray, init_simulator(CONFIG.simulator, jax.random.key(0)))
    run = lambda name, steps: training.train_arm_motion(
        replace(CONFIG, arm_motion=replace(CONFIG.arm_motion, steps=steps)),
        Workdir(tmp_path / name, {}),
        params,
        episodes,
        KINEMATICS,
    )["arm_motion"]
    half, whole = (jax.tree.leaves(run(name, steps)) for name, steps in (("stopped", 2), ("whole", 4)))
    assert any(np.any(one != other) for one, other in zip(half, whole))
    for resumed, straight in zip(jax.tree.leaves(run("stopped", 4)), whole, strict=True):
        np.testing.assert_array_equal(resumed, straight)


def test_episodes_too_short_for_a_stretch_are_refused(tmp_path):
    episodes = [_episode(0, steps=31)]
    with pytest.raises(WorldEnvError, match="no episode has 32 steps: set simulator.motion_width=0"):
        training.train_arm_motion(CONFIG, Workdir(tmp_path, {}), {}, episodes, KINEMATICS)
