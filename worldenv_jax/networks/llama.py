# SPDX-License-Identifier: Apache-2.0
"""The decoder of Llama-2 (Touvron et al. 2023) and Qwen2: RMSNorm, rotary positions, SwiGLU, grouped queries.

It fixes no attention pattern: the caller passes the mask (OpenVLA-OFT attends in both directions, RIPT-VLA has a
bidirectional prefix, LLaVA is causal) and the positions, so that padding may stand anywhere.

Parameters: `embed_tokens` [vocab, D], `layers` with a leading layer axis, `norm`, and `lm_head` (absent with tied
embeddings, and where `logits` is never called). Rotary halves are split as in the Hugging Face layout.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from worldenv_jax.mesh import constrain_batch
from worldenv_jax.networks.attention import dot_product_attention
from worldenv_jax.networks.lora import Dense
from worldenv_jax.types import Array

Cache = dict[str, Array]  # {"k", "v"}: [L, B, M, kv_heads, head_dim]


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the decoder."""

    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    max_positions: int = 2048
    rope_theta: float = 1e4
    rms_eps: float = 1e-6
    qkv_bias: bool = False  # Qwen2
    tie_embeddings: bool = False
    dtype: str = "float32"  # of activations
    remat: bool = False

    def __post_init__(self):
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"width {self.width} must be a multiple of heads {self.heads}, and heads of kv_heads {self.kv_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads


def init_cache(config: LlamaConfig, batch: int, length: int, dtype: str | None = None) -> Cache:
    """An empty static cache for `length` positions, in the activations' dtype unless another is named."""
    shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
    return {name: jnp.zeros(shape, dtype or config.dtype) for name in ("k", "v")}


class RMSNorm(nn.Module):
    """x / rms(x), computed in float32, times a learned weight."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return normed.astype(x.dtype) * scale.astype(x.dtype)


def rotary(x: Array, positions: Array, theta: float) -> Array:
    """Rotates the halves of each head of x [B, N, heads, head_dim] by the angles of `positions` [B, N]."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half], x[..., half:]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Block(nn.Module):
    """One decoder layer; the signature is that of an `nn.scan` body."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Array, cache: Cache | None, positions: Array, mask: Array | None, index: Array | int):
        x = constrain_batch(x)
        attended, cache = self._attention(self._norm("input_layernorm")(x), cache, positions, mask, index)
        x = constrain_batch(x + attended)
        return constrain_batch(x + self._mlp(self._norm("post_attention_layernorm")(x))), cache

    def _attention(self, x, cache, positions, mask, index):
        config = self.config
        q = self._dense("q_proj", config.width, config.qkv_bias)(x)
        k = self._dense("k_proj", config.kv_heads * config.head_dim, config.qkv_bias)(x)
        v = self._dense("v_proj", config.kv_heads * config.head_dim, config.qkv_bias)(x)
        q, k, v = (y.reshape(*x.shape[:2], -1, config.head_dim) for y in (q, k, v))
        q, k = rotary(q, positions, config.rope_theta), rotary(k, positions, config.rope_theta)
        if cache is not None:
            write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=1)
            cache = {"k": write(cache["k"], k), "v": write(cache["v"], v)}
            k, v = cache["k"].astype(q.dtype), cache["v"].astype(q.dtype)
        mixed = dot_product_attention(q, k, v, mask)
        return self._dense("o_proj", config.width)(mixed.reshape(x.shape)), cache

    def _mlp(self, x):
        gate = nn.silu(self._dense("gate_proj", self.config.mlp_width)(x))
        return self._dense("down_proj", self.config.width)(gate * self._dense("up_proj", self.config.mlp_width)(x))

    def _dense(self, name: str, features: int, use_bias: bool = False) -> Dense:
        return Dense(features, use_bias=use_bias, dtype=self.config.dtype, name=name)

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.config.rms_eps, name=name)


class Llama(nn.Module):
    """Embeddings and a mask in, hidden states out."""

    config: LlamaConfig

    def setup(self):
        config = self.config
        initializer = nn.initializers.normal(0.02)
        self.embed_tokens = self.param("embed_tokens", initializer, (config.vocab_size, config.width))
        block = nn.remat(Block, prevent_cse=False) if config.remat else Block
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=config.layers,
        )(config)
        self.norm = RMSNorm(config.rms_eps)
        if not config.tie_embeddings:
            self.lm_head = Dense(config.vocab_size, use_bias=False, dtype=config.dtype)

    def embed(self, tokens: Array) -> Array:
        """Token ids int32 [B, N] -> embeddings [B, N, D]."""
        return jnp.asarray(self.embed_tokens)[tokens].astype(self.config.dtype)

    def __call__(
        self,
        embeddings: Array,
        positions: Array,
        mask: Array | None,
        cache: Cache | None = None,
        cache_index: Array | int = 0,
    ) -> tuple[Array, Cache | None]:
        """Runs the decoder.

        Args:
            embeddings: [B, N, D].
            positions: int32 [B, N], of the rotary embedding.
            mask: bool [B, 1 | heads, N, M], True where a query may attend to a key; M = N without a cache, else
                the cache's length. None: everywhere.
            cache: keys and values of earlier calls; the new ones are written at slots cache_index : cache_index + N
                of every row, and attention runs over all M slots under the mask.

        Returns: hidden states [B, N, D] after the final RMSNorm, and the updated cache (None without one).
        """
        embeddings = embeddings.astype(self.config.dtype)
        hidden, cache = self.layers(embeddings, cache, positions, mask, cache_index)
        return self.norm(hidden), cache

    def logits(self, hidden: Array) -> Array:
        """Hidden states [B, N, D] -> vocabulary logits [B, N, vocab]."""
        if self.config.tie_embeddings:
            return hidden @ self.embed_tokens.T.astype(hidden.dtype)
        return self.lm_head(hidden)
