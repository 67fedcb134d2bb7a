# SPDX-License-Identifier: Apache-2.0
"""Frames to the pixels that a vision tower reads, as the image processors of CLIP, SigLIP and LLaVA do it.

Bicubic resizing follows Pillow: the antialiased kernel is applied to the columns first, rounded to whole levels,
then to the rows and rounded again.
"""

import jax
import jax.numpy as jnp

from worldenv_jax.reflector.llava import LlavaConfig
from worldenv_jax.types import Array


def preprocess(config: LlavaConfig, frames: Array) -> Array:
    """uint8 [..., H, W, 3] -> float32 [..., S, S, 3], S = config.vision.image_size, normalised per channel."""
    size = config.vision.image_size
    height, width = frames.shape[-3:-1]
    if config.center_crop:
        # The longer side is rounded down, as in `get_resize_output_image_size` of transformers.
        short = min(height, width)
        frames = _resize(frames, height * size // short, width * size // short)
        top, left = (frames.shape[-3] - size) // 2, (frames.shape[-2] - size) // 2
        frames = frames[..., top : top + size, left : left + size, :]
    else:
        frames = _resize(frames, size, size)
    pixels = frames.astype(jnp.float32) / 255.0
    return (pixels - jnp.array(config.pixel_mean)) / jnp.array(config.pixel_std)


def _resize(frames: Array, height: int, width: int) -> Array:
    """Bicubic, to whole levels in [0, 255]; the same array where the size is already right."""
    for axis, size in ((-2, width), (-3, height)):
        shape = list(frames.shape)
        if shape[axis] != size:
            shape[axis] = size
            resized = jax.image.resize(frames.astype(jnp.float32), shape, "cubic")
            frames = jnp.clip(jnp.round(resized), 0.0, 255.0)
    return frames
