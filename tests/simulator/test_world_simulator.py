# SPDX-License-Identifier: Apache-2.0
"""The simulator as a function of actions: memory, noise, batching, and that training sees what roll-outs see."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.simulator import (
    Kinematics,
    SimulatorBatch,
    SimulatorConfig,
    advance_proprio,
    denoising_loss,
    encode_frames,
    init_simulator,
    make_simulator_fns,
    no_grip,
)
from worldenv_jax.simulator.arm_motion import ArmContext
from worldenv_jax.simulator.conditioning import (
    camera_poses,
    chunk_inputs,
    decode_images,
    encode_images,
    guess_v,
    make_glance,
    predict_v,
    prepare,
)
from worldenv_jax.simulator.losses import drop_conditions
from worldenv_jax.simulator.noise_schedule import noise_schedule
from worldenv_jax.simulator.poses import hand_poses
from worldenv_jax.simulator.reprojection import guess_frames
from worldenv_jax.simulator.world_simulator import ChunkInputs
from worldenv_jax.types import Camera, Starts, Statistics, Text

DEBUG = SimulatorConfig.debug()
# Two resolutions and four transformers: the debug preset's only one reads the actions' tokens and not the images'.
CONFIG = dataclasses.replace(DEBUG, unet=dataclasses.replace(DEBUG.unet, multipliers=(1, 2), attention_levels=(1,)))
STATISTICS = Statistics(
    -np.ones(7, np.float32), np.ones(7, np.float32), -np.ones(8, np.float32), np.ones(8, np.float32)
)
KINEMATICS = Kinematics.osc_pose()


@pytest.fixture(scope="module")
def params():
    """Random parameters, those that start at zero filled too: an untrained branch would hide mistakes."""
    leaves, tree = jax.tree.flatten(init_simulator(CONFIG, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


def _camera(count):
    intrinsics = np.tile(np.array([[32, 0, 16], [0, 32, 16], [0, 0, 1]], np.float32), (count, 1, 1, 1))
    pose = np.array([[1, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 1], [0, 0, 0, 1]], np.float32)
    return Camera(intrinsics, np.tile(pose, (count, 1, 1, 1)))


def _starts(count):
    rng = np.random.default_rng(0)
    text = Text(np.zeros((count, 2), np.int32), np.ones((count, 2), bool))
    images = rng.integers(0, 256, (count, 1, 32, 32, 3), dtype=np.uint8)
    proprio = rng.uniform(-0.1, 0.1, (count, 8)).astype(np.float32)
    return Starts(images, proprio, text, text, _camera(count), np.zeros(count, np.int32))


def _actions(count):
    return np.random.default_rng(1).uniform(-1, 1, (count, CONFIG.chunk, 7)).astype(np.float32)


@pytest.fixture(scope="module")
def fns():
    simulator = make_simulator_fns(CONFIG, STATISTICS, KINEMATICS)
    return jax.jit(simulator.init), jax.jit(simulator.step)


def test_two_chunks(params, fns):
    init, step = fns
    keys = jax.random.split(jax.random.key(0), 3)
    state = init(params, keys, _starts(3))
    for chunk in (1, 2):
        before = state
        state, prediction = step(params, keys, state, _actions(3))
        assert prediction.frames.shape == (3, CONFIG.chunk, 1, 32, 32, 3) and prediction.frames.dtype == jnp.uint8
        assert int(state.count) == CONFIG.history + chunk * CONFIG.chunk
        filled = int(before.count)
        np.testing.assert_array_equal(state.latents[:, :, :filled], before.latents[:, :, :filled])
        np.testing.assert_array_equal(state.proprio[:, filled : filled + CONFIG.chunk], prediction.proprio)
    assert prediction.success is None


def test_the_state_knows_where_the_hand_was_last_open(params, fns):
    """Open for a chunk, closed for two: what is held moved with the hand since it began to close."""
    init, step = fns
    keys, starts, actions = jax.random.split(jax.random.key(0), 3), _starts(3), _actions(3)
    starts.proprio[:, 6:] = 0.04, -0.04
    state, places = init(params, keys, starts), []
    for gripper in (1.0, 0.0, 0.0):  # a policy's: 1 = open
        actions[..., 6] = gripper
        state, prediction = step(params, keys, state, actions)
        places.append(np.asarray(prediction.proprio))
    opening = places[1][..., 6] - places[1][..., 7]
    assert (places[0][..., 6] == 0.04).all() and (opening[:, -1] < 0.07).all()
    last_open = (opening > 0.9 * 0.08).sum(1)  # steps of the second chunk before it counts as closed
    together = np.concatenate([places[0][:, -1:], places[1]], axis=1)
    np.testing.assert_array_equal(state.grasp, together[np.arange(3), last_open])


def test_proprioception_is_the_deterministic_step(params, fns):
    init, step = fns
    keys, starts, actions = jax.random.split(jax.random.key(0), 3), _starts(3), _actions(3)
    _, prediction = step(params, keys, init(params, keys, starts), actions)
    commands = np.concatenate([actions[..., :6], np.where(actions[..., 6:] > 0.5, -1.0, 1.0)], axis=-1)
    expected = advance_proprio(KINEMATICS, starts.proprio, starts.proprio, commands.astype(np.float32)).proprio
    np.testing.assert_allclose(prediction.proprio, expected, atol=1e-6)


def test_two_chunks_of_two_cameras_with_arm_motion():
    """The network sees the hand camera's newest latents, and knows the action of the chunk before."""
    config = SimulatorConfig.libero_debug()
    params = init_simulator(config, jax.random.key(2))
    kernel = params["arm_motion"]["out"]["kernel"]
    params["arm_motion"]["out"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(3), kernel.shape)
    params["autoencoder"] = jax.tree.map(lambda x: x + 0.1, params["autoencoder"])  # zeros, if not fitted
    kinematics = KINEMATICS._replace(position_low=-np.ones(3, np.float32), position_high=np.ones(3, np.float32))
    simulator = make_simulator_fns(config, STATISTICS, kinematics)
    two_views = lambda leaf, axis: np.repeat(leaf, 2, axis)
    starts = _starts(2)
    images = two_views(starts.images, 1).repeat(2, 2).repeat(2, 3)
    photographs = images.repeat(2, 2).repeat(2, 3)
    camera = Camera(*(two_views(leaf, 1) for leaf in starts.camera))
    starts = starts._replace(images=images, camera=camera, photographs=photographs)
    actions = np.random.default_rng(1).uniform(-1, 1, (2, 2, config.chunk, 7)).astype(np.float32)

    @jax.jit
    def rollout(params, keys):
        chunk = lambda state, action: simulator.step(params, keys, state, action)
        return jax.lax.scan(chunk, simulator.init(params, keys, starts), actions)

    state, prediction = rollout(params, jax.random.split(jax.random.key(0), 2))
    assert prediction.frames.shape == (2, 2, config.chunk, 2, 64, 64, 3)
    commands = STATISTICS.unnormalize_action(np.concatenate(actions, axis=1))

    def advance(previous, current, commands, previous_action, seen):
        glance = make_glance(config, starts.photographs, starts.camera, kinematics)
        arm = ArmContext(params["arm_motion"], previous_action, seen, no_grip(2), glance)
        return advance_proprio(kinematics, previous, current, commands, arm)

    still = np.zeros((2, 7), np.float32)
    seen = state.latents[:, 1:, config.history - 1 :: config.chunk][:, :, :2].swapaxes(1, 2)
    first = encode_frames(config, params, starts.images)[:, 1:]
    np.testing.assert_allclose(seen[:, 0], first, atol=1e-5)
    expected = advance(starts.proprio, starts.proprio, commands, still, seen)
    np.testing.assert_allclose(np.concatenate(prediction.proprio, axis=1), expected.proprio, atol=2e-5)
    jax.tree.map(lambda carried, leaf: np.testing.assert_array_equal(carried, leaf[:, -1]), state.grip, expected.grip)
    before = prediction.proprio[0, :, -2:].swapaxes(0, 1)
    forgetful = advance(*before, commands[:, 8:], still, seen[:, 1:]).proprio
    assert np.abs(forgetful - prediction.proprio[1]).max() > 1e-4
    blind = advance(*before, commands[:, 8:], commands[:, 7], seen[:, :1] + 1.0).proprio
    assert np.abs(blind - prediction.proprio[1]).max() > 1e-4


