# SPDX-License-Identifier: Apache-2.0
"""Scripted expert of the tabletop: a pure function of the state, so that an episode is one `lax.scan`.

The expert has no memory. It approaches down a cone that ends at the target, closes when it is aligned, lifts and
carries over a cone that ends at the receptacle, opens, and retreats. Whatever noise does to the hand, the state says
what to do next, so missed grasps and drops are tried again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.envs.tabletop.config import BOX, OBJECTS, TabletopConfig
from worldenv_jax.envs.tabletop.physics import step
from worldenv_jax.envs.tabletop.world import (
    FLOOR,
    HALF_HEIGHT,
    TabletopState,
    hand_down,
    hand_yaw,
    receptacle_distance,
    start_state,
    success,
    target,
)
from worldenv_jax.types import Array

CONE_SLOPE = 3.0  # height over horizontal distance
ALIGNED = 0.008  # m, tip of the cone
CLOSE_ENOUGH = 0.012  # m at which the gripper acts
RETREAT_HEIGHT = 0.14  # m
LATERAL_CLEARANCE = 0.055  # m under a carried object above which it moves sideways at full speed
IS_BOX = np.array([thing.shape == BOX for thing in OBJECTS])


class ExpertStyle(NamedTuple):
    """What differs from one demonstration to the next."""

    speed: Array  # float32 [], largest command
    hover: Array  # float32 [], m above the target at which it is approached
    lift: Array  # float32 [], m above the point of release at which it is carried
    drop: Array  # float32 [], m above the floor at which it is released
    grasp_offset: Array  # float32 [3], m from the object's centre
    place_offset: Array  # float32 [2], m from the receptacle's centre


class ExpertRollout(NamedTuple):
    """An episode of T commands."""

    states: TabletopState  # leaves [T + 1, ...]
    actions: Array  # float32 [T, 7], as executed
    success: Array  # bool [T + 1]


def expert_style(key: Array) -> ExpertStyle:
    """Draws a style."""
    low = jnp.array([0.9, 0.060, 0.070, 0.004, -0.004, -0.004, -0.002, -0.012, -0.012])
    high = jnp.array([1.0, 0.085, 0.090, 0.012, 0.004, 0.004, 0.006, 0.012, 0.012])
    draw = jax.random.uniform(key, low.shape, minval=low, maxval=high)
    return ExpertStyle(*draw[:4], grasp_offset=draw[4:7], place_offset=draw[7:])


def expert_action(config: TabletopConfig, style: ExpertStyle, state: TabletopState) -> Array:
    """The command float32 [7] that brings the task forward from any state."""
    thing, place = target(state)
    position = state.object_position[thing]
    holding = state.held == thing
    distance, _ = receptacle_distance(position[None, :2], state.receptacle_position)
    rest = jnp.asarray(FLOOR)[place] + jnp.asarray(HALF_HEIGHT)[thing]
    delivered = ~holding & (distance[0, place] < 0.0) & (position[2] < rest + 0.05)

    pick_move, close = _pick(config, style, state, position)
    place_move, release = _place(config, style, state, position, rest)
    retreat_move = jnp.stack([jnp.zeros(()), jnp.zeros(()), RETREAT_HEIGHT - state.hand_position[2]])
    move = jnp.where(holding, place_move, jnp.where(delivered, retreat_move, pick_move))
    closed = jnp.where(holding, ~release, ~delivered & close & (state.held < 0))

    command = move / config.position_gain
    command *= jnp.minimum(1.0, style.speed / jnp.maximum(jnp.max(jnp.abs(command)), 1e-6))
    yaw = jnp.where(holding | delivered, 0.0, state.object_yaw[thing] * jnp.asarray(IS_BOX)[thing])
    return jnp.concatenate([command, _turn(config, state, yaw), jnp.where(closed, 1.0, -1.0)[None]])


def _pick(config, style, state, position) -> tuple[Array, Array]:
    """Displacement towards the grasp (m, [3]) and whether to close."""
    goal = position + style.grasp_offset
    goal = goal.at[2].max(config.hand_low[2])
    error = goal - state.hand_position
    distance = jnp.linalg.norm(error[:2])
    climb = jnp.clip(CONE_SLOPE * (distance - ALIGNED), 0.0, style.hover)
    closing = state.finger_position < config.finger_travel - 1e-3
    reach = jnp.where(closing, 1.3, 1.0) * CLOSE_ENOUGH
    close = (distance < reach) & (jnp.abs(error[2]) < reach)
    return error.at[2].add(climb), close


def _place(config, style, state, position, rest) -> tuple[Array, Array]:
    """Displacement towards the release (m, [3]) and whether to open."""
    thing, place = target(state)
    error = jnp.append(state.receptacle_position[place] + style.place_offset, rest + style.drop) - position
    distance = jnp.linalg.norm(error[:2])
    climb = jnp.clip(CONE_SLOPE * (distance - ALIGNED), 0.0, style.lift)
    clearance = position[2] - jnp.asarray(HALF_HEIGHT)[thing]
    lateral = jnp.where(distance < 0.03, 1.0, jnp.clip(clearance / LATERAL_CLEARANCE, 0.0, 1.0))
    release = (distance < CLOSE_ENOUGH) & (jnp.abs(error[2]) < CLOSE_ENOUGH)
    return jnp.append(lateral * error[:2], error[2] + climb), release


def _turn(config: TabletopConfig, state: TabletopState, yaw: Array) -> Array:
    """Rotation command [3] towards a heading (rad, modulo a quarter turn) with the hand upright."""
    difference = yaw - hand_yaw(state.hand_quaternion)
    difference -= np.pi / 2 * jnp.round(difference / (np.pi / 2))
    down = hand_down(state.hand_quaternion)
    rotation = jnp.stack([-down[1], down[0], difference])
    return jnp.clip(rotation / config.rotation_gain, -0.5, 0.5)


def expert_rollout(config: TabletopConfig, task: Array, split: Array, seed: Array, noise: Array) -> ExpertRollout:
    """Runs the expert for `max_steps` commands from one start.

    Args:
        config: the world.
        task: int32 [].
        split: int32 [], as in `start_state`.
        seed: int32 [].
        noise: float32 [], scale of the Laplace noise on the six deltas.
    """
    key = jax.random.key(21)
    for number in (split, task, seed):
        key = jax.random.fold_in(key, number)
    key_style, key_noise = jax.random.split(key)
    style = expert_style(key_style)
    disturbances = noise * jax.random.laplace(key_noise, (config.max_steps, 6))

    def advance(state, disturbance):
        action = expert_action(config, style, state)
        action = jnp.clip(action.at[:6].add(disturbance), -1.0, 1.0)
        state = step(config, state, action)
        return state, (state, action, success(state))

    start = start_state(config, task, split, seed)
    _, (states, actions, done) = jax.lax.scan(advance, start, disturbances)
    states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, states)
    return ExpertRollout(states, actions, jnp.append(success(start), done))
