# SPDX-License-Identifier: Apache-2.0
"""The choice among guesses, against NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.simulator import SimulatorConfig
from worldenv_jax.simulator.blending import FIRST_GUESS, Blend

silu = lambda x: x / (1.0 + np.exp(-x))


def _convolve(x, layer):
    """3 x 3, padded by one, on [H, W, C]."""
    height, width = x.shape[:2]
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    taps = [padded[i : i + height, j : j + width] @ layer["kernel"][i, j] for i in range(3) for j in range(3)]
    return sum(taps) + layer["bias"]


def _inputs(key=0):
    rng = np.random.default_rng(key)
    return rng.normal(size=(2, 3, 2, 5)).astype(np.float32), rng.uniform(-1, 1, (2, 4, 12, 8, 3)).astype(np.float32)


def test_blend_equals_numpy():
    features, guesses = _inputs()
    model = Blend(6)
    leaves, tree = jax.tree.flatten(model.init(jax.random.key(0), features, guesses)["params"])
    rng = np.random.default_rng(1)
    params = jax.tree.unflatten(tree, [jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])
    with jax.default_matmul_precision("highest"):
        got = model.apply({"params": params}, features, guesses)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for n in range(2):
        pixels = np.concatenate(list(guesses[n].astype(np.float64)), axis=-1)
        coarse = (features[n] @ p["features"]["kernel"]).repeat(4, 0).repeat(4, 1)
        hidden = silu(_convolve(silu(_convolve(pixels, p["pixels"]) + coarse), p["hidden"]))
        logits = _convolve(hidden, p["shares"]) + np.array([FIRST_GUESS, 0, 0, 0])
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        expected = sum(shares[..., g : g + 1] * guesses[n, g] for g in range(4))
        np.testing.assert_allclose(got[n], expected, atol=2e-5)
        assert shares.std((0, 1)).min() > 0.01


def test_the_first_guess_stands_at_the_start():
    features, guesses = _inputs()
    got, _ = Blend(6).init_with_output(jax.random.key(0), features, guesses)
    first = np.exp(FIRST_GUESS) / (np.exp(FIRST_GUESS) + 3.0)
    np.testing.assert_allclose(got, first * guesses[:, 0] + (1 - first) / 3 * guesses[:, 1:].sum(1), atol=1e-6)


def test_choosing_needs_guesses():
    config = SimulatorConfig.libero_debug()
    with pytest.raises(ValueError, match="unet.blend_width needs plane_height and change_variance"):
        dataclasses.replace(config, change_variance=None)