def _chain_of_first_pictures(stride, photographs=None):
    """Two chunks of a roll-out whose denoiser changes nothing: only first pictures, each made of the history alone."""
    config = dataclasses.replace(SimulatorConfig.libero_debug(), change_variance=1e-6, ddim_steps=1, history=2)
    config = dataclasses.replace(config, frame_stride=stride)
    if photographs is None:
        config = dataclasses.replace(config, photograph_size=0, glance_size=0)
    params = init_simulator(config, jax.random.key(2))
    coder = params["autoencoder"]
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(coder["shortcut_in"]["kernel"].shape)))[0]
    coder["shortcut_in"]["kernel"], coder["shortcut_out"]["kernel"] = jnp.asarray(basis), jnp.asarray(basis.T)
    kinematics = KINEMATICS._replace(position_low=-np.ones(3, np.float32), position_high=np.ones(3, np.float32))
    simulator = make_simulator_fns(config, STATISTICS, kinematics)
    starts, keys = _starts(2), jax.random.split(jax.random.key(0), 2)
    images = starts.images.repeat(2, 1).repeat(2, 2).repeat(2, 3)
    camera = Camera(*(np.repeat(leaf, 2, 1) for leaf in starts.camera))
    starts = starts._replace(images=images, camera=camera, photographs=photographs)
    actions = np.random.default_rng(1).uniform(-1, 1, (2, 2, config.chunk, 7)).astype(np.float32)

    @jax.jit
    def rollout(params):
        chunk = lambda state, action: simulator.step(params, keys, state, action)
        return jax.lax.scan(chunk, simulator.init(params, keys, starts), actions)[1]

    return jax.tree.map(np.asarray, rollout(params))


