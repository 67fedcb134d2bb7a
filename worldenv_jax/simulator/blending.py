# SPDX-License-Identifier: Apache-2.0
"""Which of several guesses at a frame to believe, pixel by pixel (as in Finn et al. 2016, arXiv 1605.07157).

Differs from EVAC, which draws every frame anew. What is copied stays sharp, over many chunks, too.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from worldenv_jax.simulator.layers import conv3x3
from worldenv_jax.types import Array

FIRST_GUESS = 4.0  # logit of the first guess at the start, beside zeros


class Blend(nn.Module):
    """A mean of the guesses in every pixel; three convolutions see their edges, the U-Net's features say what moves."""

    width: int

    @nn.compact
    def __call__(self, features: Array, guesses: Array) -> Array:
        """Features float [N, h, w, F] and guesses float [N, G, H, W, 3] to frames float32 [N, H, W, 3]."""
        count, number, height, width, colours = guesses.shape
        pixels = jnp.moveaxis(guesses, 1, -2).reshape(count, height, width, number * colours)
        hidden = conv3x3(self.width, "float32", "pixels")(pixels)
        coarse = nn.Dense(self.width, use_bias=False, name="features")(features)
        rows, columns = features.shape[1:3]
        shape = (count, rows, height // rows, columns, width // columns, self.width)
        coarse = jnp.broadcast_to(coarse[:, :, None, :, None], shape).reshape(hidden.shape)
        hidden = conv3x3(self.width, "float32", "hidden")(nn.silu(hidden + coarse))
        logits = conv3x3(number, "float32", "shares", zero=True)(nn.silu(hidden))
        shares = jax.nn.softmax(logits.at[..., 0].add(FIRST_GUESS))
        return jnp.einsum("nhwg,nghwc->nhwc", shares, guesses)
