# SPDX-License-Identifier: Apache-2.0
"""Rotations and rigid transforms. Quaternions are xyzw (SciPy's order), rotations act on columns.

Everything takes JAX arrays on the device or NumPy arrays in float64, and returns the same kind.
"""

from worldenv_jax.types import Array


def quaternion_from_axis_angle(axis_angle: Array) -> Array:
    """Axis-angle vectors [..., 3] in radians to unit quaternions [..., 4]."""
    xp = axis_angle.__array_namespace__()
    angle = xp.sqrt(xp.sum(axis_angle**2, axis=-1, keepdims=True) + 1e-24)
    return xp.concatenate([axis_angle * xp.sin(0.5 * angle) / angle, xp.cos(0.5 * angle)], axis=-1)


def axis_angle_from_quaternion(quaternion: Array) -> Array:
    """Unit quaternions [..., 4] to axis-angle vectors [..., 3] with an angle in [0, 2 pi], as robosuite does.

    q and -q are the same rotation by two vectors. A hand that points down is near half a turn: where its quaternion
    goes on without a jump, so does the vector.
    """
    xp = quaternion.__array_namespace__()
    vector = quaternion[..., :3]
    sine = xp.sqrt(xp.sum(vector**2, axis=-1, keepdims=True) + 1e-24)
    return vector / sine * 2.0 * xp.arctan2(sine, quaternion[..., 3:])


def shortest_quaternion(quaternion: Array) -> Array:
    """The one of q and -q [..., 4] that turns by at most pi."""
    return quaternion.__array_namespace__().where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def multiply_quaternions(a: Array, b: Array) -> Array:
    """The rotation b followed by a; [..., 4] each."""
    xp = a.__array_namespace__()
    av, aw, bv, bw = a[..., :3], a[..., 3:], b[..., :3], b[..., 3:]
    vector = aw * bv + bw * av + xp.cross(av, bv)
    return xp.concatenate([vector, aw * bw - xp.sum(av * bv, axis=-1, keepdims=True)], axis=-1)


def conjugate_quaternion(quaternion: Array) -> Array:
    """The inverse rotation."""
    xp = quaternion.__array_namespace__()
    return quaternion * xp.array([-1.0, -1.0, -1.0, 1.0], quaternion.dtype)


def matrix_from_quaternion(quaternion: Array) -> Array:
    """Unit quaternions [..., 4] to rotation matrices [..., 3, 3]."""
    xp = quaternion.__array_namespace__()
    x, y, z, w = xp.moveaxis(quaternion, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return xp.stack([xp.stack(row, axis=-1) for row in rows], axis=-2)


def euler_from_matrix(matrix: Array) -> Array:
    """Rotation matrices [..., 3, 3] to extrinsic roll, pitch, yaw [..., 3] (SciPy's "xyz")."""
    xp = matrix.__array_namespace__()
    pitch = xp.arcsin(xp.clip(-matrix[..., 2, 0], -1.0, 1.0))
    roll = xp.arctan2(matrix[..., 2, 1], matrix[..., 2, 2])
    yaw = xp.arctan2(matrix[..., 1, 0], matrix[..., 0, 0])
    return xp.stack([roll, pitch, yaw], axis=-1)


def rigid_transform(rotation: Array, position: Array) -> Array:
    """Rotations [..., 3, 3] and positions [..., 3] to [..., 4, 4]."""
    xp = rotation.__array_namespace__()
    upper = xp.concatenate([rotation, position[..., None]], axis=-1)
    last = xp.broadcast_to(xp.array([0.0, 0.0, 0.0, 1.0], upper.dtype), (*upper.shape[:-2], 1, 4))
    return xp.concatenate([upper, last], axis=-2)


def inverse_transform(transform: Array) -> Array:
    """Inverse of rigid transforms [..., 4, 4]."""
    xp = transform.__array_namespace__()
    rotation = xp.swapaxes(transform[..., :3, :3], -1, -2)
    return rigid_transform(rotation, -xp.einsum("...ij,...j->...i", rotation, transform[..., :3, 3]))


def hand_poses(proprio: Array) -> Array:
    """Proprioception [..., 8] (position, axis-angle, fingers) to hand to world [..., 4, 4]."""
    rotation = matrix_from_quaternion(quaternion_from_axis_angle(proprio[..., 3:6]))
    return rigid_transform(rotation, proprio[..., :3])