@pytest.mark.parametrize("stride", [2, 8])
def test_a_stride_generates_the_same_frames_and_fewer(stride):
    """With a history of the first and the last frame, the last frame of a chunk hangs on no frame within it."""
    every, some = _chain_of_first_pictures(1), _chain_of_first_pictures(stride)
    assert some.frames.shape == every.frames.shape == (2, 2, 8, 2, 64, 64, 3)
    groups = some.frames.reshape(2, 2, 8 // stride, stride, *some.frames.shape[3:])
    assert (groups == groups[:, :, :, -1:]).all()  # a picture stands for the steps before it
    generated = every.frames[:, :, stride - 1 :: stride].astype(int)
    assert np.abs(generated - groups[:, :, :, -1]).max() <= 1
    assert len(np.unique(every.frames[0, 0, :, 1].reshape(8, -1), axis=0)) == 8  # the hand's camera moves
    np.testing.assert_array_equal(some.proprio, every.proprio)


def test_the_hands_camera_is_shown_the_photographs():
    bright, dark = (
        _chain_of_first_pictures(8, np.full((2, 2, 128, 128, 3), grey, np.uint8)).frames for grey in (200, 50)
    )
    np.testing.assert_array_equal(bright[:, :, :, 0], dark[:, :, :, 0])  # the standing camera has its own frame
    assert np.abs(bright[..., 1, :, :, :].astype(int) - dark[..., 1, :, :, :]).max() > 5


def test_the_loss_with_a_stride_looks_at_generated_frames(params):
    config = dataclasses.replace(CONFIG, frame_stride=2)
    batch, last = _batch(params), CONFIG.history + CONFIG.chunk - 1
    loss = jax.jit(lambda b: denoising_loss(config, params, jax.random.key(0), b, STATISTICS, KINEMATICS)[0])
    between = batch._replace(latents=batch.latents.at[:, [last - 3, last - 1]].set(7.0))
    generated = batch._replace(latents=batch.latents.at[:, last].set(7.0))
    assert loss(between) == loss(batch) != loss(generated)


def test_a_stride_must_divide_the_chunk():
    with pytest.raises(ValueError, match="frame_stride is 3, must be a divisor of the chunk of 4"):
        dataclasses.replace(CONFIG, frame_stride=3)


def test_batched_equals_one_at_a_time(params, fns):
    init, step = fns
    keys, starts, actions = jax.random.split(jax.random.key(0), 3), _starts(3), _actions(3)
    _, together = step(params, keys, init(params, keys, starts), actions)
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], starts)
        _, alone = step(params, keys[i : i + 1], init(params, keys[i : i + 1], one), actions[i : i + 1])
        difference = np.abs(np.int32(together.frames[i : i + 1]) - np.int32(alone.frames))
        assert difference.max() <= 1


