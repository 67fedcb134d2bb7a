# SPDX-License-Identifier: Apache-2.0
"""How proprioception follows from actions: the deterministic step of World-Env (paper, section 1.1).

LIBERO's controller moves the hand by a share of the commanded delta and keeps a part of its speed, so a step is
`delta_t = gain * action_t + momentum * delta_{t-1}`; the fingers approach their command at a limited speed. That step
lags behind the arm by centimetres within a second; `arm_motion.ArmMotion`, a small network, learns what it misses.
Proprioception is position (3), axis-angle (3, as robosuite's: `axis_angle_from_quaternion`) and finger positions (2);
actions are environment actions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.simulator.arm_motion import ArmContext, ArmMotion, arm_sights
from worldenv_jax.simulator.grips import HELD, Grip, advance_grip, no_grip, recorded_grips
from worldenv_jax.simulator.poses import (
    axis_angle_from_quaternion,
    conjugate_quaternion,
    matrix_from_quaternion,
    multiply_quaternions,
    quaternion_from_axis_angle,
    shortest_quaternion,
)
from worldenv_jax.types import Array

OPEN = 0.9  # share of the fingers' distance from which on nothing is held


class Kinematics(NamedTuple):
    """Numbers of the deterministic step, all float32."""

    gain: Array  # [6]: metres and radians per unit of action
    momentum: Array  # [6]: share of the previous step's motion that is kept
    position_low: Array  # [3]: the workspace
    position_high: Array  # [3]
    finger_open: Array  # [2]
    finger_closed: Array  # [2]
    finger_speed: Array  # []: metres per step

    @classmethod
    def osc_pose(cls) -> "Kinematics":
        """robosuite's OSC_POSE and Panda gripper as commanded: 5 cm and 0.5 rad per unit, no momentum."""
        infinite = jnp.full(3, jnp.inf)
        gain = jnp.array([0.05] * 3 + [0.5] * 3)
        opened = jnp.array([0.04, -0.04])
        return cls(gain, jnp.zeros(6), -infinite, infinite, opened, jnp.zeros(2), jnp.asarray(0.01))


def workspace(kinematics: Kinematics) -> tuple[Array, Array]:
    """Its lowest and highest corner [3], the units of positions in networks; an endless one reaches from -1 to 1 m."""
    low, high = jnp.asarray(kinematics.position_low), jnp.asarray(kinematics.position_high)
    return jnp.where(jnp.isfinite(low), low, -1.0), jnp.where(jnp.isfinite(high), high, 1.0)


def ground(kinematics: Kinematics) -> Array:
    """Height of what things stand on, metres: the lowest that hands have been; 0 where the workspace is endless."""
    lowest = jnp.asarray(kinematics.position_low)[2]
    return jnp.where(jnp.isfinite(lowest), lowest, 0.0)


def relative_pose(proprio: Array, reference: Array) -> Array:
    """Motion from `reference` to `proprio`, [..., 8] each: metres and a base-frame rotation vector, [..., 6]."""
    rotation, start = (quaternion_from_axis_angle(p[..., 3:6]) for p in (proprio, reference))
    turned = multiply_quaternions(rotation, conjugate_quaternion(start))
    turned = axis_angle_from_quaternion(shortest_quaternion(turned))
    return jnp.concatenate([proprio[..., :3] - reference[..., :3], turned], axis=-1)


def finger_opening(proprio: Array) -> Array:
    """Distance of the fingers, metres; [..., 8] to [...]."""
    return proprio[..., 6] - proprio[..., 7]


class Advance(NamedTuple):
    """What follows from K actions; grip and logit say nothing without an `ArmContext`."""

    proprio: Array  # float32 [B, K, 8], after each action
    grip: Grip  # leaves [B, K], after each action
    grasp_logit: Array  # float32 [B, K]: were the grasp decided at this action, the logit of its holding


