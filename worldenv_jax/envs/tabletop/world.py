# SPDX-License-Identifier: Apache-2.0
"""State of the tabletop: randomised starts, proprioception and the success predicate, as pure functions.

All functions take one unbatched `TabletopState`; batches are made by `jax.vmap`. The motion is in `physics.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.envs.tabletop.config import BOX, OBJECTS, RECEPTACLES, TabletopConfig
from worldenv_jax.types import Array

RADIUS = np.array([thing.radius for thing in OBJECTS], np.float32)
HALF_HEIGHT = np.array([thing.half_height for thing in OBJECTS], np.float32)
FLOOR = np.array([place.floor for place in RECEPTACLES], np.float32)
CLEARANCE = 0.004  # m between bodies at the start of an episode; where a draw leaves less, its offsets are halved
REST_SPEED = 0.02  # m/s; slower is at rest
REST_GAP = 0.003  # m; higher above the floor is not resting on it


class TabletopState(NamedTuple):
    """The whole truth about one table; N objects, M receptacles."""

    task: Array  # int32 [], object * M + receptacle
    hand_position: Array  # float32 [3], the grip point between the fingertips
    hand_quaternion: Array  # float32 [4], x y z w; (1, 0, 0, 0) points straight down
    finger_position: Array  # float32 [], m, half the opening
    held: Array  # int32 [], index of the held object or -1
    grip_offset: Array  # float32 [3], held object minus hand, in the hand's heading
    object_position: Array  # float32 [N, 3], centres
    object_velocity: Array  # float32 [N, 3], m/s
    object_yaw: Array  # float32 [N]
    receptacle_position: Array  # float32 [M, 2]


def start_state(config: TabletopConfig, task: Array, split: Array, seed: Array) -> TabletopState:
    """Draws the start number `seed` of a task; no two bodies touch whatever the draw.

    Args:
        config: jitters and nominal poses.
        task: int32 [].
        split: int32 [], 0 train, 1 test (`envs.protocol.SPLITS`); each split has a random stream of its own.
        seed: int32 [].
    """
    key = jax.random.key(20)
    for number in (split, task, seed):
        key = jax.random.fold_in(key, number)
    key_object, key_place, key_yaw, key_hand, key_heading = jax.random.split(key, 5)
    shift = jax.random.uniform(key_object, (len(OBJECTS), 2), minval=-1.0, maxval=1.0) * config.object_jitter
    shift_place = jax.random.uniform(key_place, (len(RECEPTACLES), 2), minval=-1.0, maxval=1.0)
    shift_place *= config.receptacle_jitter
    homes, place_homes = (jnp.array([body.home for body in bodies]) for bodies in (OBJECTS, RECEPTACLES))
    share = jnp.where(_crowded(homes + shift, place_homes + shift_place), 0.5, 1.0)
    xy, places = homes + share * shift, place_homes + share * shift_place
    is_box = jnp.array([thing.shape == BOX for thing in OBJECTS], jnp.float32)
    yaw = jax.random.uniform(key_yaw, (len(OBJECTS),), minval=-1.0, maxval=1.0) * config.box_yaw_jitter * is_box
    hand = jax.random.uniform(key_hand, (3,), minval=-1.0, maxval=1.0) * jnp.array(config.hand_jitter)
    heading = jax.random.uniform(key_heading, (), minval=-1.0, maxval=1.0) * config.hand_yaw_jitter
    return TabletopState(
        task=jnp.asarray(task, jnp.int32),
        hand_position=jnp.array(config.hand_home) + hand,
        hand_quaternion=jnp.stack([jnp.cos(heading / 2), jnp.sin(heading / 2), jnp.zeros(()), jnp.zeros(())]),
        finger_position=jnp.float32(config.finger_travel),
        held=jnp.int32(-1),
        grip_offset=jnp.zeros(3),
        object_position=jnp.concatenate([xy, HALF_HEIGHT[:, None]], axis=-1),
        object_velocity=jnp.zeros((len(OBJECTS), 3)),
        object_yaw=yaw,
        receptacle_position=places,
    )


def _crowded(xy: Array, places: Array) -> Array:
    """bool []: some object nearly touches another one or a receptacle; objects [N, 2], receptacles [M, 2]."""
    distance = jnp.linalg.norm(xy[:, None] - xy + 1e-9, axis=-1) + jnp.eye(len(OBJECTS))
    reach = np.array([place.radius for place in RECEPTACLES]) + RADIUS[:, None]
    beside = jnp.abs(xy[:, None] - places).max(-1) < reach + CLEARANCE
    return (distance < RADIUS + RADIUS[:, None] + CLEARANCE).any() | beside.any()


def target(state: TabletopState) -> tuple[Array, Array]:
    """Indices (int32 []) of the object and the receptacle that the task names."""
    return state.task // len(RECEPTACLES), state.task % len(RECEPTACLES)


def proprioception(state: TabletopState) -> Array:
    """float32 [8]: grip point (m), axis-angle (rad, not folded, near (pi, 0, 0)), the two finger positions (m).

    Same convention as robosuite's `eef_pos`, `quat2axisangle(eef_quat)` and `gripper_qpos` in LIBERO.
    """
    axis, w = state.hand_quaternion[:3], state.hand_quaternion[3]
    norm = jnp.linalg.norm(axis)
    axis_angle = axis / norm * 2.0 * jnp.arctan2(norm, w)
    fingers = jnp.stack([state.finger_position, -state.finger_position])
    return jnp.concatenate([state.hand_position, axis_angle, fingers])


def hand_yaw(quaternion: Array) -> Array:
    """Heading (rad) of the hand's x axis on the table; 0 for (1, 0, 0, 0)."""
    x, y, z, w = quaternion
    return jnp.arctan2(2.0 * (x * y + z * w), 1.0 - 2.0 * (y * y + z * z))


