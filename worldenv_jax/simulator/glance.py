# SPDX-License-Identifier: Apache-2.0
"""What lies where the hand is, from the side: squares of a standing camera's photograph, and a network to look at them.

Differs from EVAC. The hand's camera looks from above at things of which the first frame shows little, so what it will
see cannot be copied. But which thing that is, and how it lies between the fingers, the photograph of the first frame
shows for as long as nothing has been moved: `arm_motion` foretells from it whether a grasp holds, and `compositing`,
which has seen these things from above in other episodes, draws what is held.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from worldenv_jax.simulator.action_maps import project
from worldenv_jax.simulator.reprojection import settle
from worldenv_jax.types import Array

CHANNELS = 6  # of a glance: a square around the hand, and one around the place below it
FEATURES = 48

GlanceFn = Callable[[Array], Array]  # positions float [B, K, 3], metres, to glances float32 [B, K, S, S, 6] in [-1, 1]


class Glance(nn.Module):
    """Glances [..., S, S, 6] to float32 [..., S / 8 * S / 8 * `FEATURES`].

    Patches of patches, not convolutions: XLA runs those many times slower inside of a scan on a CPU.
    """

    @nn.compact
    def __call__(self, glances: Array) -> Array:
        hidden = glances
        for name, size in (("patches", 4), ("cells", 2)):
            *batch, rows, columns, channels = hidden.shape
            hidden = hidden.reshape(*batch, rows // size, size, columns // size, size, channels)
            hidden = jnp.swapaxes(hidden, -3, -4).reshape(*batch, rows // size, columns // size, -1)
            hidden = nn.silu(nn.Dense(FEATURES, name=name)(hidden))
        return hidden.reshape(*glances.shape[:-3], -1)


def look_around(photographs: Array, intrinsics: Array, camera: Array, height: Array | float, size: int) -> GlanceFn:
    """Looks at hands in photographs uint8 [B, H, W, 3].

    Args:
        intrinsics, camera: float [B, 3, 3], in pixels, and [B, 4, 4], camera to world.
        height: of the place below the hand, metres.
        size: S, a multiple of 8.
    """

    def glance(positions: Array) -> Array:
        pair = jnp.stack([positions, positions.at[..., 2].set(height)], axis=2)
        pixels, _ = project(pair.reshape(len(pair), -1, 3), intrinsics, camera)
        squares = cut_squares(photographs, pixels, size) / 127.5 - 1.0
        squares = squares.reshape(*pair.shape[:3], *squares.shape[2:])
        return jnp.concatenate([squares[:, :, 0], squares[:, :, 1]], axis=-1)

    return glance


def cut_squares(images: Array, centres: Array, size: int) -> Array:
    """Squares of `size` pixels a side, between pixels interpolated; beyond the image its edge is repeated.

    Args:
        images: [B, H, W, C].
        centres: float [B, K, 2], x to the right and y down; the first pixel's centre is at 0.5, 0.5.

    Returns: float32 [B, K, size, size, C].
    """
    rows, columns = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (size, size), (size, size), (0, 0)), mode="edge")
    corners = jnp.clip(settle(centres) - size / 2, -size, jnp.array([columns, rows]) - 1.0)
    whole = jnp.floor(corners)
    part = corners - whole

    def cut(image: Array, whole: Array, part: Array) -> Array:
        start = whole[1] + size, whole[0] + size, jnp.int32(0)
        square = jax.lax.dynamic_slice(image, start, (size + 1, size + 1, image.shape[-1])).astype(jnp.float32)
        square = square[:-1] + part[1] * (square[1:] - square[:-1])
        return square[:, :-1] + part[0] * (square[:, 1:] - square[:, :-1])

    of_image = jax.vmap(cut, (None, 0, 0))
    return jax.vmap(of_image)(padded, whole.astype(jnp.int32), part)
