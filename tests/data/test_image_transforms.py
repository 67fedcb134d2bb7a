# SPDX-License-Identifier: Apache-2.0
"""The image path: NumPy against JAX and jax.image, crops by hand, colour transforms against colorsys."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.data import image_transforms as transforms

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [16, 33, 64])
def test_lanczos_equals_jax_image(size):
    expected = jax.image.resize(jnp.float32(IMAGE), (size, size, 3), "lanczos3", antialias=True)
    np.testing.assert_allclose(transforms.resize_lanczos_float(IMAGE, size), expected, atol=1e-3)


def test_numpy_and_jax_agree_also_under_jit_and_with_leading_axes():
    batch = np.stack([IMAGE, IMAGE[::-1]])[:, None]
    for function in (lambda x: transforms.resize_lanczos(x, 24), transforms.center_crop):
        ours, theirs = function(batch), jax.jit(function)(batch)
        assert isinstance(ours, np.ndarray) and ours.dtype == np.uint8
        assert np.abs(ours.astype(int) - np.asarray(theirs, int)).max() <= 1
        np.testing.assert_array_equal(ours[0, 0], function(IMAGE))


def test_crop_by_hand():
    ramp = np.broadcast_to(np.arange(5, dtype=np.float32)[:, None, None], (5, 5, 3))
    # Rows 1 to 3 of 0..4, sampled at five corner-aligned places: 1, 1.5, 2, 2.5, 3.
    cropped = transforms.crop_and_resize(ramp, 0.25, 0.5)
    np.testing.assert_allclose(cropped[:, 2, 1], [1.0, 1.5, 2.0, 2.5, 3.0], atol=1e-6)
    np.testing.assert_allclose(transforms.crop_and_resize(ramp, 0.0, 1.0), ramp, atol=1e-6)


def test_uint8_conversions():
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(transforms.to_uint8(transforms.to_float(every)), every)
    assert transforms.to_uint8(np.float32([0.998]))[0] == 254  # floor(254.989)


def test_hue_and_saturation_equal_colorsys():
    image = transforms.to_float(IMAGE)
    draw = transforms.Augmentation(1.0, 0.0, 0.0, 1.0, saturation=0.7, hue=0.04)
    stages = transforms.augment_stages(image, draw)
    for pixel in (image[0, 0], image[3, 7], image[39, 20]):
        where = np.argwhere((image == pixel).all(-1))[0]
        h, s, v = colorsys.rgb_to_hsv(*map(float, pixel))
        saturated = colorsys.hsv_to_rgb(h, s * 0.7, v)
        np.testing.assert_allclose(stages["saturation"][tuple(where)], saturated, atol=1e-5)
        hued = colorsys.hsv_to_rgb((h + 0.04) % 1.0, s * 0.7, v)
        np.testing.assert_allclose(stages["hue"][tuple(where)], hued, atol=1e-5)


def test_grey_and_black_have_no_hue():
    grey = np.full((2, 2, 3), 0.4, np.float32)
    grey[0] = 0.0
    stages = transforms.augment_stages(grey, transforms.Augmentation(1.0, 0.0, 0.0, 1.0, 1.2, 0.05))
    np.testing.assert_allclose(stages["hue"], grey, atol=1e-6)


def test_draws_are_within_the_published_strengths():
    draws = jax.vmap(transforms.draw_augmentation)(jax.random.split(jax.random.key(0), 500))
    for values, low, high in (
        (draws.crop_offset, 0.0, 1.0 - 0.9**0.5),
        (draws.brightness, -0.2, 0.2),
        (draws.contrast, 0.8, 1.2),
        (draws.saturation, 0.8, 1.2),
        (draws.hue, -0.05, 0.05),
    ):
        assert low <= values.min() and values.max() <= high
        np.testing.assert_allclose(values.mean(), (low + high) / 2, atol=0.1 * (high - low))


def test_augment_draws_for_every_image():
    images = jnp.asarray(np.stack([IMAGE] * 4).reshape(2, 2, 40, 40, 3))
    augmented = jax.jit(transforms.augment)(jax.random.key(0), images)
    assert augmented.shape == images.shape and augmented.dtype == jnp.uint8
    flat = np.asarray(augmented).reshape(4, -1)
    assert len(np.unique(flat, axis=0)) == 4
