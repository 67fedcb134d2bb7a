# SPDX-License-Identifier: Apache-2.0
"""Random changes of camera images while policy and reflector are trained: few episodes are soon known by heart."""

import jax
import jax.numpy as jnp

from worldenv_jax.configs import AugmentationConfig
from worldenv_jax.types import Array


def augment(key: Array, images: Array, config: AugmentationConfig) -> Array:
    """Random shift, brightness and contrast per sample, the same for all of its pictures.

    Args:
      key: of the draws.
      images: uint8 [B, ..., H, W, 3]; B samples of any number of pictures (views, frames).
      config: how far; zeros leave the images as they are.

    Returns:
      uint8, of the same shape.
    """
    if config == AugmentationConfig():
        return images
    keys = jax.random.split(key, images.shape[0])

    def one(key: Array, pictures: Array) -> Array:
        shift_key, brightness_key, contrast_key = jax.random.split(key, 3)
        pad = config.shift
        padded = jnp.pad(pictures, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
        offset = jax.random.randint(shift_key, (2,), 0, 2 * pad + 1)
        shifted = jax.lax.dynamic_slice(padded, (0, offset[0], offset[1], 0), pictures.shape).astype(jnp.float32)
        brightness = jax.random.uniform(brightness_key, (), minval=-1.0, maxval=1.0) * config.brightness * 255.0
        contrast = 1.0 + jax.random.uniform(contrast_key, (), minval=-1.0, maxval=1.0) * config.contrast
        mean = shifted.mean((1, 2), keepdims=True)
        return jnp.clip(jnp.round((shifted - mean) * contrast + mean + brightness), 0.0, 255.0).astype(jnp.uint8)

    return jax.vmap(one)(keys, images.reshape(len(images), -1, *images.shape[-3:])).reshape(images.shape)
