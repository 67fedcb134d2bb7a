# SPDX-License-Identifier: Apache-2.0
"""First pictures of future frames: the network against NumPy in float64, what it is told, and its loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.simulator import (
    CHAIN,
    Kinematics,
    SimulatorBatch,
    SimulatorConfig,
    compositor_loss,
    init_simulator,
    no_grip,
)
from worldenv_jax.simulator.compositing import POSE, TIMES, ArmDrawing, Compositor, compose
from worldenv_jax.simulator.conditioning import compose_pictures, decode_images
from worldenv_jax.simulator.glance import Glance
from worldenv_jax.types import Camera, Statistics

HEIGHT, WIDTH, FEATURES = 8, 12, 6


def _silu(x):
    return x / (1 + np.exp(-x))


def _fourier(x, octaves):
    angles = x[..., None] * (np.pi / 2 * 2.0 ** np.arange(octaves))
    return np.concatenate([np.sin(angles), np.cos(angles)], -1).reshape(*x.shape[:-1], -1)


def _numpy_trunk(p, blocks, hand, pose, patches=None, seen=None):
    """One frame: hand [T, 2], pose [T, D], patches [h, w, P], what a glance tells [F]; to [H, W, outputs]."""
    dense = lambda name, x: x @ p[name]["kernel"] + p[name]["bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p[name]["scale"] + p[name]["bias"]

    pose = pose.ravel()
    pose = dense("pose1", np.concatenate([pose, _fourier(pose, 3)]))
    if seen is not None:
        pose = pose + dense("seen", seen)
    pose = dense("pose2", _silu(pose))
    rows, columns = HEIGHT // 4, WIDTH // 4
    hidden = np.zeros((rows, columns, FEATURES))
    for i in range(rows):
        for j in range(columns):
            cell = np.array([(j + 0.5) / columns, (i + 0.5) / rows])
            beside = (2 * (cell - hand)).reshape(-1)
            hidden[i, j] = dense("place", np.concatenate([beside, _fourier(beside, 5)]))
            hidden[i, j] += dense("image", _fourier(2 * cell, 4)) + pose
            if patches is not None:
                hidden[i, j] += dense("patches", patches[i, j])
    for b in range(1, blocks + 1):
        padded = np.pad(_silu(norm(f"norm{b}", hidden)), ((1, 1), (1, 1), (0, 0)))
        branch = np.zeros_like(hidden) + p[f"conv{b}"]["bias"]
        for i in range(3):
            for j in range(3):
                branch += padded[i : i + rows, j : j + columns] @ p[f"conv{b}"]["kernel"][i, j]
        hidden = hidden + dense(f"out{b}", _silu(branch * (1 + dense(f"scale{b}", pose))))
    cells = dense("pixels", _silu(norm("norm", hidden))).reshape(rows, columns, 4, 4, -1)
    return np.concatenate([np.concatenate(list(row), axis=1) for row in cells], axis=0)


def _random(model, *inputs):
    """The model's parameters as normal numbers in float64, and its output with them."""
    leaves, tree = jax.tree.flatten(model.init(jax.random.key(0), *inputs)["params"])
    rng = np.random.default_rng(1)
    params = jax.tree.unflatten(tree, [rng.normal(0, 0.4, leaf.shape) for leaf in leaves])
    with jax.default_matmul_precision("highest"):
        return params["trunk"], jax.jit(model.apply)({"params": params}, *inputs)


