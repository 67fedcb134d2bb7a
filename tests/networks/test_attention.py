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


@pytest.mark.parametrize(("queries", "masked"), [(24, False), (24, True), (64, False), (64, True), (68, False)])
def test_equals_the_formula_whole_and_in_blocks(queries, masked, monkeypatch):
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", 8)  # 64 queries without a mask: eight blocks
    generator = np.random.default_rng(0)
    query, key, value = (
        generator.normal(size=(2, n, h, 4)).astype(np.float32) for n, h in ((queries, 6), (9, 3), (9, 3))
    )
    mask = generator.random((2, 1, queries, 9)) < 0.7 if masked else None
    mask = mask | (np.arange(9) == 0) if masked else None  # nobody attends to nothing
    function = lambda *x: attention.dot_product_attention(*x, mask)
    text = str(jax.make_jaxpr(function)(query, key, value))
    assert ("scan" in text) == (queries == 64 and not masked)
    np.testing.assert_allclose(function(query, key, value), formula(query, key, value, mask), atol=1e-5)
