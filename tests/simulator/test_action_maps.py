# SPDX-License-Identifier: Apache-2.0
"""Projection, drawing, rays and delta actions against hand-computed numbers."""

import jax.numpy as jnp
import numpy as np

from worldenv_jax.simulator.action_maps import (
    ActionMapConfig,
    draw_action_map,
    project,
    ray_maps,
    scale_intrinsics,
    tool_points,
)
from worldenv_jax.simulator.delta_actions import delta_actions, normalize_deltas

# One metre above the origin, looking down: image x is world x, image y is minus world y.
CAMERA = np.array([[1, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 1], [0, 0, 0, 1]], np.float32)
INTRINSICS = np.array([[32, 0, 16], [0, 32, 16], [0, 0, 1]], np.float32)
DRAWING = ActionMapConfig(tool_offset=0.0, axis_length=0.1, radius=3, thickness=2, background=0)


def test_projection_by_hand():
    points = np.array([[0, 0, 0], [0.25, 0.125, 0.5]], np.float32)
    pixels, depth = project(points, INTRINSICS, CAMERA)
    np.testing.assert_allclose(pixels, [[16, 16], [32, 8]], atol=1e-5)
    np.testing.assert_allclose(depth, [1.0, 0.5], atol=1e-6)


def test_tool_points_follow_the_frame():
    turned = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]], np.float32)
    points = tool_points(turned, np.array([1.0, 2.0, 3.0], np.float32), ActionMapConfig(tool_offset=0.5))
    np.testing.assert_allclose(points, [[1, 2, 3.5], [1, 2.1, 3.5], [0.9, 2, 3.5], [1, 2, 3.6]], atol=1e-6)


def _draw(position):
    points = tool_points(jnp.eye(3), jnp.asarray(position, jnp.float32), DRAWING)
    return np.asarray(draw_action_map(*project(points, INTRINSICS, CAMERA), jnp.float32(1.0), DRAWING, 32, 32))


def test_map_is_black_but_for_the_hand():
    image = _draw([0.0, 0.0, 0.0])
    assert image.shape == (32, 32, 3)
    rows, columns = np.nonzero(image.sum(-1) > 0.1)
    assert abs(rows.mean() - 15.5) < 2 and abs(columns.mean() - 16.5) < 2
    assert image[0, 0].sum() == 0.0
    # The x axis is blue and points right, y is yellow and points up.
    np.testing.assert_allclose(image[16, 18], [0, 0, 1], atol=1e-3)
    np.testing.assert_allclose(image[14, 16], [1, 1, 0], atol=1e-3)


def test_hand_outside_the_image_or_behind_the_camera_is_not_drawn():
    assert _draw([2.0, 0.0, 0.0]).sum() == 0.0
    assert _draw([0.0, 0.0, 2.0]).sum() == 0.0


def test_half_a_pixel_shows():
    assert np.abs(_draw([0.0, 0.0, 0.0]) - _draw([0.5 / 32, 0.0, 0.0])).max() > 0.05


def test_rays():
    rays = np.asarray(ray_maps(scale_intrinsics(jnp.asarray(INTRINSICS), 2 / 32, 2 / 32), jnp.asarray(CAMERA), 2, 2))
    expected = np.array([-0.25, 0.25, -1.0])
    np.testing.assert_allclose(rays[0, 0, :3], expected / np.linalg.norm(expected), atol=1e-6)
    np.testing.assert_allclose(rays[..., 3:], np.broadcast_to([0, 0, 1], (2, 2, 3)))


def test_delta_actions_by_hand():
    positions = np.array([[0, 0, 0], [1, 2, 3]], np.float64)
    yaw = lambda angle: [0, 0, np.sin(angle / 2), np.cos(angle / 2)]
    deltas = delta_actions(positions, np.array([yaw(3.0), yaw(-3.0)]), np.array([0.1, 0.7]))
    np.testing.assert_allclose(deltas, [[1, 2, 3, 0, 0, 2 * np.pi - 6.0, 0.7]], atol=1e-12)
    normal = normalize_deltas(deltas, np.full(6, 1.0), np.full(6, 2.0))
    np.testing.assert_allclose(normal[0, :3], [0, 0.5, 1.0], atol=1e-12)
    assert normal[0, 6] == 0.7