def hand_down(quaternion: Array) -> Array:
    """Where the hand points, in world axes: unit vector [3]; (0, 0, -1) for (1, 0, 0, 0)."""
    x, y, z, w = quaternion
    return jnp.stack([2.0 * (x * z + y * w), 2.0 * (y * z - x * w), 1.0 - 2.0 * (x * x + y * y)])


def receptacle_distance(xy: Array, places: Array) -> tuple[Array, Array]:
    """Signed distances (negative inside) from points to the outlines of the receptacles, and outward normals.

    Args:
        xy: float32 [N, 2] points.
        places: float32 [M, 2] centres.

    Returns:
        distance float32 [N, M] (for a tray along the nearer axis) and normal float32 [N, M, 2].
    """
    distances, normals = [], []
    for index, place in enumerate(RECEPTACLES):
        offset = xy - places[index]
        if place.shape == BOX:
            along_x = (jnp.abs(offset[:, 0]) > jnp.abs(offset[:, 1]))[:, None]
            normal = jnp.sign(offset) * jnp.where(along_x, jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))
            distances.append(jnp.max(jnp.abs(offset), axis=-1) - place.radius)
        else:
            length = jnp.linalg.norm(offset, axis=-1)
            normal = offset / jnp.maximum(length, 1e-6)[:, None]
            distances.append(length - place.radius)
        normals.append(normal)
    return jnp.stack(distances, axis=1), jnp.stack(normals, axis=1)


def success(state: TabletopState) -> Array:
    """bool []: the target is released, at rest, with its centre inside the named receptacle and on its floor."""
    thing, place = target(state)
    position = state.object_position[thing]
    distance, _ = receptacle_distance(position[None, :2], state.receptacle_position)
    gap = position[2] - jnp.asarray(HALF_HEIGHT)[thing] - jnp.asarray(FLOOR)[place]
    at_rest = jnp.linalg.norm(state.object_velocity[thing]) < REST_SPEED
    return (state.held != thing) & at_rest & (distance[0, place] < 0.0) & (jnp.abs(gap) < REST_GAP)
