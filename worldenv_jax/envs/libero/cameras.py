# SPDX-License-Identifier: Apache-2.0
"""Pinhole cameras of LIBERO's views, for the images as policies see them.

MuJoCo cameras look along their -z axis with x to the right and y up; ours follow OpenCV (x right, y down, z forward).
MuJoCo hands frames out bottom row first. OpenVLA-OFT and its datasets turn those raw frames by 180 degrees
(``frame[::-1, ::-1]``), which leaves them upright but **mirrored left to right**. The intrinsics here describe exactly
these images: the mirror appears as a negative horizontal focal length, the camera's pose stays a rotation.

Pixel (column u, row v) covers [u, u + 1) x [v, v + 1), so the principal point of a square image is size / 2.
"""

import numpy as np

from worldenv_jax.types import Camera

CAMERA_NAMES = ("agentview", "robot0_eye_in_hand")
_OPENCV_FROM_MUJOCO = np.diag([1.0, -1.0, -1.0])


def policy_frame(raw: np.ndarray) -> np.ndarray:
    """Turns a raw frame uint8 [H, W, 3] (bottom row first) into the image that policies see: upright, mirrored."""
    return np.ascontiguousarray(raw[::-1, ::-1])


def intrinsics(vertical_field_of_view: float, size: int) -> np.ndarray:
    """Intrinsic matrix float32 [3, 3] of a `policy_frame` of size x size pixels.

    Args:
      vertical_field_of_view: in degrees (MuJoCo's `cam_fovy`).
      size: width and height in pixels.
    """
    focal = 0.5 * size / np.tan(np.deg2rad(vertical_field_of_view) / 2)
    centre = size / 2
    return np.array([[-focal, 0.0, centre], [0.0, focal, centre], [0.0, 0.0, 1.0]], np.float32)


def pose(position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Camera-to-world matrix float32 [4, 4] from MuJoCo's `cam_xpos` [3] and `cam_xmat` [3, 3]."""
    matrix = np.eye(4, dtype=np.float32)
    matrix[:3, :3] = rotation @ _OPENCV_FROM_MUJOCO
    matrix[:3, 3] = position
    return matrix


def read_cameras(model, data, names: tuple[str, ...], size: int) -> Camera:
    """The cameras of one frame; leaves float32 [V, 3, 3] and [V, 4, 4].

    Args:
      model: `mujoco.MjModel`.
      data: `mujoco.MjData`, kinematics up to date.
      names: of the cameras, one per view.
      size: image width and height in pixels.
    """
    ids = [model.camera(name).id for name in names]
    matrices = [intrinsics(model.cam_fovy[i], size) for i in ids]
    poses = [pose(data.cam_xpos[i], data.cam_xmat[i].reshape(3, 3)) for i in ids]
    return Camera(
        intrinsics=np.array(matrices, np.float32).reshape(-1, 3, 3),
        pose=np.array(poses, np.float32).reshape(-1, 4, 4),
    )


def outside_view(model, data, name: str) -> np.ndarray:
    """Which shapes a square picture of a camera cannot show, bool [ngeom]: their bounding spheres miss its pyramid.

    Args:
      model: `mujoco.MjModel`.
      data: `mujoco.MjData`, kinematics up to date.
      name: of the camera.
    """
    camera, radius = model.camera(name).id, model.geom_rbound
    half = np.deg2rad(model.cam_fovy[camera]) / 2
    centre = (data.geom_xpos - data.cam_xpos[camera]) @ data.cam_xmat[camera].reshape(3, 3)  # it looks along -z
    beyond = np.abs(centre[:, :2]) * np.cos(half) + centre[:, 2:] * np.sin(half)  # the nearest side plane, in metres
    return (radius > 0) & (beyond > radius[:, None]).any(axis=1)  # planes have no bounding sphere: radius 0
