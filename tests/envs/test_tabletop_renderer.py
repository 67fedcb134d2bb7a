# SPDX-License-Identifier: Apache-2.0
"""Rendered pictures against the pinhole projection of known points through K and the camera pose (NumPy float64)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.envs.tabletop import TabletopConfig, camera, render, start_state

RED, GREEN, BLUE, BALL, PURPLE = range(5)
CONFIG = TabletopConfig()
_render = jax.jit(partial(render, CONFIG))


def bare_table():
    """A start with the hand out of the picture."""
    return start_state(CONFIG, 0, 0, 3)._replace(hand_position=jnp.array([-0.6, 0.0, 0.5]))


def project(point, image_size=64):
    """Pixel (u, v) of a world point."""
    to_camera = np.linalg.inv(camera.pose().astype(np.float64))
    x, y, z = to_camera[:3, :3] @ np.asarray(point, np.float64) + to_camera[:3, 3]
    u, v, w = camera.intrinsics(image_size).astype(np.float64) @ [x / z, y / z, 1.0]
    return np.array([u, v]) / w


def color_mask(image, index):
    """Pixels whose hue is that of an object."""
    r, g, b = np.moveaxis(image.astype(int), -1, 0)
    if index == RED:
        return (r > 3 * g) & (r > 3 * b)
    if index == BALL:
        return (r > 5 * b) & (g > 5 * b)
    return (b > 2 * r) & (b > 2 * g)


def centroid(mask):
    v, u = np.nonzero(mask)
    return np.array([u.mean() + 0.5, v.mean() + 0.5])


@pytest.mark.parametrize("position", [(0.0, 0.0, 0.024), (0.15, 0.1, 0.024), (0.05, -0.08, 0.1), (-0.03, 0.02, 0.1)])
def test_the_ball_appears_where_its_centre_projects(position):
    state = bare_table()
    far = jnp.array([[-0.15, y, 0.024] for y in (0.15, 0.0, -0.05, 0.0, -0.15)])
    state = state._replace(object_position=far.at[BALL].set(jnp.array(position)))
    image = np.asarray(_render(state))[0]
    np.testing.assert_allclose(centroid(color_mask(image, BALL)), project(position), atol=0.4)


def test_intrinsics_follow_the_image_size():
    state = bare_table()
    image = np.asarray(render(TabletopConfig(image_size=160), state))[0]
    expected = project(state.object_position[BALL], 160)
    np.testing.assert_allclose(centroid(color_mask(image, BALL)), expected, atol=0.6)


def test_the_outline_of_a_box_is_that_of_its_corners():
    state = bare_table()._replace(object_yaw=jnp.full(5, 0.6))
    centre = np.asarray(state.object_position[RED], np.float64)
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T * 0.022
    cos, sin = np.cos(0.6), np.sin(0.6)
    corners = signs @ np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]).T + centre
    pixels = np.array([project(corner) for corner in corners])
    v, u = np.nonzero(color_mask(np.asarray(_render(state))[0], RED))
    np.testing.assert_allclose([u.min(), v.min()], pixels.min(0), atol=1.0)
    np.testing.assert_allclose([u.max() + 1, v.max() + 1], pixels.max(0), atol=1.0)


def test_the_whole_workspace_is_in_view():
    for x in (-0.16, 0.16):
        for y in (-0.15, 0.15):
            assert ((project([x, y, 0.0]) > 0) & (project([x, y, 0.0]) < 64)).all()


def test_nearer_bodies_hide_those_behind():
    state = bare_table()
    seen = color_mask(np.asarray(_render(state))[0], BLUE).sum()
    eye = camera.pose()[:3, 3]
    blue = np.asarray(state.object_position[BLUE])
    in_front = state.object_position.at[RED].set(jnp.asarray(blue + 0.12 * (eye - blue)))
    hidden = color_mask(np.asarray(_render(state._replace(object_position=in_front)))[0], BLUE).sum()
    assert seen > 20
    assert hidden < seen // 3


def test_height_shows_as_a_gap_between_body_and_shadow():
    state = bare_table()
    position = np.array([0.02, 0.0, 0.15])
    raised = state._replace(object_position=state.object_position.at[BALL].set(jnp.asarray(position)))
    u, v = project([0.02, 0.0, 0.0]).astype(int)
    lit, shaded = (np.asarray(_render(s))[0, v, u].astype(int) for s in (state, raised))
    assert shaded.sum() < 0.75 * lit.sum()


def test_the_opening_of_the_gripper_is_visible():
    def dark_columns(finger):
        state = bare_table()._replace(hand_position=jnp.array([0.0, 0.0, 0.1]), finger_position=jnp.float32(finger))
        tip = int(project([0.0, 0.0, 0.1])[1])
        row = np.asarray(_render(state))[0, tip].max(-1)
        return np.nonzero(row < 60)[0]

    opened, closed = dark_columns(0.04), dark_columns(0.0)
    assert np.ptp(opened) > np.ptp(closed) + 5
    expected = project([0.0, 0.046, 0.1])[0] - project([0.0, -0.046, 0.1])[0]
    np.testing.assert_allclose(np.ptp(opened), expected, atol=2.5)


def test_a_batch_is_drawn_like_its_members():
    seeds = jnp.arange(4)
    states = jax.vmap(lambda seed: start_state(CONFIG, seed, 1, seed))(seeds)
    batch = np.asarray(jax.jit(jax.vmap(partial(render, CONFIG)))(states))
    for row in range(4):
        single = np.asarray(_render(jax.tree.map(lambda leaf, row=row: leaf[row], states)))
        assert (np.abs(batch[row].astype(int) - single.astype(int)).max(-1) > 1).mean() < 1e-3