def test_frames_depend_on_actions_and_on_keys(params, fns):
    init, step = fns
    keys = jax.random.split(jax.random.key(0), 3)
    state = init(params, keys, _starts(3))
    _, one = step(params, keys, state, _actions(3))
    _, other = step(params, keys, state, -_actions(3))
    _, resampled = step(params, jax.random.split(jax.random.key(5), 3), state, _actions(3))
    assert (one.frames != other.frames).any() and (one.frames != resampled.frames).any()


def test_every_step_reuses_one_compilation(params):
    simulator = make_simulator_fns(CONFIG, STATISTICS, KINEMATICS)
    traced = []

    @jax.jit
    def rollout(params, keys, starts, actions):
        def chunk(state, action):
            traced.append(1)
            state, prediction = simulator.step(params, keys, state, action)
            return state, prediction.proprio

        return jax.lax.scan(chunk, simulator.init(params, keys, starts), actions)[1]

    actions = np.stack([_actions(2)] * 3)
    assert rollout(params, jax.random.split(jax.random.key(0), 2), _starts(2), actions).shape == (3, 2, 4, 8)
    assert len(traced) == 1


def test_wrong_starts_are_named(params):
    simulator = make_simulator_fns(CONFIG, STATISTICS, KINEMATICS)
    starts = _starts(2)._replace(images=np.zeros((2, 2, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="images \\[B, \\(2, 32, 32, 3\\)\\], expected"):
        simulator.init(params, jax.random.split(jax.random.key(0), 2), starts)


def test_a_preset_that_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="image_size.*action_resampler.input_width is 7, must be 14"):
        dataclasses.replace(CONFIG, image_size=(33, 32), arms=2)


def _batch(params, count=2):
    rng = np.random.default_rng(2)
    frames = rng.integers(0, 256, (count, CONFIG.frames, 1, 32, 32, 3), dtype=np.uint8)
    proprio = rng.uniform(-0.1, 0.1, (count, CONFIG.history, 8)).astype(np.float32)
    return SimulatorBatch(
        latents=encode_frames(CONFIG, params, frames),
        first_images=frames[:, 0],
        proprio=proprio,
        previous_proprio=proprio[:, -1],
        previous_action=np.zeros((count, 7), np.float32),
        grasp=proprio[:, -1],
        grip=no_grip(count),
        holds=np.zeros((count, CONFIG.chunk), np.float32),
        actions=_actions(count),
        camera=_camera(count),
        mask=np.ones((count, CONFIG.chunk), bool),
    )


@functools.partial(jax.jit, static_argnums=0)
def _loss(config, params, key, batch):
    return denoising_loss(config, params, key, batch, STATISTICS, KINEMATICS)


def test_loss_starts_near_the_variance_of_v():
    """The last layer starts at zero, so v is predicted as 0 and the loss is its variance, about 1."""
    fresh = init_simulator(CONFIG, jax.random.key(0))
    batch = _batch(fresh, 8)
    scaled = dataclasses.replace(CONFIG, latent_scale=1.0)
    batch = batch._replace(latents=batch.latents / jnp.std(batch.latents))
    loss, metrics = _loss(scaled, fresh, jax.random.key(1), batch)
    assert 0.7 < float(loss) < 1.3 and set(metrics) == {"v_error", "x0_error"}


def test_masked_frames_do_not_count(params):
    batch = _batch(params)
    mask = np.ones((2, CONFIG.chunk), bool)
    mask[:, 2:] = False
    changed = batch._replace(latents=batch.latents.at[:, CONFIG.history + 2 :].set(7.0), mask=mask)
    loss = lambda b: _loss(CONFIG, params, jax.random.key(0), b)[0]
    # Temporal attention sees the noisy future, so only the target may differ: compare at full noise.
    full = dataclasses.replace(CONFIG, ddim_steps=1)
    at_full_noise = lambda b: _loss(full, params, jax.random.key(0), b)[0]
    np.testing.assert_allclose(at_full_noise(changed), at_full_noise(batch._replace(mask=mask)), rtol=1e-5)
    assert not np.isclose(loss(batch), loss(changed))


def test_wrong_batches_are_named(params):
    batch = _batch(params)._replace(mask=np.ones((2, 3), bool))
    with pytest.raises(ValueError, match="mask \\[B, \\(3,\\)\\], expected \\[B, \\(4,\\)\\]"):
        denoising_loss(CONFIG, params, jax.random.key(0), batch, STATISTICS, KINEMATICS)


def test_condition_dropout_drops_what_the_reference_drops():
    config = dataclasses.replace(CONFIG, condition_dropout=0.1)
    count = 2000
    ones = lambda *shape: jnp.ones((count, *shape))
    frames = CONFIG.frames
    inputs = ChunkInputs(
        ones(1, frames, 1, 1, 1), ones(1, frames), ones(1, frames, 1, 1, 1), ones(1, frames, 1, 1, 6), ones(4, 7)
    )
    key = jax.random.key(0)
    dropped, images = drop_conditions(config, key, inputs, ones(1, 1, 1, 3))
    r = np.asarray(jax.random.uniform(key, (count,)))
    within = lambda *spans: np.any([(low <= r) & (r < high) for low, high in spans], axis=0)
    np.testing.assert_array_equal(dropped.deltas[:, 0, 0] == 0, within((0, 0.2)))
    np.testing.assert_array_equal(images[:, 0, 0, 0, 0] == 0, within((0.1, 0.3)))
    np.testing.assert_array_equal(dropped.maps[:, 0, -1, 0, 0, 0] == 0, within((0.05, 0.15)))
    no_image = within((0, 0.05), (0.1, 0.15), (0.25, 0.35))
    np.testing.assert_array_equal(dropped.present[:, 0, -1] == 0, no_image)
    np.testing.assert_array_equal(dropped.image_latents[:, 0, -1, 0, 0, 0] == 0, no_image)
    assert (dropped.present[:, 0, : CONFIG.history] == 1).all()


def test_hand_camera_moves_with_the_hand():
    config = dataclasses.replace(CONFIG, views=2, hand_views=(1,))
    hand = np.tile(np.eye(4, dtype=np.float32), (1, 2, 1, 1))
    hand[0, 1, :3, 3] = [0.1, 0.2, 0.3]
    hand[0, 1, :2, :2] = [[0, -1], [1, 0]]
    camera = np.tile(np.eye(4, dtype=np.float32), (1, 2, 1, 1))
    camera[0, 1, :3, 3] = [1.0, 0.0, 0.0]
    poses = np.asarray(camera_poses(config, jnp.asarray(hand), jnp.asarray(camera)))
    np.testing.assert_allclose(poses[0, 0], np.tile(np.eye(4), (2, 1, 1)), atol=1e-6)
    np.testing.assert_allclose(poses[0, 1, 0], camera[0, 1], atol=1e-6)
    np.testing.assert_allclose(poses[0, 1, 1, :3, 3], [0.1, 1.2, 0.3], atol=1e-5)


def test_two_views_share_one_denoiser(params):
    """Spatial attention joins the views: what one camera sees changes what is predicted for the other."""
    shape = (1, 2, CONFIG.frames, *CONFIG.latent_size)
    rng = np.random.default_rng(3)
    draw = lambda channels: jnp.asarray(rng.normal(size=(*shape, channels)), jnp.float32)
    inputs = ChunkInputs(
        draw(4), jnp.ones(shape[:3]), draw(CONFIG.map_channels), draw(6), jnp.ones((1, CONFIG.chunk, 7)),
        jnp.zeros((1, CONFIG.frames, 21)),
    )  # fmt: skip
    tokens = jnp.ones((1, 8, CONFIG.unet.context_width))
    latents = draw(4)

    @jax.jit
    def v(inputs):
        return predict_v(CONFIG, params, latents, jnp.full((1, 2), 500), prepare(CONFIG, params, inputs, tokens))

    changed = inputs._replace(rays=inputs.rays.at[:, 1].add(1.0))
    assert v(inputs).shape == latents.shape
    assert np.abs(v(inputs) - v(changed))[:, 0].max() > 1e-4


@pytest.mark.parametrize("guess", [0, 3, 5, 6, 7])
def test_the_first_picture_is_what_the_denoiser_corrects(guess):
    """A compositor that always takes one guess, or (7) its own picture, all grey; a denoiser that changes nothing.

    A transparent drawing: guess 0 is the oldest frame of the standing camera.
    """
    config = SimulatorConfig.libero_debug()
    config = dataclasses.replace(config, change_variance=1e-6, motion_width=0, plane_heights=(0.03, 0.12))
    config = dataclasses.replace(config, photograph_size=0, glance_size=0)
    params = init_simulator(config, jax.random.key(0))
    coder = params["autoencoder"]  # 8 orthonormal colours and shapes of a patch, about none of them lost
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(coder["shortcut_in"]["kernel"].shape)))[0]
    coder["shortcut_in"]["kernel"], coder["shortcut_out"]["kernel"] = jnp.asarray(basis), jnp.asarray(basis.T)
    for name, chosen in (("drawing", [-50.0]), ("choice", 50.0 * jnp.eye(8)[guess])):
        pixels = params["compositor"][name]["trunk"]["pixels"]
        pixels["kernel"] = jnp.zeros_like(pixels["kernel"])
        pixels["bias"] = jnp.tile(jnp.concatenate([jnp.zeros(3), jnp.asarray(chosen)]), 16)
    rng = np.random.default_rng(1)
    history = jnp.asarray(0.3 * rng.normal(size=(1, 2, config.history, *config.latent_size, 8)), jnp.float32)
    proprio = np.zeros((1, config.frames, 8), np.float32)
    proprio[0, :, 0] = 0.017 * np.arange(config.frames)
    proprio = jnp.asarray(proprio)
    intrinsics = np.array([[60.0, 0, 32], [0, 60, 32], [0, 0, 1]], np.float32)
    pose = np.diag([1.0, -1, -1, 1]).astype(np.float32)
    pose[2, 3] = 0.8
    camera = Camera(*(jnp.tile(leaf, (1, 2, 1, 1)) for leaf in (intrinsics, pose)))
    actions, grasps = np.zeros((1, config.chunk, 7), np.float32), proprio[:, config.history :] - 0.01

    @jax.jit
    def run(params):
        inputs = chunk_inputs(config, params, history, proprio, grasps, actions, camera, STATISTICS, KINEMATICS)
        prepared = prepare(config, params, inputs, jnp.zeros((1, 2, config.unet.context_width)))
        last = noise_schedule(config.schedule).alphas_cumprod.shape[0] - 1
        latents = inputs.image_latents.at[:, :, config.history :].set(rng.normal())
        return -predict_v(config, params, latents, jnp.full((1, 2), last), prepared)  # pure noise: v is -x0

    hand = hand_poses(proprio)
    poses = camera_poses(config, hand, camera.pose)
    images = decode_images(config, params, history)
    guesses = guess_frames(images, camera.intrinsics, poses, hand, hand_poses(grasps), (1,), config.plane_heights)
    guesses = guesses.at[:, 0, :, :2].set(guesses[:, 0, :, 1::-1])
    picture = guesses[:, :, :, guess] if guess < 7 else jnp.zeros_like(guesses[:, :, :, 0])
    expected = encode_images(config, params, picture)
    np.testing.assert_allclose(run(params)[:, :, config.history :], expected, atol=1e-4)