def advance_proprio(
    kinematics: Kinematics, previous: Array, current: Array, actions: Array, arm: ArmContext | None = None
) -> Advance:
    """Proprioception after each action.

    Args:
        previous, current: float32 [B, 8], one step apart (equal at the start of an episode).
        actions: float32 [B, K, 7], environment actions.
        arm: without it the step is linear and ends at the recorded workspace.
    """
    start = quaternion_from_axis_angle(current[:, 3:6])
    steady = jnp.maximum(jnp.abs(kinematics.gain), 1e-4) / (1.0 - kinematics.momentum)
    by_step = lambda leaf: jnp.swapaxes(leaf, 0, 1)
    if arm is None:
        network, told = None, ()
        before, grip = jnp.zeros_like(actions[:, 0]), no_grip(len(actions))
    else:
        network = ArmMotion(arm.params["dense1"]["bias"].size)
        told = jax.tree.map(by_step, (arm_sights(arm, actions.shape[1]), arm.holds))
        before, grip = arm.previous_action, arm.grip

    def step(carry, inputs):
        (position, rotation, fingers, motion, last_action, grip), (action, *told) = carry, inputs
        goal = jnp.where(action[:, 6:] > 0, kinematics.finger_closed, kinematics.finger_open)
        closing = jnp.clip(goal - fingers, -kinematics.finger_speed, kinematics.finger_speed)
        linear = kinematics.gain * action[:, :6] + kinematics.momentum * motion
        logit = jnp.zeros(len(action))
        if network is None:
            moved = jnp.clip(position + linear[:, :3], kinematics.position_low, kinematics.position_high)
            motion = linear.at[:, :3].set(moved - position)
        else:
            (motion_sight, grasp_sight), holds = told
            relative = motion / steady, action, last_action
            features = _motion_features(kinematics, *relative, fingers, position, rotation, grip.holds)
            missed = network.apply({"params": arm.params}, features, motion_sight)
            glances = None if arm.glance is None else arm.glance(jax.lax.stop_gradient(position[:, None]))[:, 0]
            train = arm.dropout is not None
            keys = {"dropout": jax.random.fold_in(arm.dropout, 1)} if train else {}
            inputs = features, grasp_sight, glances, train
            logit = network.apply({"params": arm.params}, *inputs, method="grasps", rngs=keys)
            motion = linear + steady * missed[:, :6]
            moved = position + motion[:, :3]
            closing += kinematics.finger_speed * missed[:, 6:] * jnp.array([1.0, -1.0])
        rotation = multiply_quaternions(quaternion_from_axis_angle(motion[:, 3:]), rotation)
        fingers += closing
        proprio = jnp.concatenate([moved, axis_angle_from_quaternion(rotation), fingers], axis=-1)
        if network is not None:
            grip = advance_grip(grip, action[:, 6], is_open(kinematics, proprio), jnp.where(logit > 0, 1.0, -1.0))
            grip = grip if holds is None else grip._replace(holds=holds)
        return (moved, rotation, fingers, motion, action, grip), Advance(proprio, grip, logit)

    carry = (current[:, :3], start, current[:, 6:], relative_pose(current, previous), before, grip)
    _, advance = jax.lax.scan(step, carry, (by_step(actions), *told))
    return jax.tree.map(by_step, advance)


def is_open(kinematics: Kinematics, proprio: Array) -> Array:
    """Whether fingers are too far apart to hold anything; [..., 8] to bool [...]."""
    return finger_opening(proprio) > OPEN * _widest(kinematics)


def is_empty(kinematics: Kinematics, proprio: Array) -> Array:
    """Whether the fingers are so close that there is nothing between them; [..., 8] to bool [...]."""
    return finger_opening(proprio) <= HELD * _widest(kinematics)


def episode_grips(kinematics: Kinematics, proprio: np.ndarray, actions: np.ndarray) -> Grip:
    """`recorded_grips` of an episode: float [T + 1, 8] and float [T, 7] to leaves float32 [T + 1]."""
    opening, widest = proprio[:, 6] - proprio[:, 7], float(_widest(kinematics))
    return recorded_grips(opening / widest, actions[:, 6], opening > OPEN * widest)


def last_grasps(kinematics: Kinematics, grasp: Array, proprio: Array) -> Array:
    """Where the hand was last open: what it holds has moved with it since.

    By the fingers, not by the commands: an exploring policy commands "open" for a step now and then and drops nothing.

    Args:
        grasp: float32 [B, 8], that place as known before the first step; the proprioception itself at the start.
        proprio: float32 [B, K, 8], after each step.
    Returns: float32 [B, K, 8], after each step; of an open hand its own place.
    """
    newest = jax.lax.cummax(jnp.where(is_open(kinematics, proprio), jnp.arange(1, proprio.shape[1] + 1), 0), axis=1)
    places = jnp.concatenate([grasp[:, None], proprio], axis=1)
    return jnp.take_along_axis(places, newest[..., None], axis=1)


