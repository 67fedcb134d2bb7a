# SPDX-License-Identifier: Apache-2.0
"""OpenVLA-OFT's image path without TensorFlow: Lanczos resize, centre crop, normalisation, augmentation.

At evaluation: camera frame, JPEG round trip (`data/image_codec.py`), `resize_lanczos` to 224, `center_crop`, then
`normalize` once per vision tower. In training: `resize_lanczos`, `augment`, `normalize`.

Every function takes NumPy or JAX arrays and returns the same kind, so that one implementation serves data workers
and jitted programs. Images are [..., H, W, 3], uint8 or float32 in [0, 1] as stated. Sources: moojink/openvla-oft,
moojink/dlimp_openvla; the TensorFlow kernels they call.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.types import Array

CROP_AREA = 0.9  # of the image, at evaluation and in training


class Augmentation(NamedTuple):
    """One draw of the training augmentation; every field is a scalar."""

    crop_area: Array | float  # area of the square crop, as a fraction
    crop_offset: Array | float  # of its top and left edge, as a fraction of the side
    brightness: Array | float  # added
    contrast: Array | float  # factor about the mean of each channel
    saturation: Array | float  # factor
    hue: Array | float  # added, in turns


def to_float(image: Array) -> Array:
    """uint8 -> float32 in [0, 1]."""
    return image.astype(np.float32) * np.float32(1.0 / 255.0)


def to_uint8(image: Array) -> Array:
    """float32 in [0, 1] -> uint8, floor(255.5 x), as `tf.image.convert_image_dtype` does."""
    return (image * 255.5).astype(np.uint8)


def resize_lanczos_float(image: Array, size: int) -> Array:
    """Lanczos-3 resize with antialiasing to [..., size, size, 3], float32 on the input's scale, not clipped."""
    rows, columns = (_lanczos_weights(length, size) for length in image.shape[-3:-1])
    return _resample(image.astype(np.float32), rows, columns)


def resize_lanczos(image: Array, size: int) -> Array:
    """uint8 -> uint8 [..., size, size, 3]; equals `tf.image.resize(..., "lanczos3", antialias=True)`, rounded."""
    return image.__array_namespace__().round(resize_lanczos_float(image, size)).clip(0.0, 255.0).astype(np.uint8)


def crop_and_resize(image: Array, top_left: Array | float, side: Array | float) -> Array:
    """A square crop, resampled bilinearly (corner-aligned) to the size of the image.

    Args:
        image: float32.
        top_left: of the crop's top and left edge, as a fraction of the image's side.
        side: of the crop, as a fraction.
    """
    xp = image.__array_namespace__()
    rows, columns = (_bilinear_weights(xp, length, top_left, side) for length in image.shape[-3:-1])
    return _resample(image, rows, columns)


def center_crop_float(image: Array) -> Array:
    """float32 in [0, 1]: the central 90 % of the area, resampled to the same size."""
    side = math.sqrt(CROP_AREA)
    return crop_and_resize(image, (1.0 - side) / 2.0, side).clip(0.0, 1.0)


def center_crop(image: Array) -> Array:
    """uint8: the central 90 % of the area, resampled to the same size."""
    return to_uint8(center_crop_float(to_float(image)))


