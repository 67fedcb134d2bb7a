# SPDX-License-Identifier: Apache-2.0
"""KL autoencoder between frames and latents (Rombach et al. 2022, Stable Diffusion; DynamiCrafter's is Apache-2.0).

Images are float in [-1, 1]; the latents of this file are unscaled (`encode_frames` applies the scale).
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from worldenv_jax.networks.attention import dot_product_attention
from worldenv_jax.simulator.layers import GroupNorm, conv3x3, upsample
from worldenv_jax.types import Array, Params


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes; the defaults are Stable Diffusion's and EVAC's (83,653,863 parameters)."""

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    latent_channels: int = 4
    # Differs from EVAC: pixels may first be gathered into patches; the full-resolution level is the dearest one.
    patch: int = 1
    # Differs from EVAC: a linear map beside encoder and decoder (as in DC-AE, Chen et al. 2025); learns much sooner.
    shortcut: bool = False
    # The shortcut alone, made of the principal components of the frames' patches: no convolutions. See
    # `principal_components`.
    principal: bool = False
    norm_groups: int = 32
    kl_weight: float = 1e-6
    dtype: str = "float32"

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a latent pixel."""
        return self.patch * 2 ** (len(self.multipliers) - 1)


class _ResBlock(nn.Module):
    config: AutoencoderConfig
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        groups, dtype = self.config.norm_groups, self.config.dtype
        hidden = nn.silu(GroupNorm(groups, 1e-6, 1, dtype, name="norm1")(x))
        hidden = conv3x3(self.features, dtype, "conv1")(hidden)
        hidden = nn.silu(GroupNorm(groups, 1e-6, 1, dtype, name="norm2")(hidden))
        hidden = conv3x3(self.features, dtype, "conv2")(hidden)
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, dtype=dtype, name="skip")(x)
        return x + hidden


class _Attention(nn.Module):
    """Single-head attention over the pixels of [N, h, w, C]."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, height, width, channels = x.shape
        normed = GroupNorm(self.config.norm_groups, 1e-6, 1, self.config.dtype, name="norm")(x)
        tokens = normed.reshape(n, height * width, channels)
        q, k, v = (nn.Dense(channels, dtype=self.config.dtype, name=name)(tokens)[:, :, None] for name in "qkv")
        mixed = dot_product_attention(q, k, v)[:, :, 0]
        return x + nn.Dense(channels, dtype=self.config.dtype, name="proj_out")(mixed).reshape(x.shape)


class _Middle(nn.Module):
    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = _ResBlock(self.config, x.shape[-1], name="block1")(x)
        x = _Attention(self.config, name="attention")(x)
        return _ResBlock(self.config, x.shape[-1], name="block2")(x)


class _Encoder(nn.Module):
    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        x = conv3x3(config.channels, config.dtype, "conv_in")(space_to_depth(x, config.patch))
        for level, multiplier in enumerate(config.multipliers):
            for i in range(config.res_blocks):
                x = _ResBlock(config, config.channels * multiplier, name=f"level{level}_block{i}")(x)
            if level < len(config.multipliers) - 1:
                # One pixel of padding on the right and below only.
                down = nn.Conv(x.shape[-1], (3, 3), 2, ((0, 1), (0, 1)), dtype=config.dtype, name=f"level{level}_down")
                x = down(x)
        x = _Middle(config, name="middle")(x)
        x = nn.silu(GroupNorm(config.norm_groups, 1e-6, 1, config.dtype, name="norm_out")(x))
        return conv3x3(2 * config.latent_channels, config.dtype, "conv_out")(x)


class _Decoder(nn.Module):
    config: AutoencoderConfig

    @nn.compact
    def __call__(self, z: Array) -> Array:
        config = self.config
        levels = len(config.multipliers)
        x = conv3x3(config.channels * config.multipliers[-1], config.dtype, "conv_in")(z)
        x = _Middle(config, name="middle")(x)
        for level in reversed(range(levels)):
            for i in range(config.res_blocks + 1):
                x = _ResBlock(config, config.channels * config.multipliers[level], name=f"level{level}_block{i}")(x)
            if level > 0:
                x = conv3x3(x.shape[-1], config.dtype, f"level{level}_up")(upsample(x))
        x = nn.silu(GroupNorm(config.norm_groups, 1e-6, 1, config.dtype, name="norm_out")(x))
        return depth_to_space(conv3x3(3 * config.patch**2, config.dtype, "conv_out")(x), config.patch)


