# SPDX-License-Identifier: Apache-2.0
"""Augmentation on images whose columns and brightness say what was done to them."""

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.configs import AugmentationConfig
from worldenv_jax.training.augmentation import augment


def test_shifts_by_whole_pixels_the_same_for_all_frames_and_views():
    row = np.arange(8, dtype=np.uint8)
    images = np.broadcast_to((10 * row)[None, None, None, :, None], (64, 3, 2, 8, 8, 3)).astype(np.uint8)
    moved = np.asarray(augment(jax.random.key(0), jnp.asarray(images), AugmentationConfig(shift=2)))
    np.testing.assert_array_equal(moved, np.broadcast_to(moved[:, :1, :1], moved.shape))
    offsets = {int(v) for v in moved[:, 0, 0, 4, 4, 0].astype(int) // 10 - 4}  # column 4 shows column 4 + offset
    assert offsets == {-2, -1, 0, 1, 2}
    assert moved.dtype == np.uint8


def test_brightness_stays_in_range():
    images = jnp.full((32, 1, 4, 4, 3), 250, jnp.uint8)
    bright = np.asarray(augment(jax.random.key(1), images, AugmentationConfig(brightness=0.2)))
    assert bright.max() == 255 and bright.min() >= 250 - 51 and len(np.unique(bright[:, 0, 0, 0, 0])) > 5
    np.testing.assert_array_equal(augment(jax.random.key(1), images, AugmentationConfig()), images)
