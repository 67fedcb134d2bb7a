# SPDX-License-Identifier: Apache-2.0
"""Images for the CLIP tower: bicubic resize with corners aligned, as kornia (Apache-2.0) does it, then CLIP's
mean and standard deviation.
"""

import jax.numpy as jnp
import numpy as np

from worldenv_jax.types import Array

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_preprocess(images: Array, size: int) -> Array:
    """Images float [N, H, W, 3] in [-1, 1] to normalised images float32 [N, size, size, 3].

    The aspect ratio is not kept. Shrinking blurs first with a Gaussian of sigma (factor - 1) / 2.
    """
    height, width = images.shape[1:3]
    if (height, width) != (size, size):
        rows, columns = (jnp.asarray(_resize_matrix(n, size, max(height, width) > size)) for n in (height, width))
        images = jnp.einsum("ph,nhwc,qw->npqc", rows, images, columns)
    mean, std = jnp.array(CLIP_MEAN), jnp.array(CLIP_STD)
    return ((images + 1.0) / 2.0 - mean) / std


def _resize_matrix(source: int, size: int, blur: bool) -> np.ndarray:
    """float32 [size, source]: one axis of the blur and of the interpolation."""
    matrix = _bicubic_matrix(source, size)
    return (matrix @ _blur_matrix(source, source / size) if blur else matrix).astype(np.float32)


def _bicubic_matrix(source: int, size: int) -> np.ndarray:
    """Cubic convolution with a = -0.75, corners aligned, border pixels repeated."""
    position = np.arange(size) * (source - 1) / (size - 1)
    first = np.floor(position).astype(int)
    matrix = np.zeros((size, source))
    for offset in (-1, 0, 1, 2):
        weight = _cubic(np.abs(position - first - offset), -0.75)
        np.add.at(matrix, (np.arange(size), np.clip(first + offset, 0, source - 1)), weight)
    return matrix


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _blur_matrix(source: int, factor: float) -> np.ndarray:
    """Gaussian blur along one axis with a reflected border."""
    sigma = max((factor - 1.0) / 2.0, 0.001)
    length = int(max(4.0 * sigma, 3))
    length += 1 - length % 2
    taps = np.exp(-0.5 * ((np.arange(length) - length // 2) / sigma) ** 2)
    taps /= taps.sum()
    matrix = np.zeros((source, source))
    for i, tap in enumerate(taps):
        at = np.abs(np.arange(source) + i - length // 2)
        np.add.at(matrix, (np.arange(source), np.where(at >= source, 2 * (source - 1) - at, at)), tap)
    return matrix
