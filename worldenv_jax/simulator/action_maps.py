# SPDX-License-Identifier: Apache-2.0
"""Conditioning images: action maps (where the hand will be, on the image plane) and ray maps (where pixels look).

Sources: World-Env section 1.2 (projected pose on black), EVAC (a disc coloured by the gripper, three axes of the tool
frame; ray direction and origin at latent resolution). Action maps are drawn on the device; EVAC's own pictures
are in `evac_pictures`. The geometry takes JAX arrays, or NumPy arrays in float64.
"""

import functools
from dataclasses import dataclass

import jax.numpy as jnp
import matplotlib
import numpy as np

from worldenv_jax.types import Array

# Colours of the x, y and z axes of the first arm, and of the second.
AXIS_COLOURS = (((0, 0, 255), (255, 255, 0), (0, 255, 255)), ((255, 0, 255), (255, 0, 0), (0, 255, 0)))
GRIPPER_COLOURS = ("Greens", "Reds")


@dataclass(frozen=True)
class ActionMapConfig:
    """Lengths in metres and pixels; the defaults are EVAC's, for images of 320 x 512 px."""

    tool_offset: float = 0.23  # from the recorded frame to the gripper, along its z axis
    axis_length: float = 0.1
    radius: float = 50
    thickness: float = 8
    background: int = 50  # grey level; World-Env: 0


def tool_points(rotation: Array, position: Array, config: ActionMapConfig) -> Array:
    """Origin and axis tips of the tool frame in the world: [..., 3, 3] and [..., 3] to [..., 4, 3]."""
    xp = position.__array_namespace__()
    origin = position + rotation[..., 2] * config.tool_offset
    tips = origin[..., None, :] + xp.swapaxes(rotation, -1, -2) * config.axis_length
    return xp.concatenate([origin[..., None, :], tips], axis=-2)


def project(points: Array, intrinsics: Array, camera_to_world: Array) -> tuple[Array, Array]:
    """World points [..., P, 3] to pixels [..., P, 2] and depths [..., P] of cameras [..., 3, 3], [..., 4, 4]."""
    xp = points.__array_namespace__()
    offset = points - camera_to_world[..., None, :3, 3]
    local = xp.einsum("...pi,...ij->...pj", offset, camera_to_world[..., :3, :3])
    depth = local[..., 2]
    pixels = xp.einsum("...ij,...pj->...pi", intrinsics[..., :2, :], local)
    safe = xp.where(xp.abs(depth) < 1e-6, 1e-6, depth)
    return pixels / safe[..., None], depth


def gripper_colour(opening: Array, arm: int) -> Array:
    """Opening in [0, 1] (clipped) to RGB in 0..255, int32 [..., 3]: matplotlib's map of 256 colours."""
    table = jnp.asarray(colour_table(GRIPPER_COLOURS[arm]))
    return table[jnp.clip((opening * 256).astype(jnp.int32), 0, 255)]


@functools.cache
def colour_table(name: str) -> np.ndarray:
    """A matplotlib map as int32 [256, 3] in 0..255."""
    colours = matplotlib.colormaps[name](np.arange(256))[:, :3]
    return (255 * colours).astype(np.int32)


def draw_action_map(
    pixels: Array, depth: Array, opening: Array, config: ActionMapConfig, height: int, width: int
) -> Array:
    """Draws one arm with anti-aliased edges, so that small images keep fractions of a pixel.

    Differs from EVAC: its pictures (`evac_pictures`) have hard edges.

    Args:
        pixels: float [..., 4, 2], origin and axis tips, x to the right and y down.
        depth: float [..., 4]; an origin behind the camera or outside the image is not drawn.
        opening: float [...], of the gripper, in [0, 1].
    Returns: float32 [..., height, width, 3] in [0, 1].
    """
    y, x = jnp.mgrid[:height, :width].astype(jnp.float32)
    at = lambda i: pixels[..., i, :][..., None, None, :]
    base = at(0)
    inside = (pixels[..., 0, :] >= 0).all(-1) & (pixels[..., 0, 0] < width) & (pixels[..., 0, 1] < height)
    shown = (inside & (depth[..., 0] > 0))[..., None, None]
    distance = jnp.hypot(x - base[..., 0], y - base[..., 1])
    canvas = jnp.full((*distance.shape, 3), config.background / 255.0)

    def paint(canvas, distance, reach, colour):
        cover = (jnp.clip(reach + 0.5 - distance, 0.0, 1.0) * shown)[..., None]
        return canvas + cover * (colour / 255.0 - canvas)

    canvas = paint(canvas, distance, config.radius, gripper_colour(opening, 0)[..., None, None, :])
    for axis in range(3):
        direction = at(axis + 1) - base
        length = jnp.maximum(jnp.sum(direction**2, axis=-1), 1e-6)
        along = ((x - base[..., 0]) * direction[..., 0] + (y - base[..., 1]) * direction[..., 1]) / length
        along = jnp.clip(along, 0.0, 1.0)
        gap_x = x - base[..., 0] - along * direction[..., 0]
        gap_y = y - base[..., 1] - along * direction[..., 1]
        colour = jnp.asarray(AXIS_COLOURS[0][axis], jnp.float32)
        canvas = paint(canvas, jnp.hypot(gap_x, gap_y), config.thickness / 2, colour)
    return canvas


def ray_maps(intrinsics: Array, camera_to_world: Array, height: int, width: int) -> Array:
    """Unit direction and origin of every pixel's ray in the world, through pixel centres.

    Args:
        intrinsics: float [..., 3, 3] of images of height x width pixels (latent pixels).
        camera_to_world: float [..., 4, 4].
    Returns: float [..., height, width, 6].
    """
    xp = intrinsics.__array_namespace__()
    y, x = xp.mgrid[:height, :width].astype(intrinsics.dtype) + 0.5
    fx, fy, cx, cy = (intrinsics[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    direction = xp.stack(xp.broadcast_arrays((x - cx) / fx, (y - cy) / fy, xp.ones_like(x)), axis=-1)
    direction = xp.einsum("...ij,...hwj->...hwi", camera_to_world[..., :3, :3], direction)
    direction = direction / xp.linalg.norm(direction, axis=-1, keepdims=True)
    origin = xp.broadcast_to(camera_to_world[..., None, None, :3, 3], direction.shape)
    return xp.concatenate([direction, origin], axis=-1)


def scale_intrinsics(intrinsics: Array, height: float, width: float) -> Array:
    """Intrinsics of the image resized by the factors `height` and `width`."""
    xp = intrinsics.__array_namespace__()
    return intrinsics * xp.array([[width], [height], [1.0]], intrinsics.dtype)
