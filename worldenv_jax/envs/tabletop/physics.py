# SPDX-License-Identifier: Apache-2.0
"""Motion of the tabletop: one command of the hand and what it does to the objects, as a pure function.

Each command is cut into substeps; a substep moves the hand, resolves the grip, pushes what is in the way and lets
the rest fall or roll. Rules:

- The hand integrates its command exactly and is clipped to the workspace; objects never hold it back.
- An object that fits between the open fingers is centred by them when they close and is held when they touch it on
  both sides, if it is near enough to the middle of the pads and at the height of the hand.
- Every other object that the fingers meet is pushed away from the hand.
- A held object keeps its offset, slides up in the grip where the table holds it back, and pushes what it meets.
- Opening releases; a released object keeps the hand's horizontal speed, falls under gravity and comes to rest on the
  table, on a receptacle's floor or on top of another object. The ball rolls when it is pushed or dropped from high.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.envs.tabletop.config import BOX, OBJECTS, RECEPTACLES, SPHERE, TabletopConfig
from worldenv_jax.envs.tabletop.world import (
    FLOOR,
    HALF_HEIGHT,
    RADIUS,
    TabletopState,
    hand_down,
    hand_yaw,
    receptacle_distance,
)
from worldenv_jax.types import Array

GRAVITY = 9.81  # m/s^2
FINGER_RADIUS = 0.006  # m
PALM_HEIGHT = 0.05  # m above the grip point; objects higher than it are out of the fingers' reach
RELEASE_GAP = 0.002  # m that the fingers open before an object is let go
HARD_LANDING = 0.9  # m/s, a drop from about 4 cm; a ball that lands faster rolls away
ROLL_SHARE = 0.3  # part of the speed of landing, or of a push, that becomes rolling
ROLL_LIMIT = 0.3  # m/s
ROLL_DECAY = 0.9  # per substep
SLIDE_DECAY = 0.4  # per substep, on a surface, for objects that do not roll
TOUCH = 0.002  # m of vertical overlap below which stacked objects do not push each other

IS_BALL = np.array([thing.shape == SPHERE for thing in OBJECTS])
IS_BOX = np.array([thing.shape == BOX for thing in OBJECTS])
RIM = np.array([place.rim for place in RECEPTACLES], np.float32)
WALL = np.array([place.wall for place in RECEPTACLES], np.float32)
INDEX = np.arange(len(OBJECTS))


class _Grip(NamedTuple):
    """Where the objects are as seen by the hand."""

    along: Array  # float32 [N], m along the finger pads
    across: Array  # float32 [N], m along the line through the fingers
    height: Array  # float32 [N], m above the grip point
    inside: Array  # bool [N], the object stands free between the fingers


def step(config: TabletopConfig, state: TabletopState, action: Array) -> TabletopState:
    """Applies one environment action float32 [7] (clipped to [-1, 1]; gripper > 0 closes)."""
    action = jnp.clip(action, -1.0, 1.0)

    def substep(state, _):
        return _substep(config, state, action), None

    return jax.lax.scan(substep, state, None, length=config.substeps)[0]


def _substep(config: TabletopConfig, state: TabletopState, action: Array) -> TabletopState:
    dt = 1.0 / (config.control_hz * config.substeps)
    before = _grip(config, state)
    moved = _move_hand(config, state, action)
    hand_velocity = (moved.hand_position - state.hand_position) / dt
    moved = _resolve_grip(config, moved, before, action[6] > 0.0, hand_velocity)
    pushed = _push_objects(config, moved, before.inside)
    pushed = _collide_receptacles(config, pushed)
    return _fall_and_roll(config, pushed, pushed.object_position - moved.object_position, dt)


def _grip(config: TabletopConfig, state: TabletopState) -> _Grip:
    offset = state.object_position - state.hand_position
    yaw = hand_yaw(state.hand_quaternion)
    along, across = _rotate(offset[:, :2], -yaw).T
    height = offset[:, 2]
    fits = jnp.abs(across) <= state.finger_position - RADIUS + 1e-4
    inside = fits & (jnp.abs(along) < RADIUS + FINGER_RADIUS) & _in_reach(config, height)
    return _Grip(along, across, height, inside)


def _in_reach(config: TabletopConfig, height: Array) -> Array:
    return (height > -config.grasp_height) & (height < PALM_HEIGHT)


def _move_hand(config: TabletopConfig, state: TabletopState, action: Array) -> TabletopState:
    position = state.hand_position + config.position_gain / config.substeps * action[:3]
    position = jnp.clip(position, jnp.array(config.hand_low), jnp.array(config.hand_high))
    rotation = config.rotation_gain / config.substeps * action[3:6]
    tilted = _rotate_quaternion(rotation, state.hand_quaternion)
    upright = _rotate_quaternion(rotation * jnp.array([0.0, 0.0, 1.0]), state.hand_quaternion)
    quaternion = jnp.where(-hand_down(tilted)[2] >= np.cos(config.tilt_limit), tilted, upright)
    travel = jnp.where(action[6] > 0.0, -1.0, 1.0) * config.finger_speed / config.substeps
    grip_width = jnp.where(state.held >= 0, jnp.asarray(RADIUS)[state.held], 0.0)
    finger = jnp.clip(state.finger_position + travel, grip_width, config.finger_travel)
    return state._replace(hand_position=position, hand_quaternion=quaternion, finger_position=finger)


def _resolve_grip(config, state, before: _Grip, closing: Array, hand_velocity: Array) -> TabletopState:
    """Releases, grasps, and carries what is held."""
    radius = jnp.asarray(RADIUS)
    holding = state.held >= 0
    released = holding & ~closing & (state.finger_position > radius[state.held] + RELEASE_GAP)
    grip = _grip(config, state)
    graspable = before.inside & (state.finger_position <= radius) & (jnp.abs(grip.along) < config.grasp_along)
    graspable &= jnp.abs(grip.height) < config.grasp_height
    nearest = jnp.argmin(jnp.where(graspable, jnp.abs(grip.along), jnp.inf)).astype(jnp.int32)
    grasped = closing & ~holding & jnp.any(graspable)

    held = jnp.where(grasped, nearest, jnp.where(released, -1, state.held))
    finger = jnp.where(grasped, radius[nearest], state.finger_position)
    seen = jnp.stack([grip.along[nearest], jnp.zeros(()), grip.height[nearest]])
    offset = jnp.where(grasped, seen, state.grip_offset)
    dropped = released & (state.held == INDEX)
    velocity = jnp.where(dropped[:, None], hand_velocity * jnp.array([1.0, 1.0, 0.0]), state.object_velocity)
    state = state._replace(held=held, finger_position=finger, grip_offset=offset, object_velocity=velocity)
    return _carry(config, state)


def _carry(config: TabletopConfig, state: TabletopState) -> TabletopState:
    yaw = hand_yaw(state.hand_quaternion)
    is_held = state.held == INDEX
    xy = state.hand_position[:2] + _rotate(state.grip_offset[:2], yaw)
    z = state.hand_position[2] + state.grip_offset[2]
    carried = jnp.where(is_held[:, None], jnp.append(xy, z), state.object_position)
    lowest = _support(state._replace(object_position=carried)) + HALF_HEIGHT
    carried = carried.at[:, 2].set(jnp.where(is_held, jnp.maximum(carried[:, 2], lowest), carried[:, 2]))
    slid = jnp.max(jnp.where(is_held, carried[:, 2], -jnp.inf)) - state.hand_position[2]
    offset = state.grip_offset.at[2].set(jnp.where(state.held >= 0, slid, state.grip_offset[2]))
    quarter = np.pi / 2
    aligned = yaw + quarter * jnp.round((state.object_yaw - yaw) / quarter)
    return state._replace(
        object_position=carried,
        grip_offset=offset,
        object_velocity=jnp.where(is_held[:, None], 0.0, state.object_velocity),
        object_yaw=jnp.where(is_held & IS_BOX, aligned, state.object_yaw),
    )


def _push_objects(config: TabletopConfig, state: TabletopState, inside: Array) -> TabletopState:
    """Moves what the fingers, the held object and other objects run into."""
    free = state.held != INDEX
    grip = _grip(config, state)
    gap = jnp.maximum(state.finger_position - RADIUS, 0.0)
    centred = jnp.clip(grip.across, -gap, gap) - grip.across
    between = jnp.stack([jnp.zeros_like(centred), centred], axis=-1)

    finger = state.finger_position + FINGER_RADIUS
    distance = jnp.hypot(grip.along, jnp.abs(grip.across) - finger)
    depth = jnp.where(_in_reach(config, grip.height), RADIUS + FINGER_RADIUS - distance, 0.0)
    seen = jnp.stack([grip.along, grip.across], axis=-1)
    away = _direction(seen) * jnp.clip(depth, 0.0, config.push_limit)[:, None]
    shift = _rotate(jnp.where(inside[:, None], between, away), hand_yaw(state.hand_quaternion))
    position = state.object_position.at[:, :2].add(jnp.where(free[:, None], shift, 0.0))
    return state._replace(object_position=_separate(config, position, state.held))


def _separate(config: TabletopConfig, position: Array, held: Array) -> Array:
    """Pushes overlapping objects apart: half way each, or all the way where the other one is held."""
    offset = position[:, None] - position[None, :]
    overlap = RADIUS[:, None] + RADIUS[None, :] - jnp.linalg.norm(offset[..., :2], axis=-1)
    level = jnp.abs(offset[..., 2]) < HALF_HEIGHT[:, None] + HALF_HEIGHT[None, :] - TOUCH
    touching = level & (overlap > 0.0) & ~np.eye(len(OBJECTS), dtype=bool)
    share = jnp.where(INDEX[None, :] == held, 1.0, 0.5)
    shift = jnp.sum(_direction(offset[..., :2]) * jnp.where(touching, overlap * share, 0.0)[..., None], axis=1)
    shift = jnp.clip(shift, -config.push_limit, config.push_limit)
    return position.at[:, :2].add(jnp.where((held == INDEX)[:, None], 0.0, shift))


def _collide_receptacles(config: TabletopConfig, state: TabletopState) -> TabletopState:
    """Keeps free objects out of the sides of the receptacles, and those in the tray off its wall."""
    position = state.object_position
    distance, normal = receptacle_distance(position[:, :2], state.receptacle_position)
    below = ((position[:, 2] - HALF_HEIGHT)[:, None] < RIM - 5e-4) & (state.held != INDEX)[:, None]
    outside = jnp.clip(RADIUS[:, None] - distance, 0.0, config.push_limit)
    within = jnp.clip(distance + RADIUS[:, None] + WALL, 0.0, config.push_limit)
    amount = jnp.where(distance > 0.0, outside, jnp.where(WALL > 0.0, -within, 0.0))
    shift = jnp.sum(normal * jnp.where(below, amount, 0.0)[..., None], axis=1)
    xy = jnp.clip(position[:, :2] + shift, -config.table_limit, config.table_limit)
    return state._replace(object_position=position.at[:, :2].set(xy))


def _support(state: TabletopState) -> Array:
    """Height (m) [N] of what is under each object's centre: table, receptacle floor or another object's top."""
    position = state.object_position
    distance, _ = receptacle_distance(position[:, :2], state.receptacle_position)
    floor = jnp.max(jnp.where(distance < 0.0, FLOOR, 0.0), axis=1)
    offset = position[:, None] - position[None, :]
    top = position[:, 2] + HALF_HEIGHT
    over = jnp.linalg.norm(offset[..., :2], axis=-1) < 0.8 * RADIUS[None, :]
    above = (position[:, 2] - HALF_HEIGHT)[:, None] > top[None, :] - 0.01
    flat = ~(IS_BALL[:, None] | IS_BALL[None, :]) & ~np.eye(len(OBJECTS), dtype=bool)
    carries = over & above & flat & (state.held != INDEX)[None, :]
    return jnp.maximum(floor, jnp.max(jnp.where(carries, top[None, :], 0.0), axis=1))


def _fall_and_roll(config: TabletopConfig, state: TabletopState, pushed: Array, dt: float) -> TabletopState:
    """Integrates the free objects; `pushed` float32 [N, 3] is how far contacts moved them in this substep."""
    position, velocity = state.object_position, state.object_velocity
    free = state.held != INDEX
    lowest = _support(state) + HALF_HEIGHT
    falling = velocity[:, 2] - GRAVITY * dt
    z = position[:, 2] + falling * dt
    landed = z <= lowest
    hard = landed & (falling < -HARD_LANDING)

    horizontal = jnp.where(landed[:, None], velocity[:, :2] * _decay()[:, None], velocity[:, :2])
    outward = _direction(position[:, :2] - state.hand_position[:2])
    kick = outward * jnp.where(hard, -falling, 0.0)[:, None] + pushed[:, :2] / dt
    rolling = jnp.clip(horizontal + ROLL_SHARE * kick, -ROLL_LIMIT, ROLL_LIMIT)
    horizontal = jnp.where(IS_BALL[:, None], rolling, horizontal)
    vertical = jnp.where(landed, 0.0, falling)
    xy = jnp.clip(position[:, :2] + horizontal * dt, -config.table_limit, config.table_limit)
    moved = jnp.concatenate([xy, jnp.where(landed, lowest, z)[:, None]], axis=-1)
    return state._replace(
        object_position=jnp.where(free[:, None], moved, position),
        object_velocity=jnp.where(free[:, None], jnp.append(horizontal, vertical[:, None], axis=-1), 0.0),
    )


def _decay() -> np.ndarray:
    return np.where(IS_BALL, ROLL_DECAY, SLIDE_DECAY).astype(np.float32)


def _direction(offset: Array) -> Array:
    """Unit vectors [..., 2]; x where the offset vanishes."""
    length = jnp.linalg.norm(offset, axis=-1, keepdims=True)
    return jnp.where(length > 1e-6, offset / jnp.maximum(length, 1e-6), jnp.array([1.0, 0.0]))


def _rotate(xy: Array, angle: Array) -> Array:
    """Rotates vectors [..., 2] by one angle (rad)."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([cos * xy[..., 0] - sin * xy[..., 1], sin * xy[..., 0] + cos * xy[..., 1]], axis=-1)


def _rotate_quaternion(rotation: Array, quaternion: Array) -> Array:
    """Rotates a quaternion (x y z w) by a rotation vector (rad) given in world axes."""
    half = 0.5 * rotation
    angle = jnp.sqrt(jnp.sum(half * half) + 1e-20)
    v, s = half * jnp.sinc(angle / np.pi), jnp.cos(angle)
    u, w = quaternion[:3], quaternion[3]
    product = jnp.append(s * u + w * v + jnp.cross(v, u), s * w - jnp.dot(v, u))
    return product / jnp.linalg.norm(product)
