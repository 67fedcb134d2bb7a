# SPDX-License-Identifier: Apache-2.0
"""Pixels equal those of transformers' image processors to one level of 255."""

from dataclasses import replace

import numpy as np
import pytest

from worldenv_jax.networks.llama import LlamaConfig
from worldenv_jax.networks.vision_transformer import ViTConfig
from worldenv_jax.reflector.llava import CLIP_MEAN, CLIP_STD, LlavaConfig
from worldenv_jax.reflector.preprocess import preprocess

STRETCH = LlavaConfig(ViTConfig(56, 14, 8, 1, 1, 8), LlamaConfig(8, 8, 8, 1, 1, 1), 4, 4)
CROP = replace(STRETCH, center_crop=True, pixel_mean=CLIP_MEAN, pixel_std=CLIP_STD)


def smooth_image(height: int, width: int) -> np.ndarray:
    """Waves and one sharp square, uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([np.sin(x / 5.0), np.cos(y / 7.0), np.sin((x + y) / 3.0)], -1) * 127 + 128
    image[height // 4 : height // 2, width // 4 : width // 2] = (250, 5, 120)
    return image.astype(np.uint8)


def levels(pixels, config: LlavaConfig) -> np.ndarray:
    return np.asarray(pixels) * np.array(config.pixel_std) + np.array(config.pixel_mean)


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(64, 64), (256, 256), (80, 128), (40, 30)])
def test_clip_processor(shape):
    transformers = pytest.importorskip("transformers")
    image = smooth_image(*shape)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert np.abs(levels(preprocess(CROP, image), CROP) - levels(theirs, CROP)).max() <= 1.001 / 255


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(64, 64), (256, 256), (80, 128)])
def test_siglip_processor(shape):
    transformers = pytest.importorskip("transformers")
    image = smooth_image(*shape)
    processor = transformers.SiglipImageProcessorPil(size={"height": 56, "width": 56})
    theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert np.abs(levels(preprocess(STRETCH, image), STRETCH) - levels(theirs, STRETCH)).max() <= 1.001 / 255


def test_right_size_is_only_normalised():
    image = smooth_image(56, 56)
    np.testing.assert_allclose(preprocess(STRETCH, image), (image / 255.0 - 0.5) / 0.5, atol=1e-6)
