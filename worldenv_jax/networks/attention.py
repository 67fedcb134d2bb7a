# SPDX-License-Identifier: Apache-2.0
"""Scaled dot-product attention: cuDNN's fused kernel where that applies, XLA's elsewhere, plain products on a CPU."""

import jax
import jax.numpy as jnp

from worldenv_jax.types import Array

QUERIES_AT_ONCE = 256  # where there is no fused kernel, and eight times as many queries or more


def dot_product_attention(query: Array, key: Array, value: Array, mask: Array | None = None) -> Array:
    """softmax(q k^T / sqrt(head_dim)) v.

    Args:
        query: [B, N, heads, head_dim].
        key, value: [B, M, kv_heads, head_dim]; kv_heads divides heads (grouped-query attention).
        mask: bool, broadcastable to [B, heads, N, M], True where a query may attend; None: everywhere.

    Returns: [B, N, heads, head_dim].
    """
    length, fused = query.shape[1], _cudnn_applies(query, key, mask)
    if fused or length < 8 * QUERIES_AT_ONCE:
        return _attend(query, key, value, mask, fused)
    # The scores, [heads, N, M] in every row, are the largest arrays of a rollout: pixels of an image in the simulator,
    # tokens of a whole episode in the reflector.
    per_query = mask is not None and mask.shape[-2] == length
    blocks = (_query_blocks(query, 1), _query_blocks(mask, mask.ndim - 2) if per_query else None)
    attend = lambda block: _attend(block[0], key, value, block[1] if per_query else mask, fused)
    mixed = jnp.moveaxis(jax.lax.map(attend, blocks), 0, 1)
    return mixed.reshape(len(query), -1, *query.shape[2:])[:, :length]


def _query_blocks(x: Array, axis: int) -> Array:
    """The axis of queries in blocks, padded with zeros to whole ones; the blocks' axis is first."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % QUERIES_AT_ONCE)
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, QUERIES_AT_ONCE, *x.shape[axis + 1 :]), axis, 0)


def _attend(query: Array, key: Array, value: Array, mask: Array | None, fused: bool) -> Array:
    if jax.default_backend() == "cpu":
        return _heads_first(query, key, value, mask)
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn" if fused else None)


def _heads_first(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """The same with heads as a batch axis: XLA's CPU compiler runs these products several times faster."""
    repeats = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (key, value))
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    scores = jnp.einsum("bhnd,bhmd->bhnm", query, key, preferred_element_type=jnp.float32)
    scores *= query.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhnm,bhmd->bhnd", weights, value).swapaxes(1, 2)


def _cudnn_applies(query: Array, key: Array, mask: Array | None) -> bool:
    """cuDNN takes half precision, head sizes in eights up to 128 and, with a mask, even lengths."""
    if jax.default_backend() != "gpu" or query.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    lengths_fit = mask is None or (query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0)
    return query.shape[-1] % 8 == 0 and query.shape[-1] <= 128 and lengths_fit