def _motion_features(
    kinematics: Kinematics,
    motion: Array,
    action: Array,
    last_action: Array,
    fingers: Array,
    position: Array,
    rotation: Array,
    holds: Array,
) -> Array:
    low, high = workspace(kinematics)
    middle, reach = 0.5 * (low + high), 0.5 * (high - low)
    axes = matrix_from_quaternion(rotation)[..., :2].reshape(-1, 6)  # no jumps, as axis-angle near a half turn has
    opening = (fingers[:, :1] - fingers[:, 1:]) / _widest(kinematics)
    parts = motion, action, last_action, opening, (position - middle) / reach, axes, holds[:, None]
    return jnp.concatenate(parts, axis=-1)


def _widest(kinematics: Kinematics) -> Array:
    return kinematics.finger_open[0] - kinematics.finger_open[1]


def fit_kinematics(proprios: Sequence[np.ndarray], actions: Sequence[np.ndarray], margin: float = 0.01) -> Kinematics:
    """Least squares over recorded episodes.

    Args:
        proprios: per episode float [T + 1, 8], before each action and after the last.
        actions: per episode float [T, 7], environment actions.
        margin: metres by which the workspace exceeds the recorded positions.

    Raises ValueError where an episode's lengths disagree or fewer than two steps are given.
    """
    wrong = [(len(p), len(a)) for p, a in zip(proprios, actions) if len(p) != len(a) + 1]
    if wrong or sum(len(a) for a in actions) < 2:
        raise ValueError(f"kinematics: need T + 1 proprios for T >= 2 actions, got lengths {wrong or 'of nothing'}")
    motions = [np.asarray(relative_pose(p[1:], p[:-1]), np.float64) for p in map(np.float32, proprios)]
    before = np.concatenate([np.concatenate([np.zeros((1, 6)), m[:-1]]) for m in motions])
    motion, command = np.concatenate(motions), np.concatenate(actions).astype(np.float64)
    gain, momentum = np.zeros(6), np.zeros(6)
    for i in range(6):
        regressors = np.stack([command[:, i], before[:, i]], axis=1)
        gain[i], momentum[i] = np.linalg.lstsq(regressors, motion[:, i], rcond=1e-6)[0]
    momentum = np.clip(momentum, 0.0, 0.95)
    fingers = np.concatenate([p[1:, 6:] for p in proprios]).astype(np.float64)
    opening = fingers[:, 0] - fingers[:, 1]
    speed = np.abs(np.concatenate([np.diff(p[:, 6:], axis=0) for p in proprios]))
    positions = np.concatenate([p[:, :3] for p in proprios])
    return Kinematics(
        *(jnp.asarray(x, jnp.float32) for x in (gain, momentum)),
        jnp.asarray(positions.min(0) - margin, jnp.float32),
        jnp.asarray(positions.max(0) + margin, jnp.float32),
        jnp.asarray(fingers[np.argsort(opening)[-max(1, len(opening) // 10) :]].mean(0), jnp.float32),
        jnp.asarray(fingers[np.argsort(opening)[: max(1, len(opening) // 50)]].mean(0), jnp.float32),
        jnp.asarray(max(np.quantile(speed, 0.99), 1e-4), jnp.float32),
    )


def proprioception_error(predicted: np.ndarray, recorded: np.ndarray, valid: np.ndarray) -> dict[str, np.ndarray]:
    """How far predicted proprioception is off after each step.

    Args:
        predicted, recorded: float [N, T, 8].
        valid: bool [N, T], the steps that were recorded.

    Returns: "position" in metres, "rotation" in radians and "fingers" in metres, each the mean over episodes, float64
        [T] (NaN where no episode is that long).
    """
    motion = np.asarray(relative_pose(*(jnp.asarray(p, jnp.float32) for p in (predicted, recorded))), np.float64)
    errors = {
        "position": np.linalg.norm(motion[..., :3], axis=-1),
        "rotation": np.linalg.norm(motion[..., 3:], axis=-1),
        "fingers": np.abs(np.float64(predicted)[..., 6:] - recorded[..., 6:]).mean(-1),
    }
    count = np.where(valid.any(0), valid.sum(0), np.nan)
    return {name: np.where(valid, error, 0.0).sum(0) / count for name, error in errors.items()}
