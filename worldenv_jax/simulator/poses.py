# SPDX-License-Identifier: Apache-2.0
"""Rotations and rigid transforms on the device. Quaternions are xyzw (SciPy's order), rotations act on columns."""

import jax.numpy as jnp

from worldenv_jax.types import Array


def quaternion_from_axis_angle(axis_angle: Array) -> Array:
    """Axis-angle vectors [..., 3] in radians to unit quaternions [..., 4]."""
    angle = jnp.sqrt(jnp.sum(axis_angle**2, axis=-1, keepdims=True) + 1e-24)
    return jnp.concatenate([axis_angle * jnp.sin(0.5 * angle) / angle, jnp.cos(0.5 * angle)], axis=-1)


def axis_angle_from_quaternion(quaternion: Array) -> Array:
    """Unit quaternions [..., 4] to axis-angle vectors [..., 3] with an angle in [0, pi], as robosuite does."""
    quaternion = jnp.where(quaternion[..., 3:] < 0, -quaternion, quaternion)
    vector = quaternion[..., :3]
    sine = jnp.sqrt(jnp.sum(vector**2, axis=-1, keepdims=True) + 1e-24)
    return vector / sine * 2.0 * jnp.arctan2(sine, quaternion[..., 3:])


def multiply_quaternions(a: Array, b: Array) -> Array:
    """The rotation b followed by a; [..., 4] each."""
    av, aw, bv, bw = a[..., :3], a[..., 3:], b[..., :3], b[..., 3:]
    vector = aw * bv + bw * av + jnp.cross(av, bv)
    return jnp.concatenate([vector, aw * bw - jnp.sum(av * bv, axis=-1, keepdims=True)], axis=-1)


def conjugate_quaternion(quaternion: Array) -> Array:
    """The inverse rotation."""
    return quaternion * jnp.array([-1.0, -1.0, -1.0, 1.0], quaternion.dtype)


def matrix_from_quaternion(quaternion: Array) -> Array:
    """Unit quaternions [..., 4] to rotation matrices [..., 3, 3]."""
    x, y, z, w = jnp.moveaxis(quaternion, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def euler_from_matrix(matrix: Array) -> Array:
    """Rotation matrices [..., 3, 3] to extrinsic roll, pitch, yaw [..., 3] (SciPy's "xyz")."""
    pitch = jnp.arcsin(jnp.clip(-matrix[..., 2, 0], -1.0, 1.0))
    roll = jnp.arctan2(matrix[..., 2, 1], matrix[..., 2, 2])
    yaw = jnp.arctan2(matrix[..., 1, 0], matrix[..., 0, 0])
    return jnp.stack([roll, pitch, yaw], axis=-1)


def rigid_transform(rotation: Array, position: Array) -> Array:
    """Rotations [..., 3, 3] and positions [..., 3] to [..., 4, 4]."""
    upper = jnp.concatenate([rotation, position[..., None]], axis=-1)
    last = jnp.broadcast_to(jnp.array([0.0, 0.0, 0.0, 1.0], upper.dtype), (*upper.shape[:-2], 1, 4))
    return jnp.concatenate([upper, last], axis=-2)


def inverse_transform(transform: Array) -> Array:
    """Inverse of rigid transforms [..., 4, 4]."""
    rotation = jnp.swapaxes(transform[..., :3, :3], -1, -2)
    return rigid_transform(rotation, -jnp.einsum("...ij,...j->...i", rotation, transform[..., :3, 3]))
