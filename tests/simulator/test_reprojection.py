# SPDX-License-Identifier: Apache-2.0
"""Frames reprojected through a plane, against pictures of a painted plane rendered from both places."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.simulator import SimulatorConfig, init_simulator
from worldenv_jax.simulator.conditioning import decode_images, encode_images, repeat_last
from worldenv_jax.simulator.reprojection import reproject

SIZE, HEIGHT = 32, 0.1
# robosuite's pictures are upside down, so its focal lengths are negative.
INTRINSICS = np.array([[-30.0, 0, 16], [0, 30, 16], [0, 0, 1]])


def _looking_down(x, y, z, turn=0.0, tilt=0.0):
    """A camera at (x, y, z) in float64, its third axis towards the plane."""
    c, s, ct, st = np.cos(turn), np.sin(turn), np.cos(tilt), np.sin(tilt)
    down = np.diag([1.0, -1.0, -1.0])
    rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ down @ np.array([[1, 0, 0], [0, ct, -st], [0, st, ct]])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, (x, y, z)
    return pose


def _plane_points(pose):
    """Where the ray through every pixel's centre meets the plane, float64 [SIZE, SIZE, 2]."""
    v, u = np.mgrid[:SIZE, :SIZE] + 0.5
    ray = np.stack([(u - 16) / INTRINSICS[0, 0], (v - 16) / INTRINSICS[1, 1], np.ones_like(u)], -1) @ pose[:3, :3].T
    return (pose[:3, 3] + (HEIGHT - pose[2, 3]) / ray[..., 2:] * ray)[..., :2]


def _picture(pose):
    """A plane painted in slow waves, so that bilinear sampling is nearly exact."""
    x, y = np.moveaxis(_plane_points(pose), -1, 0)
    return np.stack([np.sin(5 * x), np.cos(4 * y), np.sin(3 * (x + y))], -1)


def _shown(pose, by):
    """Which pixels of the camera at `pose` show a point that the camera at `by` sees."""
    points = np.concatenate([_plane_points(pose), np.full((SIZE, SIZE, 1), HEIGHT)], -1)
    local = (points - by[:3, 3]) @ by[:3, :3]
    u, v = (INTRINSICS[i, i] * local[..., i] / local[..., 2] + 16 for i in range(2))
    return (u > 0) & (u < SIZE) & (v > 0) & (v < SIZE)


def test_a_painted_plane_from_elsewhere():
    """The newest frame shows a part of each target, an older one from higher up the rest."""
    sources = [_looking_down(0.1, 0.0, 1.2), _looking_down(0.0, 0.0, 0.6, 0.2)]
    targets = [_looking_down(0.15, -0.1, 0.5, -0.3, 0.1), _looking_down(0.3, 0.1, 0.6)]
    cast = lambda poses: jnp.asarray(np.stack(poses), jnp.float32)
    got = reproject(cast([_picture(s) for s in sources]), cast(INTRINSICS), cast(sources), cast(targets), HEIGHT)
    assert got.shape == (2, SIZE, SIZE, 3)
    for frame, target in zip(np.asarray(got), targets):
        by_new, by_old = (_shown(target, by=source) for source in reversed(sources))
        assert by_new.mean() > 0.3 and (by_old & ~by_new).mean() > 0.1
        error = np.abs(frame - _picture(target)).max(-1)
        # Within half a pixel of the border the nearest pixel stands in; the older frame's pixels are twice as large.
        assert np.median(error[by_new]) < 0.01 and np.quantile(error[by_new], 0.9) < 0.05
        assert np.quantile(error[by_old & ~by_new], 0.9) < 0.1


def test_unseen_points_keep_the_newest_frame():
    images = jnp.stack([jnp.zeros((SIZE, SIZE, 1)), jnp.ones((SIZE, SIZE, 1))])
    pose = jnp.asarray(_looking_down(0, 0, 0.6), jnp.float32)
    away = jnp.asarray(_looking_down(50.0, 0, 0.6), jnp.float32)
    got = reproject(images, jnp.asarray(INTRINSICS, jnp.float32), jnp.stack([pose, pose]), away[None], HEIGHT)
    np.testing.assert_array_equal(got, np.ones((1, SIZE, SIZE, 1)))


def test_leading_axes():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 1, 2, SIZE, SIZE, 3)).astype(np.float32)
    intrinsics = np.tile(INTRINSICS, (2, 1, 1, 1)).astype(np.float32)
    poses = np.stack([_looking_down(0, 0, 0.6), _looking_down(0.1, 0, 0.5)])[:, None, None].astype(np.float32)
    sources, targets = np.tile(poses, (1, 1, 2, 1, 1)), np.tile(poses[::-1], (1, 1, 3, 1, 1))
    got = reproject(*map(jnp.asarray, (images, intrinsics, sources, targets)), HEIGHT)
    assert got.shape == (2, 1, 3, SIZE, SIZE, 3)
    for i in range(2):
        alone = reproject(*(jnp.asarray(leaf[i, 0]) for leaf in (images, intrinsics, sources, targets)), HEIGHT)
        np.testing.assert_allclose(got[i, 0], alone, atol=1e-6)


def test_only_the_hands_cameras_get_a_reprojected_guess():
    from worldenv_jax.simulator.conditioning import _first_guess

    debug = SimulatorConfig.debug()
    channels = debug.condition_channels + debug.autoencoder.latent_channels
    unet = dataclasses.replace(debug.unet, condition_channels=channels)
    config = dataclasses.replace(debug, views=2, hand_views=(1,), plane_height=HEIGHT, unet=unet)
    params = init_simulator(config, jax.random.key(0))
    history = jax.random.normal(jax.random.key(1), (1, 2, config.history, *config.latent_size, 4))
    intrinsics = jnp.asarray(np.tile(INTRINSICS, (1, 2, 1, 1)), jnp.float32)
    places = [_looking_down(0.02 * t, 0, 0.6) for t in range(config.frames)]
    poses = jnp.asarray(np.tile(np.stack(places), (1, 2, 1, 1, 1)), jnp.float32)
    guess = _first_guess(config, params, history, intrinsics, poses)
    np.testing.assert_array_equal(guess[:, 0], repeat_last(history, config.chunk)[:, 0])
    np.testing.assert_array_equal(guess[:, :, : config.history], history)
    images = decode_images(config, params, history[:, 1])[0]
    F = config.history
    expected = reproject(images, intrinsics[0, 1], poses[0, 1, :F], poses[0, 1, F:], HEIGHT)
    np.testing.assert_allclose(guess[0, 1, F:], encode_images(config, params, expected), atol=1e-5)


def test_a_plane_needs_a_moving_camera():
    with pytest.raises(ValueError, match="plane_height is given, but no camera moves"):
        dataclasses.replace(SimulatorConfig.debug(), plane_height=0.0)