class Autoencoder(nn.Module):
    """Images [N, H, W, 3] to a Gaussian over latents [N, h, w, c], and back."""

    config: AutoencoderConfig

    def setup(self):
        if not self.config.principal:
            self.encoder, self.decoder = _Encoder(self.config), _Decoder(self.config)
            self.quant = nn.Dense(2 * self.config.latent_channels, dtype=self.config.dtype)
            self.post_quant = nn.Dense(self.config.latent_channels, dtype=self.config.dtype)
        if self.config.shortcut:
            self.shortcut_in = nn.Dense(self.config.latent_channels, dtype=self.config.dtype)
            self.shortcut_out = nn.Dense(3 * self.config.downsampling**2, dtype=self.config.dtype)

    def encode(self, images: Array) -> tuple[Array, Array]:
        """Images to the posterior's mean and log-variance (clipped to [-30, 20]), float32 [N, h, w, c] each."""
        mean, log_variance = 0.0, jnp.float32(-30.0)
        if not self.config.principal:
            mean, log_variance = jnp.split(self.quant(self.encoder(images)).astype(jnp.float32), 2, axis=-1)
        if self.config.shortcut:
            mean += self.shortcut_in(space_to_depth(images, self.config.downsampling)).astype(jnp.float32)
        return mean, jnp.broadcast_to(jnp.clip(log_variance, -30.0, 20.0), mean.shape)

    def decode(self, latents: Array) -> Array:
        """Latents to images, about [-1, 1], not clipped."""
        images = 0.0
        if not self.config.principal:
            images = self.decoder(self.post_quant(latents)).astype(jnp.float32)
        if self.config.shortcut:
            images += depth_to_space(self.shortcut_out(latents).astype(jnp.float32), self.config.downsampling)
        return images

    def __call__(self, images: Array) -> Array:
        """The images reconstructed from the mean; used to create all parameters."""
        return self.decode(self.encode(images)[0])


def principal_components(config: AutoencoderConfig, frames: Array) -> Params:
    """Parameters whose latents are the first principal components of patches, the best linear code there is.

    Errors in these latents are errors in pixels.

    Args:
        config: with `principal`.
        frames: uint8 [N, H, W, 3]; at most 4096 of them, drawn at random, are used.
    """
    rows = np.random.default_rng(0).choice(len(frames), min(len(frames), 4096), replace=False)
    frames = np.asarray(frames[rows], np.float32) / 127.5 - 1.0
    patches = np.asarray(space_to_depth(frames, config.downsampling)).reshape(-1, 3 * config.downsampling**2)
    mean = patches.mean(0, dtype=np.float64)
    covariance = np.zeros((patches.shape[1],) * 2)
    for part in np.array_split(patches, -(-len(patches) // 65536)):
        covariance += (part - mean).T @ (part - mean)
    components = np.linalg.eigh(covariance)[1][:, ::-1][:, : config.latent_channels]
    dense = lambda kernel, bias: {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    return {"shortcut_in": dense(components, -mean @ components), "shortcut_out": dense(components.T, mean)}


def space_to_depth(x: Array, patch: int) -> Array:
    """[N, h, w, C] to [N, h / patch, w / patch, patch * patch * C]."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height // patch, patch, width // patch, patch, channels).swapaxes(2, 3)
    return x.reshape(n, height // patch, width // patch, patch * patch * channels)


def depth_to_space(x: Array, patch: int) -> Array:
    """Inverse of `space_to_depth`."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height, width, patch, patch, channels // patch**2).swapaxes(2, 3)
    return x.reshape(n, height * patch, width * patch, channels // patch**2)