def test_untrained_change_predictor_holds_the_frame():
    """Its network starts at zero, and a small variance says that nothing moves: the last frame stays."""
    config = dataclasses.replace(CONFIG, change_variance=1e-6, land_on_x0=True)
    params = init_simulator(config, jax.random.key(0))
    fns = make_simulator_fns(config, STATISTICS, KINEMATICS)
    starts, keys = _starts(2), jax.random.split(jax.random.key(2), 2)
    state = fns.init(params, keys, starts)
    state, _ = jax.jit(fns.step)(params, keys, state, _actions(2))
    latents = encode_frames(config, params, starts.images)
    newest = state.latents[:, :, config.history : config.history + config.chunk]
    np.testing.assert_allclose(newest, np.broadcast_to(latents[:, :, None], newest.shape), atol=2e-3)


@pytest.mark.parametrize("variance", [0.2, 3.0])
def test_guessed_v_is_the_posterior_mean(variance):
    """v of E[x0 | x] for x0 ~ N(reference, variance), by the precision-weighted mean in float64."""
    config = dataclasses.replace(CONFIG, change_variance=variance)
    rng = np.random.default_rng(0)
    x, reference = rng.normal(size=(2, 3, 1, 1, 2, 2, 4))
    steps = np.array([[999], [600], [50]])
    schedule = noise_schedule(config.schedule)
    at = lambda table: table[steps][..., None, None, None, None]
    a, s = np.sqrt(at(schedule.alphas_cumprod)), np.sqrt(1 - at(schedule.alphas_cumprod))
    precision = 1 / variance + a**2 / s**2
    x0 = (reference * at(schedule.x0_scale) / variance + a * x / s**2) / precision
    expected = a * (x - a * x0) / s - s * x0
    np.testing.assert_allclose(guess_v(config, x, steps, reference), expected, rtol=1e-4, atol=1e-4)
