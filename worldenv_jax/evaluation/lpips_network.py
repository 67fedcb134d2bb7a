# SPDX-License-Identifier: Apache-2.0
"""LPIPS (Zhang et al., CVPR 2018, version 0.1 with AlexNet) as a function, for weights that the user has.

Distance of two images: after each of AlexNet's five activations, both feature maps are brought to unit length per
pixel, and the squared differences are weighted per channel, averaged over pixels and summed over the five.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.errors import WorldEnvError
from worldenv_jax.types import Array
from worldenv_jax.weights.torch_files import load_torch_file

# (index in torchvision's `features`, output and input channels, kernel, stride, padding, max pooling in front)
LAYERS = ((0, 64, 3, 11, 4, 2, False), (3, 192, 64, 5, 1, 2, True), (6, 384, 192, 3, 1, 1, True),
          (8, 256, 384, 3, 1, 1, False), (10, 256, 256, 3, 1, 1, False))  # fmt: skip
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]
MIN_SIZE = 31  # pixels: below, the last pooling has nothing to look at


def load_lpips(alexnet: str | Path, linear: str | Path) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The distance function with the weights of two local files; pass it to `video_quality.lpips`.

    Args:
      alexnet: torchvision's ImageNet AlexNet (`alexnet-owt-*.pth`).
      linear: the weights of the five channels' sums (`alex.pth` of the `lpips` package, version 0.1).

    Raises:
      WorldEnvError: a file cannot be read, or holds other tensors.
    """
    tensors: dict[str, np.ndarray] = {}
    for path in (alexnet, linear):
        try:
            tensors |= load_torch_file(Path(path))
        except (OSError, ValueError, TypeError) as error:
            raise WorldEnvError(f"cannot read LPIPS weights from {path}: {error}") from error
    return make_lpips(tensors)


def make_lpips(tensors: Mapping[str, np.ndarray]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The distance (uint8 [M, H, W, 3], same) -> float64 [M] from tensors under their published names.

    Raises:
      WorldEnvError: a tensor is missing or has another shape.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for number, (index, outputs, inputs, size, *_) in enumerate(LAYERS):
        expected[f"features.{index}.weight"] = (outputs, inputs, size, size)
        expected[f"features.{index}.bias"] = (outputs,)
        expected[f"lin{number}.model.1.weight"] = (1, outputs, 1, 1)
    shapes = {name: np.shape(tensors[name]) for name in expected if name in tensors}
    wrong = [f"{name} is {shapes.get(name, 'missing')}" for name in expected if shapes.get(name) != expected[name]]
    if wrong:
        raise WorldEnvError(f"these are not the weights of LPIPS with AlexNet: {'; '.join(wrong[:3])}")
    weights = {name: jnp.asarray(tensors[name], jnp.float32) for name in expected}

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if min(x.shape[1:3]) < MIN_SIZE:
            raise ValueError(f"LPIPS needs images of at least {MIN_SIZE} pixels, got {x.shape[1]} x {x.shape[2]}")
        return np.asarray(_distance(weights, x, y), np.float64)

    return distance


@jax.jit
def _distance(weights: dict[str, Array], x: Array, y: Array) -> Array:
    total = jnp.zeros(len(x))
    for number, (one, other) in enumerate(zip(_features(weights, x), _features(weights, y))):
        linear = weights[f"lin{number}.model.1.weight"].reshape(-1, 1, 1)
        total += (linear * jnp.square(one - other)).sum(1).mean((1, 2))
    return total


def _features(weights: dict[str, Array], images: Array) -> list[Array]:
    """Of images uint8 [M, H, W, 3]: five maps [M, C, h, w], of unit length over the channels."""
    x = images.astype(jnp.float32) / 127.5 - 1.0
    x = jnp.moveaxis((x - jnp.array(SHIFT)) / jnp.array(SCALE), -1, 1)
    maps = []
    for index, *_, stride, padding, pool in LAYERS:
        if pool:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 3, 3), (1, 1, 2, 2), "VALID")
        pads = ((padding, padding),) * 2
        x = jax.lax.conv_general_dilated(x, weights[f"features.{index}.weight"], (stride, stride), pads)
        x = jax.nn.relu(x + weights[f"features.{index}.bias"].reshape(-1, 1, 1))
        maps.append(x / (jnp.sqrt(jnp.square(x).sum(1, keepdims=True)) + 1e-10))
    return maps
