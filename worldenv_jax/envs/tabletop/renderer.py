# SPDX-License-Identifier: Apache-2.0
"""Perspective images of the tabletop by analytic ray casting: table, boxes, cylinders, a ball and the gripper.

One ray per pixel against every primitive; the nearest wins. Surfaces are shaded by one directional light; every
object and the hand drop a soft shadow straight down, so that height shows as the gap between body and shadow.
Everything is written over arrays [P] of pixels (P = H * W), one array per component, which XLA fuses.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.envs.tabletop import camera
from worldenv_jax.envs.tabletop.config import BOX, CYLINDER, OBJECTS, RECEPTACLES, TabletopConfig
from worldenv_jax.envs.tabletop.world import HALF_HEIGHT, RADIUS, TabletopState
from worldenv_jax.types import Array

FAR = 1e3
LIGHT = np.array([0.45, -0.35, 0.82])  # unit to within 1 %
AMBIENT, DIFFUSE = 0.45, 0.60
TABLE_COLOR, FLOOR_COLOR = (0.74, 0.68, 0.58), (0.46, 0.52, 0.58)
TABLE_EDGE = 0.26  # m
FINGER_COLOR, PALM_COLOR, LINK_COLOR = (0.12, 0.12, 0.14), (0.30, 0.31, 0.34), (0.86, 0.87, 0.90)
OBJECT_SHADOW, HAND_SHADOW = 0.5, 0.3  # share of the light that a shadow takes

# Hand frame: x along the finger pads, y through the fingers, z out of the hand (down). Half sizes in metres.
FINGER_HALF = (0.009, 0.006, 0.032)
FINGER_CENTRE_Z = -0.022
PALM_HALF, PALM_CENTRE_Z = (0.018, 0.054, 0.014), -0.066
LINK_RADIUS, LINK_HALF, LINK_CENTRE_Z = 0.024, 0.045, -0.125


class _Hit(NamedTuple):
    """The nearest surface so far, per pixel."""

    depth: Array  # float32 [P], m along the ray
    cosine: Array  # float32 [P], between the surface normal and the light
    color: tuple  # three float32 [P]


def render(config: TabletopConfig, state: TabletopState) -> Array:
    """Draws one state: uint8 [V = 1, H, W, 3]."""
    origin, directions = camera.rays(config.image_size)
    hit = _background(origin, directions)
    for place, xy in zip(RECEPTACLES, state.receptacle_position):
        hit = _draw_receptacle(hit, place, xy, origin, directions)
    for index, thing in enumerate(OBJECTS):
        rotation = _yaw_matrix(state.object_yaw[index])
        size = (thing.radius, thing.radius, thing.half_height)
        hit = _draw(hit, thing.shape, state.object_position[index], rotation, size, thing.color, origin, directions)
    hit = _draw_hand(hit, state, origin, directions)
    light = AMBIENT + DIFFUSE * jnp.maximum(hit.cosine, 0.0)
    light *= _unshadowed(state, [origin[k] + hit.depth * directions[:, k] for k in range(3)])
    red, green, blue = (jnp.round(255.0 * jnp.clip(c * light, 0.0, 1.0)).astype(jnp.uint32) for c in hit.color)
    # One word per pixel behind a barrier: otherwise XLA casts every ray once per colour channel.
    packed = jax.lax.optimization_barrier(red | green << 8 | blue << 16)
    size = config.image_size
    return jax.lax.bitcast_convert_type(packed, jnp.uint8)[:, :3].reshape(1, size, size, 3)


def _background(origin: np.ndarray, directions: np.ndarray) -> _Hit:
    depth = -origin[2] / np.minimum(directions[:, 2], -1e-6)
    x, y = (origin[k] + depth * directions[:, k] for k in range(2))
    on_table = (np.abs(x) < TABLE_EDGE) & (np.abs(y) < TABLE_EDGE)
    color = tuple(np.where(on_table, top, below) for top, below in zip(TABLE_COLOR, FLOOR_COLOR))
    return _Hit(jnp.asarray(depth), jnp.full(depth.shape, LIGHT[2]), tuple(jnp.asarray(c) for c in color))


def _draw_receptacle(hit: _Hit, place, xy: Array, origin: np.ndarray, directions: np.ndarray) -> _Hit:
    eye = np.eye(3, dtype=np.float32)

    def draw(hit, shape, x, y, half_x, half_y, height):
        centre = jnp.stack([xy[0] + x, xy[1] + y, jnp.float32(height / 2)])
        return _draw(hit, shape, centre, eye, (half_x, half_y, height / 2), place.color, origin, directions)

    hit = draw(hit, place.shape, 0.0, 0.0, place.radius, place.radius, place.floor)
    if place.wall > 0.0:
        reach, half = place.radius - place.wall / 2, place.wall / 2
        for sign in (-1.0, 1.0):
            hit = draw(hit, BOX, sign * reach, 0.0, half, place.radius, place.rim)
            hit = draw(hit, BOX, 0.0, sign * reach, place.radius, half, place.rim)
    return hit


def _draw_hand(hit: _Hit, state: TabletopState, origin: np.ndarray, directions: np.ndarray) -> _Hit:
    rotation = _quaternion_matrix(state.hand_quaternion)
    finger = state.finger_position + FINGER_HALF[1]
    link_half = (LINK_RADIUS, LINK_RADIUS, LINK_HALF)
    parts = (
        (BOX, FINGER_HALF, -finger, FINGER_CENTRE_Z, FINGER_COLOR),
        (BOX, FINGER_HALF, finger, FINGER_CENTRE_Z, FINGER_COLOR),
        (BOX, PALM_HALF, 0.0, PALM_CENTRE_Z, PALM_COLOR),
        (CYLINDER, link_half, 0.0, LINK_CENTRE_Z, LINK_COLOR),
    )
    for shape, half, y, z, color in parts:
        centre = state.hand_position + y * rotation[:, 1] + z * rotation[:, 2]
        hit = _draw(hit, shape, centre, rotation, half, color, origin, directions)
    return hit


def _draw(hit: _Hit, shape: str, centre, rotation, half, color, origin, directions) -> _Hit:
    """Casts the rays at one primitive whose axes are the columns of `rotation`."""
    start = rotation.T @ (origin - centre)
    ray = [sum(directions[:, k] * rotation[k, axis] for k in range(3)) for axis in range(3)]
    light = rotation.T @ LIGHT.astype(np.float32)
    cast = {BOX: _cast_box, CYLINDER: _cast_cylinder}.get(shape, _cast_sphere)
    depth, cosine = cast(start, ray, half, light)
    nearer = depth < hit.depth
    new_color = tuple(jnp.where(nearer, new, old) for new, old in zip(color, hit.color))
    return _Hit(jnp.where(nearer, depth, hit.depth), jnp.where(nearer, cosine, hit.cosine), new_color)


def _cast_box(start, ray, half, light) -> tuple[Array, Array]:
    near, far, cosine = -FAR, FAR, 0.0
    for axis in range(3):
        inverse = 1.0 / jnp.where(jnp.abs(ray[axis]) < 1e-7, 1e-7, ray[axis])
        middle, reach = -start[axis] * inverse, half[axis] * jnp.abs(inverse)
        enters = middle - reach
        cosine = jnp.where(enters > near, -jnp.sign(ray[axis]) * light[axis], cosine)
        near, far = jnp.maximum(near, enters), jnp.minimum(far, middle + reach)
    return jnp.where((near < far) & (near > 0.0), near, FAR), cosine


def _cast_cylinder(start, ray, half, light) -> tuple[Array, Array]:
    radius, half_height = half[0], half[2]
    a = ray[0] * ray[0] + ray[1] * ray[1] + 1e-9
    b = start[0] * ray[0] + start[1] * ray[1]
    root = b * b - a * (start[0] ** 2 + start[1] ** 2 - radius**2)
    side = (-b - jnp.sqrt(jnp.maximum(root, 0.0))) / a
    on_side = (root > 0.0) & (side > 0.0) & (jnp.abs(start[2] + side * ray[2]) < half_height)
    side_light = ((start[0] + side * ray[0]) * light[0] + (start[1] + side * ray[1]) * light[1]) / radius

    facing = jnp.where(ray[2] < 0.0, 1.0, -1.0)
    cap = (facing * half_height - start[2]) / jnp.where(jnp.abs(ray[2]) < 1e-7, -1e-7, ray[2])
    on_cap = ((start[0] + cap * ray[0]) ** 2 + (start[1] + cap * ray[1]) ** 2 < radius**2) & (cap > 0.0)
    depth = jnp.where(on_cap, cap, jnp.where(on_side, side, FAR))
    return depth, jnp.where(on_cap, facing * light[2], side_light)


def _cast_sphere(start, ray, half, light) -> tuple[Array, Array]:
    radius = half[0]
    b = sum(start[k] * ray[k] for k in range(3))
    root = b * b - (jnp.sum(start * start) - radius**2)
    depth = -b - jnp.sqrt(jnp.maximum(root, 0.0))
    cosine = sum((start[k] + depth * ray[k]) * light[k] for k in range(3)) / radius
    return jnp.where((root > 0.0) & (depth > 0.0), depth, FAR), cosine


def _unshadowed(state: TabletopState, point: list[Array]) -> Array:
    """Share of the light [P] that bodies above the points let through."""
    centres = jnp.concatenate([state.object_position, state.hand_position[None]])
    radii = np.append(RADIUS, 0.03)
    bottoms = centres[:, 2] - np.append(HALF_HEIGHT, 0.01)
    strengths = [OBJECT_SHADOW] * len(OBJECTS) + [HAND_SHADOW]
    light = 1.0
    for centre, radius, bottom, strength in zip(centres, radii, bottoms, strengths):
        height = bottom - point[2]
        distance = jnp.sqrt((point[0] - centre[0]) ** 2 + (point[1] - centre[1]) ** 2 + 1e-12)
        softness = 0.006 + 0.06 * jnp.maximum(height, 0.0)
        cover = jnp.clip((radius + 0.004 - distance) / softness + 0.5, 0.0, 1.0)
        light *= 1.0 - jnp.where(height > -0.002, strength * cover, 0.0)
    return light


def _yaw_matrix(yaw: Array) -> Array:
    cos, sin, zero, one = jnp.cos(yaw), jnp.sin(yaw), jnp.zeros(()), jnp.ones(())
    return jnp.stack([jnp.stack([cos, -sin, zero]), jnp.stack([sin, cos, zero]), jnp.stack([zero, zero, one])])


def _quaternion_matrix(quaternion: Array) -> Array:
    """Rotation matrix [3, 3] of a unit quaternion (x y z w); columns are the rotated axes."""
    x, y, z, w = quaternion
    return jnp.stack(
        [
            jnp.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)]),
            jnp.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)]),
            jnp.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]),
        ]
    )
