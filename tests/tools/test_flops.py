# SPDX-License-Identifier: Apache-2.0
"""Counted operations: by hand, and against XLA where nothing is scanned."""

import jax
import jax.numpy as jnp
import pytest

from tools.flops import count_flops


def test_dots_and_scans_by_hand():
    x, w = jnp.ones((3, 4)), jnp.ones((5, 4, 4))
    scanned = lambda x, w: jax.lax.scan(lambda h, layer: (h @ layer, None), x, w)[0]
    assert count_flops(scanned, x, w) == 5 * 2 * 3 * 4 * 4


def test_largest_branch_counts():
    x = jnp.ones((8, 8))
    branch = lambda x: jax.lax.cond(x.sum() > 0, lambda x: x @ x @ x, lambda x: x @ x, x)
    assert count_flops(branch, x) == 2 * 2 * 8**3


def test_convolution_by_hand():
    image, kernel = jnp.ones((2, 10, 12, 6)), jnp.ones((3, 3, 3, 8))
    convolve = lambda image, kernel: jax.lax.conv_general_dilated(
        image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )
    assert count_flops(convolve, image, kernel) == 2 * (2 * 5 * 6 * 8) * (3 * 3 * 3)


def test_agrees_with_xla_without_scans():
    # Elementwise operations, which XLA counts and we do not, are a small part of large products.
    x = jnp.ones((256, 256))
    chain = lambda x: jnp.tanh(x @ x) @ x
    compiled = jax.jit(chain).lower(x).compile()
    assert count_flops(chain, x) == pytest.approx(compiled.cost_analysis()["flops"], rel=0.01)


def test_abstract_arguments():
    huge = jax.ShapeDtypeStruct((10**6, 10**6), jnp.bfloat16)
    assert count_flops(jnp.matmul, huge, huge) == 2 * 10**18
