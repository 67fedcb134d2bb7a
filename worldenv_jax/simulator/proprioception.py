# SPDX-License-Identifier: Apache-2.0
"""How proprioception follows from actions: the deterministic step of World-Env (paper, section 1.1).

LIBERO's controller moves the hand by a share of the commanded delta and keeps a part of its speed, so a step is
`delta_t = gain * action_t + momentum * delta_{t-1}`; the fingers approach their command at a limited speed.
Proprioception is position (3), axis-angle (3) and finger positions (2); actions are environment actions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.simulator.poses import (
    axis_angle_from_quaternion,
    conjugate_quaternion,
    multiply_quaternions,
    quaternion_from_axis_angle,
)
from worldenv_jax.types import Array


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


def relative_pose(proprio: Array, reference: Array) -> Array:
    """Motion from `reference` to `proprio`, [..., 8] each: metres and a base-frame rotation vector, [..., 6]."""
    rotation, start = (quaternion_from_axis_angle(p[..., 3:6]) for p in (proprio, reference))
    turned = axis_angle_from_quaternion(multiply_quaternions(rotation, conjugate_quaternion(start)))
    return jnp.concatenate([proprio[..., :3] - reference[..., :3], turned], axis=-1)


def advance_proprio(kinematics: Kinematics, previous: Array, current: Array, actions: Array) -> Array:
    """Proprioception after each action.

    Args:
        previous, current: float32 [B, 8], one step apart (equal at the start of an episode).
        actions: float32 [B, K, 7], environment actions.
    Returns: float32 [B, K, 8].
    """
    start = quaternion_from_axis_angle(current[:, 3:6])

    def step(carry, action):
        position, rotation, fingers, motion = carry
        motion = kinematics.gain * action[:, :6] + kinematics.momentum * motion
        moved = jnp.clip(position + motion[:, :3], kinematics.position_low, kinematics.position_high)
        rotation = multiply_quaternions(quaternion_from_axis_angle(motion[:, 3:]), rotation)
        motion = motion.at[:, :3].set(moved - position)
        goal = jnp.where(action[:, 6:] > 0, kinematics.finger_closed, kinematics.finger_open)
        fingers += jnp.clip(goal - fingers, -kinematics.finger_speed, kinematics.finger_speed)
        proprio = jnp.concatenate([moved, axis_angle_from_quaternion(rotation), fingers], axis=-1)
        return (moved, rotation, fingers, motion), proprio

    carry = (current[:, :3], start, current[:, 6:], relative_pose(current, previous))
    _, proprio = jax.lax.scan(step, carry, jnp.swapaxes(actions, 0, 1))
    return jnp.swapaxes(proprio, 0, 1)


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


def proprioception_error(
    kinematics: Kinematics, proprios: Sequence[np.ndarray], actions: Sequence[np.ndarray], steps: int
) -> dict[str, float]:
    """Mean open-loop error after `steps` actions from the start of each recorded episode that is long enough.

    Returns: "position" in metres, "rotation" in radians, "fingers" in metres, and "episodes", how many were used.
    """
    pairs = [(p[: steps + 1], a[:steps]) for p, a in zip(proprios, actions) if len(a) >= steps]
    if not pairs:
        raise ValueError(f"proprioception error: no episode has {steps} steps")
    truth, commands = (np.stack(x).astype(np.float32) for x in zip(*pairs))
    predicted = advance_proprio(kinematics, truth[:, 0], truth[:, 0], commands)[:, -1]
    motion = np.asarray(relative_pose(predicted, truth[:, -1]))
    fingers = np.abs(np.asarray(predicted)[:, 6:] - truth[:, -1, 6:])
    return {
        "position": float(np.linalg.norm(motion[:, :3], axis=1).mean()),
        "rotation": float(np.linalg.norm(motion[:, 3:], axis=1).mean()),
        "fingers": float(fingers.mean()),
        "episodes": len(pairs),
    }
