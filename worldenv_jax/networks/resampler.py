# SPDX-License-Identifier: Apache-2.0
"""Perceiver resampler: a fixed number of learned queries reads any number of tokens.

Source: Alayrac et al. 2022 (Flamingo), in the form of DynamiCrafter (Apache-2.0) that EVAC keeps for image tokens and
delta actions. There is no position encoding: the result does not depend on the order of the input tokens.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn

from worldenv_jax.networks.attention import dot_product_attention
from worldenv_jax.networks.lora import Dense
from worldenv_jax.types import Array


@dataclass(frozen=True)
class ResamplerConfig:
    """Sizes; the defaults are EVAC's action resampler."""

    queries: int = 16
    input_width: int = 14
    width: int = 1024
    output_width: int = 1024
    layers: int = 4
    heads: int = 12
    head_dim: int = 64
    mlp_ratio: int = 4
    dtype: str = "float32"


def _layer_norm(config: ResamplerConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(1e-5, dtype=config.dtype, use_fast_variance=False, name=name)


class _Layer(nn.Module):
    """latents + attention over [tokens, latents], then + feed-forward."""

    config: ResamplerConfig

    @nn.compact
    def __call__(self, latents: Array, tokens: Array) -> tuple[Array, None]:
        config = self.config
        latents = latents + self._attention(_layer_norm(config, "norm_tokens")(tokens), latents)
        hidden = _layer_norm(config, "norm_mlp")(latents)
        hidden = Dense(config.width * config.mlp_ratio, use_bias=False, dtype=config.dtype, name="fc1")(hidden)
        hidden = nn.gelu(hidden, approximate=False)
        return latents + Dense(config.width, use_bias=False, dtype=config.dtype, name="fc2")(hidden), None

    def _attention(self, tokens: Array, latents: Array) -> Array:
        config = self.config
        inner = config.heads * config.head_dim
        latents = _layer_norm(config, "norm_latents")(latents)
        query = Dense(inner, use_bias=False, dtype=config.dtype, name="to_q")(latents)
        source = jnp.concatenate([tokens, latents], axis=1)
        key_value = Dense(2 * inner, use_bias=False, dtype=config.dtype, name="to_kv")(source)
        key, value = jnp.split(key_value.reshape(*source.shape[:2], 2 * config.heads, -1), 2, axis=2)
        query = query.reshape(*latents.shape[:2], config.heads, -1)
        mixed = dot_product_attention(query, key, value)
        mixed = mixed.reshape(*latents.shape[:2], inner)
        return Dense(config.width, use_bias=False, dtype=config.dtype, name="to_out")(mixed)


class Resampler(nn.Module):
    """Tokens float [B, N, input_width] to float [B, queries, output_width]."""

    config: ResamplerConfig

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        config = self.config
        # DynamiCrafter's scale of the learned queries.
        scale = nn.initializers.normal(config.width**-0.5)
        queries = self.param("queries", scale, (config.queries, config.width)).astype(config.dtype)
        latents = jnp.broadcast_to(queries, (len(tokens), *queries.shape))
        tokens = Dense(config.width, dtype=config.dtype, name="proj_in")(tokens)
        layers = nn.scan(
            _Layer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.layers,
        )
        latents, _ = layers(config, name="layers")(latents, tokens)
        latents = Dense(config.output_width, dtype=config.dtype, name="proj_out")(latents)
        return _layer_norm(config, "norm_out")(latents)
