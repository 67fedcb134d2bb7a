# SPDX-License-Identifier: Apache-2.0
"""The tabletop's one fixed third-person camera: a pinhole in front of the robot that looks down on the workspace.

OpenCV conventions: camera axes x right, y down, z forward; the centre of pixel (u, v) is at (u + 0.5, v + 0.5).
"""

import numpy as np

EYE = np.array([0.36, 0.0, 0.48])  # m
LOOK_AT = np.array([-0.005, 0.0, 0.035])  # m
FIELD_OF_VIEW = np.deg2rad(35.5)


def intrinsics(image_size: int) -> np.ndarray:
    """float32 [3, 3] in pixels of a square image."""
    focal = 0.5 * image_size / np.tan(0.5 * FIELD_OF_VIEW)
    centre = 0.5 * image_size
    return np.array([[focal, 0.0, centre], [0.0, focal, centre], [0.0, 0.0, 1.0]], np.float32)


def pose() -> np.ndarray:
    """float32 [4, 4], camera to world."""
    forward = (LOOK_AT - EYE) / np.linalg.norm(LOOK_AT - EYE)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    matrix[:3, 3] = EYE
    return matrix.astype(np.float32)


def rays(image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Origin float32 [3] and unit directions float32 [H * W, 3] through the pixel centres, in world axes."""
    pixels = (np.arange(image_size) + 0.5).astype(np.float64)
    u, v = np.meshgrid(pixels, pixels)
    points = np.stack([u, v, np.ones_like(u)], axis=-1).reshape(-1, 3)
    directions = points @ np.linalg.inv(intrinsics(image_size).astype(np.float64)).T @ pose()[:3, :3].T
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    return pose()[:3, 3], directions.astype(np.float32)
