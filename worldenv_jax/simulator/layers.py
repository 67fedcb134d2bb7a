# SPDX-License-Identifier: Apache-2.0
"""Blocks of the autoencoder and of the video U-Net, channels last.

Sources: Rombach et al. 2022 (latent diffusion), DynamiCrafter (Apache-2.0). Norms and softmax run in float32.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from worldenv_jax.networks.attention import dot_product_attention
from worldenv_jax.types import Array


class GroupNorm(nn.Module):
    """Normalises over the channels of a group and over all axes but the first `lead`; channels are last.

    The variance is taken around the mean in a second pass: nearly flat images (action maps) lose it otherwise.
    """

    groups: int
    eps: float
    lead: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        # Pixels first, then the few channels of a group: four times as fast on a CPU as both at once.
        flat = x.astype(jnp.float32).reshape(math.prod(x.shape[: self.lead]), -1, channels)
        centred = flat - self._group_mean(flat)
        variance = self._group_mean(jnp.square(centred))
        normed = (centred * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
        return (normed * scale + bias).astype(self.dtype)

    def _group_mean(self, x: Array) -> Array:
        """[N, M, C] to the mean of each group, [N, 1, C]."""
        mean = x.mean(1).reshape(len(x), self.groups, -1).mean(-1, keepdims=True)
        return jnp.repeat(mean, x.shape[-1] // self.groups, axis=-1).reshape(len(x), 1, -1)


def conv3x3(features: int, dtype: str, name: str | None = None, stride: int = 1, zero: bool = False) -> nn.Conv:
    """3x3 convolution padded by one pixel; `zero` starts it at zero (the last layer of a residual branch)."""
    init = nn.initializers.zeros if zero else nn.initializers.lecun_normal()
    return nn.Conv(features, (3, 3), stride, ((1, 1), (1, 1)), dtype=dtype, kernel_init=init, name=name)


def upsample(x: Array) -> Array:
    """Nearest-neighbour doubling of [N, h, w, C]."""
    n, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (n, height, 2, width, 2, channels))
    return x.reshape(n, 2 * height, 2 * width, channels)


class TimestepEmbedding(nn.Module):
    """Integers [...] to [..., features]: sinusoids (cosines first), Dense, SiLU, Dense."""

    frequencies: int
    features: int
    dtype: str

    @nn.compact
    def __call__(self, t: Array) -> Array:
        half = self.frequencies // 2
        angles = t[..., None].astype(jnp.float32) * jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / half)
        x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        x = nn.silu(nn.Dense(self.features, dtype=self.dtype, name="fc1")(x))
        return nn.Dense(self.features, dtype=self.dtype, name="fc2")(x)


class CausalTemporalConv(nn.Module):
    """Convolution of length 3 over frames of [N, T, h, w, C]; frame t sees t - 2, t - 1 and t.

    The first frame is repeated in front.
    """

    dtype: str
    zero: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        frames, channels = x.shape[1], x.shape[-1]
        init = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (3, channels, channels)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,)).astype(self.dtype)
        padded = jnp.concatenate([x[:, :1], x[:, :1], x], axis=1)
        # One product over taps and channels: with few channels its gradient is three times as fast as three products.
        taps = jnp.concatenate([padded[:, k : k + frames] for k in range(3)], axis=-1)
        return taps @ kernel.reshape(-1, channels) + bias


class ResBlock(nn.Module):
    """Spatial residual block with a per-frame embedding, followed by four causal temporal convolutions.

    x [N, T, h, w, C] and SiLU of the embedding [N, T, E] to [N, T, h, w, features].
    """

    features: int
    groups: int
    dtype: str

    @nn.compact
    def __call__(self, x: Array, embedding: Array) -> Array:
        lead, dtype = x.shape[:2], self.dtype
        shift = nn.Dense(self.features, dtype=dtype, name="embedding")(embedding)
        x = x.reshape(-1, *x.shape[2:])
        hidden = nn.silu(GroupNorm(self.groups, 1e-5, 1, dtype, name="norm1")(x))
        hidden = conv3x3(self.features, dtype, "conv1")(hidden) + shift.reshape(-1, 1, 1, self.features)
        hidden = nn.silu(GroupNorm(self.groups, 1e-5, 1, dtype, name="norm2")(hidden))
        hidden = conv3x3(self.features, dtype, "conv2", zero=True)(hidden)
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, dtype=dtype, name="skip")(x)
        x = (x + hidden).reshape(*lead, *hidden.shape[1:])
        hidden = x
        for i in range(4):
            hidden = nn.silu(GroupNorm(self.groups, 1e-5, 1, dtype, name=f"temporal_norm{i + 1}")(hidden))
            hidden = CausalTemporalConv(dtype, zero=i == 3, name=f"temporal_conv{i + 1}")(hidden)
        return x + hidden


class Attention(nn.Module):
    """Multi-head attention without query, key and value biases.

    `keys_values` can be computed apart from the queries, once for many denoising steps; `zero` starts the output at
    zero.
    """

    width: int
    heads: int
    dtype: str
    zero: bool = False

    def setup(self):
        self.to_q = nn.Dense(self.width, use_bias=False, dtype=self.dtype)
        self.to_k = nn.Dense(self.width, use_bias=False, dtype=self.dtype)
        self.to_v = nn.Dense(self.width, use_bias=False, dtype=self.dtype)
        init = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        self.to_out = nn.Dense(self.width, dtype=self.dtype, kernel_init=init)

    def keys_values(self, tokens: Array) -> tuple[Array, Array]:
        """Tokens [B, M, D] to keys and values [B, M, heads, head_dim]."""
        shape = (*tokens.shape[:2], self.heads, -1)
        return self.to_k(tokens).reshape(shape), self.to_v(tokens).reshape(shape)

    def __call__(self, x: Array, keys_values: tuple[Array, Array] | None = None) -> Array:
        """x [B, N, width]; attends to itself where no keys and values are given."""
        query = self.to_q(x).reshape(*x.shape[:2], self.heads, -1)
        key, value = self.keys_values(x) if keys_values is None else keys_values
        return self.to_out(dot_product_attention(query, key, value).reshape(x.shape))


class TransformerBlock(nn.Module):
    """Self-attention, a second attention (to context, or to itself), and a GEGLU feed-forward, each residual."""

    width: int
    heads: int
    dtype: str

    def setup(self):
        norm = lambda: nn.LayerNorm(1e-5, dtype=self.dtype, use_fast_variance=False)
        self.norm1, self.norm2, self.norm3 = norm(), norm(), norm()
        self.attention1 = Attention(self.width, self.heads, self.dtype)
        self.attention2 = Attention(self.width, self.heads, self.dtype)
        self.fc1 = nn.Dense(8 * self.width, dtype=self.dtype)
        self.fc2 = nn.Dense(self.width, dtype=self.dtype)

    def first(self, x: Array) -> Array:
        """x [B, N, width] after self-attention."""
        return x + self.attention1(self.norm1(x))

    def second(self, x: Array, keys_values: tuple[Array, Array] | None = None) -> Array:
        """x [B, N, width] after the second attention and the feed-forward."""
        x = x + self.attention2(self.norm2(x), keys_values)
        hidden, gate = jnp.split(self.fc1(self.norm3(x)), 2, axis=-1)
        return x + self.fc2(hidden * nn.gelu(gate, approximate=False))


class SpatialTransformer(nn.Module):
    """Attention within a frame, over all views side by side, and from there to the context tokens.

    x [B, V, T, h, w, C]; the context's keys and values [B, M, heads, head_dim] are shared by all frames.
    """

    width: int
    heads: int
    groups: int
    dtype: str

    def setup(self):
        self.norm = GroupNorm(self.groups, 1e-6, 2, self.dtype)
        self.proj_in = nn.Dense(self.width, dtype=self.dtype)
        self.block = TransformerBlock(self.width, self.heads, self.dtype)
        self.proj_out = nn.Dense(self.width, dtype=self.dtype, kernel_init=nn.initializers.zeros)

    def keys_values(self, tokens: Array) -> tuple[Array, Array]:
        """Context tokens [B, M, D] to the keys and values of the second attention."""
        return self.block.attention2.keys_values(tokens)

    def __call__(self, x: Array, keys_values: tuple[Array, Array]) -> Array:
        batch, views, frames, height, width, channels = x.shape
        moved = jnp.moveaxis(x, 1, 2).reshape(batch, frames, views * height, width, channels)
        tokens = self.proj_in(self.norm(moved))
        tokens = self.block.first(tokens.reshape(batch * frames, -1, channels))
        tokens = self.block.second(tokens.reshape(batch, -1, channels), keys_values)
        update = self.proj_out(tokens).reshape(batch, frames, views, height, width, channels)
        return x + jnp.moveaxis(update, 2, 1)


class ReferenceAttention(nn.Module):
    """Attention of every pixel to tokens of the reference frames; adds nothing until it has been trained.

    x [B, V, T, h, w, C]; the tokens' keys and values [B, M, heads, head_dim] are shared by all views and frames.
    """

    width: int
    heads: int
    dtype: str

    def setup(self):
        self.norm = nn.LayerNorm(1e-5, dtype=self.dtype, use_fast_variance=False)
        self.attention = Attention(self.width, self.heads, self.dtype, zero=True)

    def keys_values(self, tokens: Array) -> tuple[Array, Array]:
        """Reference tokens [B, M, D] to keys and values."""
        return self.attention.keys_values(tokens)

    def __call__(self, x: Array, keys_values: tuple[Array, Array]) -> Array:
        tokens = self.norm(x).reshape(len(x), -1, self.width)
        return x + self.attention(tokens, keys_values).reshape(x.shape)


class TemporalTransformer(nn.Module):
    """Attention of every pixel over all frames, twice; x [B, V, T, h, w, C].

    `inner` is the width of the tokens (C everywhere but in the first block of the U-Net).
    """

    inner: int
    heads: int
    groups: int
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, views, frames, height, width, channels = x.shape
        normed = GroupNorm(self.groups, 1e-6, 1, self.dtype, name="norm")(x)
        tokens = jnp.moveaxis(normed, 2, 4).reshape(-1, frames, channels)
        tokens = nn.Dense(self.inner, dtype=self.dtype, name="proj_in")(tokens)
        block = TransformerBlock(self.inner, self.heads, self.dtype, name="block")
        tokens = block.second(block.first(tokens))
        out = nn.Dense(channels, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="proj_out")(tokens)
        return x + jnp.moveaxis(out.reshape(batch, views, height, width, frames, channels), 4, 2)