def test_compositor_equals_numpy():
    rng = np.random.default_rng(0)
    guesses, hand = rng.uniform(-1, 1, (2, 2, HEIGHT, WIDTH, 3)), rng.uniform(0, 1, (2, TIMES, 2))
    pose = rng.uniform(-1, 1, (2, TIMES, POSE))
    params, got = _random(Compositor(FEATURES), guesses, hand, pose)
    for n in range(2):
        patches = np.zeros((HEIGHT // 4, WIDTH // 4, 2 * 4 * 4 * 3))
        for i in range(HEIGHT // 4):
            for j in range(WIDTH // 4):
                patches[i, j] = guesses[n, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].ravel()
        pixels = _numpy_trunk(params, 3, hand[n], pose[n], patches)
        shares = np.exp(pixels[..., 3:] + np.array([2.0, 0, 0]))
        layers = np.stack([*guesses[n], np.tanh(pixels[..., :3])], axis=-2)
        expected = (shares[..., None] * layers).sum(-2) / shares.sum(-1, keepdims=True)
        np.testing.assert_allclose(got[n], expected, atol=1e-4)


@pytest.mark.parametrize("glances", [False, True])
def test_drawing_equals_numpy(glances):
    rng = np.random.default_rng(0)
    frames, hand = rng.uniform(-1, 1, (2, HEIGHT, WIDTH, 3)), rng.uniform(0, 1, (2, 2, 2))
    pose = rng.uniform(-1, 1, (2, 2, POSE))
    seen = rng.uniform(-1, 1, (2, 8, 8, 6)) if glances else None
    params, got = _random(ArmDrawing(FEATURES), frames, hand, pose, seen)
    told = Glance().apply({"params": params["glance"]}, seen) if glances else (None, None)
    for n in range(2):
        pixels = _numpy_trunk(params, 4, hand[n], pose[n], seen=told[n])
        opacity = 1 / (1 + np.exp(2.0 - pixels[..., 3:]))
        np.testing.assert_allclose(got[n], opacity * np.tanh(pixels[..., :3]) + (1 - opacity) * frames[n], atol=1e-4)


def _scene(frames):
    """A camera 0.8 m above the table, looking down, and a hand that moves to the right by 2 cm a frame."""
    proprio = np.zeros((1, frames, 8), np.float32)
    proprio[0, :, 0] = 0.02 * np.arange(frames)
    proprio[0, :, 6:] = 0.02, -0.01
    intrinsics = np.array([[60.0, 0, 32], [0, 60, 32], [0, 0, 1]], np.float32)
    pose = np.diag([1.0, -1, -1, 1]).astype(np.float32)
    pose[2, 3] = 0.8
    return jnp.asarray(proprio), jnp.asarray(intrinsics), jnp.asarray(pose)


def test_what_the_networks_are_told(monkeypatch):
    """The hand's pixel and the poses, by hand, of the frame, of the oldest and the newest known one, of the grasp.

    The drawing does not know the newest; it is the compositor's first guess.
    """
    told, proprio, intrinsics, pose = {}, *_scene(5)
    kinematics = Kinematics.osc_pose()._replace(position_low=np.array([-0.5, -1, -1]), position_high=np.ones(3))

    def choose(self, guesses, hand, pose):
        told.update(hand=np.asarray(hand), pose=np.asarray(pose))
        return guesses[:, 0] + 10 * guesses[:, 1]

    def draw(self, frames, hand, pose, glances=None):
        told.update(drawn_hand=np.asarray(hand), drawn_pose=np.asarray(pose))
        return frames + 0.5

    monkeypatch.setattr(Compositor, "__call__", choose)
    monkeypatch.setattr(ArmDrawing, "__call__", draw)
    cameras = jnp.tile(pose, (1, 1, 5, 1, 1))
    images = jnp.zeros((1, 1, 3, 64, 64, 3)) + jnp.array([0.1, 0.2, 0.3])[:, None, None, None]
    drawing = {"trunk": {"pose2": {"bias": np.zeros(8)}}}
    geometry = intrinsics[None, None], cameras, proprio, proprio[:, 3:].at[..., 0].add(-0.01), kinematics, (), (0.0,)
    composed, drawn = compose({"drawing": drawing, "choice": {}}, images, *geometry)
    np.testing.assert_allclose(composed, np.full((1, 1, 2, 64, 64, 3), 0.6 + 10 * 0.3), rtol=1e-5)
    np.testing.assert_allclose(drawn, np.full((1, 1, 2, 64, 64, 3), 0.6), rtol=1e-5)
    for row, frame in enumerate((3, 4)):
        for column, x in enumerate((0.02 * frame, 0.0, 0.04, 0.02 * frame - 0.01)):
            np.testing.assert_allclose(told["hand"][row, column], [(32 + 60 * x / 0.8) / 64, 0.5], atol=1e-5)
            turned = np.eye(3).ravel(), np.diag([1, -1, -1]).ravel()
            expected = [(2 * x - 0.5) / 1.5, 0, 0, 0.5, -0.25, *turned[0], *turned[1], 0.8]
            np.testing.assert_allclose(told["pose"][row, column], expected, atol=1e-5)
    np.testing.assert_array_equal(told["drawn_hand"], told["hand"][:, :2])
    np.testing.assert_array_equal(told["drawn_pose"], told["pose"][:, :2])


def test_what_the_hand_holds_is_drawn(monkeypatch):
    """Over the standing camera's first frame, which it is seen from; told the grasp, and with the grasp's glance."""
    told, proprio, intrinsics, pose = {}, *_scene(5)
    proprio = jnp.repeat(proprio, 2, axis=0)

    def choose(self, guesses, hand, pose):
        assert guesses.shape[:2] == (
            8,
            5,
        )  # two frames of two views, twice; four guesses and the drawing
        return guesses[:, 4]

    def draw(self, frames, hand, pose, glances=None):
        if glances is None:
            return frames + 0.5
        told.update(pose=np.asarray(pose), glances=np.asarray(glances))
        return frames + 0.7

    monkeypatch.setattr(Compositor, "__call__", choose)
    monkeypatch.setattr(ArmDrawing, "__call__", draw)
    cameras = jnp.tile(pose, (2, 2, 5, 1, 1))
    images = jnp.zeros((2, 2, 3, 64, 64, 3)).at[:, 0].add(jnp.array([0.1, 0.2, 0.3])[:, None, None, None])
    kinematics = Kinematics.osc_pose()._replace(position_low=-np.ones(3), position_high=np.ones(3))
    lens = jnp.tile(intrinsics, (2, 2, 1, 1))
    geometry = lens, cameras, proprio, proprio[:, 3:].at[..., 0].add(-0.01), kinematics, (1,), (0.0,)
    glances = jnp.arange(2.0)[None, :, None, None, None] + jnp.zeros((2, 2, 8, 8, 6))
    drawing = {"trunk": {"pose2": {"bias": np.zeros(8)}}}
    params = {"drawing": drawing, "held": drawing, "choice": {}}
    composed, drawn = compose(params, images, *geometry, glances=glances)
    np.testing.assert_allclose(composed[:, 0], np.full((2, 2, 64, 64, 3), 0.1 + 0.5), rtol=1e-5)
    np.testing.assert_allclose(composed[:, 1], np.full((2, 2, 64, 64, 3), 0.1 + 0.7), rtol=1e-5)
    np.testing.assert_array_equal(drawn, composed)
    np.testing.assert_allclose(told["pose"][..., 0], 2 * [[0.06, 0.0, 0.05], [0.08, 0.0, 0.07]], atol=1e-6)
    np.testing.assert_array_equal(told["glances"], glances.reshape(-1, 8, 8, 6))


@pytest.mark.parametrize("blind", [0.0, 1.0])
def test_loss_of_pictures_that_are_the_newest_frame(monkeypatch, blind):
    """Networks that repeat what they are given: each picture repeats the one before, and the errors are known.

    Frames after the end do not count; a blind chain knows the oldest frame only.
    """
    monkeypatch.setattr("worldenv_jax.simulator.losses.BLIND", blind)
    config = dataclasses.replace(
        SimulatorConfig.libero_debug(), motion_width=0, plane_heights=(0.03,), photograph_size=0, glance_size=0
    )
    params, frames = init_simulator(config, jax.random.key(0)), CHAIN * config.chunk
    for name, chosen in (("drawing", [-50.0]), ("choice", [0.0, 0.0, 50.0, 0.0, 0.0])):  # guess 2: the newest frame
        pixels = params["compositor"][name]["trunk"]["pixels"]
        pixels["kernel"] = jnp.zeros_like(pixels["kernel"])
        pixels["bias"] = jnp.tile(jnp.array([0.0] * 3 + chosen), 16)
    proprio, intrinsics, pose = (np.repeat(np.asarray(x)[None], 2, 0) for x in _scene(config.history))
    latents = 0.2 * np.random.default_rng(0).normal(size=(2, config.history + frames, 2, *config.latent_size, 8))
    latents[:, config.history :] = latents[:, -1:]  # all future frames alike, but unlike the newest
    batch = SimulatorBatch(
        latents=latents.astype(np.float32),
        first_images=np.zeros((2, 2, 64, 64, 3), np.uint8),
        proprio=0.0 * proprio[:, 0],  # the hand stands still
        previous_proprio=np.zeros((2, 8), np.float32),
        previous_action=np.zeros((2, 7), np.float32),
        grasp=np.zeros((2, 8), np.float32),
        grip=no_grip(2),
        holds=np.zeros((2, frames), np.float32),
        actions=np.zeros((2, frames, 7), np.float32),
        camera=Camera(*(np.repeat(x[:, None], 2, 1) for x in (intrinsics, pose))),
        mask=np.repeat([[True], [False]], frames, 1),
    )
    batch, ones = jax.tree.map(jnp.asarray, batch), np.ones(8, np.float32)
    statistics = Statistics(-ones[:7], ones[:7], -ones, ones)
    loss, metrics = jax.jit(lambda key: compositor_loss(config, params, key, batch, statistics, Kinematics.osc_pose()))(
        jax.random.key(1)
    )
    images = np.asarray(decode_images(config, params, latents), np.float64)
    newest = 0 if blind else config.history - 1
    error, drawn = images[0, newest] - images[0, -1], images[0, 0, 0] - images[0, -1, 0]
    # The hand is seen at pixel (32, 32); at it an error counts ten times.
    distance = np.hypot(*(np.mgrid[:64, :64] + 0.5 - 32))
    weight = 1 + 9 * np.exp(-0.5 * (distance / (0.08 * 64)) ** 2)
    mean = lambda error: np.sqrt(error**2 + 0.03**2).mean((-4, -1))
    expected = np.average(mean(error), weights=weight) + mean(drawn[None]).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["psnr"], -10 * np.log10((error**2).mean() / 4), rtol=1e-4)


def test_a_scene_on_a_table_looks_as_one_on_the_floor():
    """All of it 0.875 m higher, workspace and cameras, too: the same pictures, from photographs and glances, too.

    To the pixel, although rows of one lie on rows of the other (`reprojection.settle`).
    """
    config = SimulatorConfig.libero_debug()
    params, rng = init_simulator(config, jax.random.key(0)), np.random.default_rng(0)
    proprio, intrinsics, pose = _scene(5)
    pose = jnp.stack([pose.at[:2, 3].set(jnp.array([0.0137, 0.287])), pose])[None]
    images = jnp.asarray(rng.uniform(-1, 1, (1, 2, 4, 64, 64, 3)), jnp.float32)
    photographs = jnp.asarray(rng.integers(0, 256, (1, *config.photographs_shape), np.uint8))

    @jax.jit
    def compose_at(height):
        up = jnp.array([0.0, 0.0, height])
        raised = proprio.at[..., 2].add(0.1 + height)
        camera = Camera(jnp.tile(intrinsics, (1, 2, 1, 1)), pose.at[..., :3, 3].add(up))
        kinematics = Kinematics.osc_pose()._replace(
            position_low=jnp.array([-0.4, -0.4, 0.0]) + up, position_high=jnp.full(3, 0.4) + up
        )
        grasps = raised[:, 4:].at[..., 0].add(-0.05)
        return compose_pictures(config, params, images, raised, grasps, camera, kinematics, photographs)

    with jax.default_matmul_precision("highest"):
        for low, high in zip(compose_at(0.0), compose_at(0.875)):
            np.testing.assert_allclose(low, high, atol=2e-3)


def test_what_cannot_be_composed():
    config = dataclasses.replace(SimulatorConfig.debug(), compositor_width=8)
    with pytest.raises(ValueError, match="multiples of 4"):
        dataclasses.replace(config, image_size=(30, 30))
    with pytest.raises(ValueError, match="one camera must stand still"):
        dataclasses.replace(config, hand_views=(0,))
