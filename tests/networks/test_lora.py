# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters: the layer against NumPy, merging, and PEFT's initialisation."""

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.networks.lora import Dense, init_lora, merge_lora, scale_lora


def test_dense_adds_the_scaled_adapter():
    rng = np.random.default_rng(0)
    x, kernel, bias = rng.standard_normal((3, 5)), rng.standard_normal((5, 4)), rng.standard_normal(4)
    a, b = rng.standard_normal((5, 2)), rng.standard_normal((2, 4))
    params = {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}
    lora = {"a": jnp.float32(a), "b": jnp.float32(b)}
    with jax.default_matmul_precision("highest"):
        plain = Dense(4).apply({"params": params}, jnp.float32(x))
        adapted = Dense(4).apply({"params": params, "lora": scale_lora(lora, 0.5)}, jnp.float32(x))
        merged = Dense(4).apply({"params": merge_lora(params, lora, 0.5)}, jnp.float32(x))
    np.testing.assert_allclose(plain, x @ kernel + bias, atol=1e-5)
    np.testing.assert_allclose(adapted, x @ kernel + bias + 0.5 * x @ a @ b, atol=1e-5)
    np.testing.assert_allclose(merged, adapted, atol=1e-5)


def test_init_covers_every_kernel_and_changes_nothing_at_first():
    params = {"blocks": {"fc": {"kernel": jnp.ones((3, 64, 32)), "bias": jnp.ones((3, 32))}}, "norm": {"scale": 1}}
    lora = init_lora(jax.random.key(0), params, rank=8)
    assert jax.tree.map(jnp.shape, lora) == {"blocks": {"fc": {"a": (3, 64, 8), "b": (3, 8, 32)}}}
    assert not lora["blocks"]["fc"]["b"].any()
    # PEFT's "gaussian": standard deviation 1 / rank. 1536 samples: 1.8 % standard error.
    np.testing.assert_allclose(lora["blocks"]["fc"]["a"].std(), 1 / 8, rtol=0.08)


def test_unmerge_is_merge_with_the_opposite_sign():
    kernel = jax.random.normal(jax.random.key(0), (2, 6, 4))
    adapter = {"a": jnp.full((2, 6, 2), 0.3), "b": jnp.full((2, 2, 4), 0.7)}
    merged = merge_lora({"fc": {"kernel": kernel}}, {"fc": adapter}, 0.5)
    np.testing.assert_allclose(merged["fc"]["kernel"], kernel + 0.5 * 2 * 0.3 * 0.7, atol=1e-6)
    np.testing.assert_allclose(merge_lora(merged, {"fc": adapter}, -0.5)["fc"]["kernel"], kernel, atol=1e-6)


def test_merge_keeps_the_dtype_of_the_kernel():
    params = {"fc": {"kernel": jnp.ones((4, 4), jnp.bfloat16)}}
    merged = merge_lora(params, init_lora(jax.random.key(0), params, 2), 1.0)
    assert merged["fc"]["kernel"].dtype == jnp.bfloat16
