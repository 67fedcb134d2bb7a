# SPDX-License-Identifier: Apache-2.0
"""Attention against the formula in float64."""

import jax
import numpy as np
import pytest

from worldenv_jax.networks import attention


def formula(query, key, value, mask=None):
    key, value = (np.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    scores = np.einsum("bnhd,bmhd->bhnm", *(x.astype(np.float64) for x in (query, key))) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * (1.0 if mask is None else mask)
    return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize("queries", [24, 64, 68])
@pytest.mark.parametrize("masked", ["nothing", "keys", "pairs"])
def test_equals_the_formula_whole_and_in_blocks(queries, masked, monkeypatch):
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", 8)  # 64 queries and more: blocks of eight, the last one padded
    generator = np.random.default_rng(0)
    shapes = ((2, queries, 6, 4), (2, 9, 3, 4), (2, 9, 3, 4))
    query, key, value = (generator.normal(size=shape).astype(np.float32) for shape in shapes)
    shape = (2, 1, queries if masked == "pairs" else 1, 9)
    mask = None if masked == "nothing" else (generator.random(shape) < 0.7) | (np.arange(9) == 0)
    function = lambda *x: attention.dot_product_attention(*x, mask)
    assert ("scan" in str(jax.make_jaxpr(function)(query, key, value))) == (queries >= 64)
    np.testing.assert_allclose(function(query, key, value), formula(query, key, value, mask), atol=1e-5)