def normalize(image: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """uint8 -> float32, (x / 255 - mean) / std per channel."""
    return (to_float(image) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def augment_stages(image: Array, draw: Augmentation) -> dict[str, Array]:
    """The image, float32 in [0, 1], after each step of the training augmentation, in order.

    Args:
        image: float32 [H, W, 3] in [0, 1].
        draw: the strengths.
    """
    side = draw.crop_area**0.5
    stages = {"crop": crop_and_resize(image, draw.crop_offset, side).clip(0.0, 1.0)}
    stages["brightness"] = (stages["crop"] + draw.brightness).clip(0.0, 1.0)
    mean = stages["brightness"].mean(axis=(-3, -2), keepdims=True)
    stages["contrast"] = ((stages["brightness"] - mean) * draw.contrast + mean).clip(0.0, 1.0)
    hue, saturation, value = _rgb_to_hsv(stages["contrast"])
    saturated = _hsv_to_rgb(hue, (saturation * draw.saturation).clip(0.0, 1.0), value)
    stages["saturation"] = saturated.clip(0.0, 1.0)
    hue, saturation, value = _rgb_to_hsv(stages["saturation"])
    stages["hue"] = _hsv_to_rgb((hue + draw.hue) % 1.0, saturation, value).clip(0.0, 1.0)
    return stages


def draw_augmentation(key: Array) -> Augmentation:
    """OpenVLA-OFT's strengths: crop 90 % of the area, brightness ±.2, contrast and saturation ±20 %, hue ±.05.

    One offset serves height and width (the reference draws both from one seed), so crops slide along the diagonal.
    """
    keys = jax.random.split(key, 5)
    uniform = lambda i, low, high: jax.random.uniform(keys[i], minval=low, maxval=high)
    return Augmentation(
        crop_area=CROP_AREA,
        crop_offset=uniform(0, 0.0, 1.0 - math.sqrt(CROP_AREA)),
        brightness=uniform(1, -0.2, 0.2),
        contrast=uniform(2, 0.8, 1.2),
        saturation=uniform(3, 0.8, 1.2),
        hue=uniform(4, -0.05, 0.05),
    )


def augment(key: Array, images: Array) -> Array:
    """uint8 [..., H, W, 3] -> uint8: a draw of its own for every image. JAX only."""
    one = lambda key, image: to_uint8(augment_stages(to_float(image), draw_augmentation(key))["hue"])
    flat = images.reshape(-1, *images.shape[-3:])
    return jax.vmap(one)(jax.random.split(key, len(flat)), jnp.asarray(flat)).reshape(images.shape)


def _resample(image: Array, rows: Array, columns: Array) -> Array:
    """Separable resampling with weight matrices [out, in] of both axes."""
    xp = image.__array_namespace__()
    height = xp.einsum("oh,...hwc->...owc", rows, image, optimize=True)
    return xp.einsum("pw,...owc->...opc", columns, height, optimize=True)


@functools.cache
def _lanczos_weights(length: int, size: int) -> np.ndarray:
    """Weights [size, length] of the Lanczos-3 kernel, in float32 as TensorFlow computes them."""
    scale = np.float32(length / size)
    centre = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    distance = np.abs(centre[:, None] - np.arange(length, dtype=np.float32)) / np.maximum(scale, np.float32(1.0))
    safe = np.pi * np.maximum(distance, np.float32(1e-6)).astype(np.float32)
    kernel = np.where(distance > 1e-3, 3.0 * np.sin(safe) * np.sin(safe / 3.0) / safe**2, 1.0)
    kernel = np.where(distance < 3.0, kernel, 0.0).astype(np.float32)
    return kernel / kernel.sum(axis=1, keepdims=True)


def _bilinear_weights(xp, length: int, start: Array | float, side: Array | float) -> Array:
    """Weights [length, length] of a corner-aligned bilinear crop."""
    pixels = np.arange(length, dtype=np.float32)
    source = start * (length - 1) + pixels * side
    return (1.0 - xp.abs(source[:, None] - pixels)).clip(0.0, 1.0)


def _rgb_to_hsv(image: Array) -> tuple[Array, Array, Array]:
    """Hue in turns, saturation, value."""
    xp = image.__array_namespace__()
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value, low = image.max(axis=-1), image.min(axis=-1)
    chroma = value - low
    safe = xp.where(chroma > 0, chroma, 1.0)
    hue = xp.where(
        value == red,
        (green - blue) / safe,
        xp.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    hue = xp.where(chroma > 0, hue / 6.0, 0.0) % 1.0
    saturation = xp.where(value > 0, chroma / xp.where(value > 0, value, 1.0), 0.0)
    return hue, saturation, value


def _hsv_to_rgb(hue: Array, saturation: Array, value: Array) -> Array:
    """The inverse of `_rgb_to_hsv`, for hue in [0, 1)."""
    xp = hue.__array_namespace__()
    hue = hue * 6.0
    ramps = [xp.abs(hue - 3.0) - 1.0, 2.0 - xp.abs(hue - 2.0), 2.0 - xp.abs(hue - 4.0)]
    rgb = xp.stack(ramps, axis=-1).clip(0.0, 1.0)
    return ((rgb - 1.0) * saturation[..., None] + 1.0) * value[..., None]
