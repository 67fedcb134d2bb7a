# SPDX-License-Identifier: Apache-2.0
"""Delta actions: what the action resampler reads, one row per future frame (EVAC).

A row holds, per arm, the motion since the frame before (metres; roll, pitch and yaw differences in radians) and the
gripper's absolute opening.
"""

from worldenv_jax.simulator.poses import euler_from_matrix, matrix_from_quaternion
from worldenv_jax.types import Array


def delta_actions(positions: Array, quaternions: Array, openings: Array) -> Array:
    """Poses of one arm to its delta actions.

    Args:
        positions: float [..., T, 3].
        quaternions: float [..., T, 4], xyzw.
        openings: float [..., T], of the gripper, in [0, 1].
    Returns: float [..., T - 1, 7].
    """
    xp = positions.__array_namespace__()
    angles = euler_from_matrix(matrix_from_quaternion(quaternions))
    turned = xp.diff(angles, axis=-2)
    # Wrapped to (-pi, pi].
    turned = xp.pi - xp.mod(xp.pi - turned, 2 * xp.pi)
    return xp.concatenate([xp.diff(positions, axis=-2), turned, openings[..., 1:, None]], axis=-1)


def normalize_deltas(deltas: Array, mean: Array, std: Array) -> Array:
    """Standardises the six motion numbers of each arm of [..., 7 * arms]; `mean` and `std` are [6 * arms]."""
    xp = deltas.__array_namespace__()
    arms = deltas.shape[-1] // 7
    split = deltas.reshape(*deltas.shape[:-1], arms, 7)
    motion = (split[..., :6] - mean.reshape(arms, 6)) / std.reshape(arms, 6)
    return xp.concatenate([motion, split[..., 6:]], axis=-1).reshape(deltas.shape)
