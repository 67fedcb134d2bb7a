# SPDX-License-Identifier: Apache-2.0
"""One pre-norm vision transformer for four published towers: DINOv2 with registers, SigLIP, CLIP, OpenCLIP.

Sources: Dosovitskiy et al. 2021 (ViT), Darcet et al. 2024 (registers), Zhai et al. 2023 (SigLIP), Radford et al.
2021 (CLIP). The towers differ in prefix tokens, position embeddings, LayerScale, activation and the layer that is
read; all of that is `ViTConfig`. Only the blocks up to the layer that is read exist.

Parameters: `patch_embed` is a Dense over flattened patches, kernel [patch * patch * 3, D] in the order (row,
column, channel), the same map as a convolution of stride `patch_size`. Queries, keys and values are one Dense
`qkv`, kernel [D, 3 * D] = q, k, v side by side. The leaves under `blocks` carry a leading layer axis. Towers that train
from scratch on little data can cut their patches from the output of a convolutional `stem` (Xiao et al. 2021).
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn

from worldenv_jax.mesh import constrain_batch
from worldenv_jax.networks.attention import dot_product_attention
from worldenv_jax.networks.lora import Dense
from worldenv_jax.types import Array

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


@dataclass(frozen=True)
class ViTConfig:
    """Sizes and variants of a tower; images are square.

    Pixels to the right of and below the last whole patch are not seen (SigLIP at 384 px reads 378).
    """

    image_size: int
    patch_size: int
    width: int
    layers: int  # of the published model; how many are built is `depth`
    heads: int
    mlp_width: int
    class_token: bool = False
    register_tokens: int = 0
    layer_scale: bool = False
    pre_norm: bool = False  # LayerNorm before the first block (CLIP)
    position_on_prefix: bool = False  # the prefix tokens have positions (CLIP), else only the patches (DINOv2)
    patch_bias: bool = True
    activation: str = "gelu"  # "gelu" (erf) | "gelu_tanh" | "quick_gelu"
    norm_eps: float = 1e-6
    output_layer: int = -1  # -1: after the last block, -2: one block earlier, ...
    final_norm: bool = False
    # Differs from the published towers where given: channels of 3 x 3 convolutions of stride 2 ahead of the patches.
    stem: tuple[int, ...] = ()
    dtype: str = "float32"  # of activations
    remat: bool = False

    def __post_init__(self):
        if not -self.layers <= self.output_layer <= -1:
            raise ValueError(f"output_layer {self.output_layer} is outside [-{self.layers}, -1]")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {sorted(ACTIVATIONS)}")
        if self.image_size % 2 ** len(self.stem) or self.patch_size % 2 ** len(self.stem):
            raise ValueError(
                f"image_size {self.image_size} and patch_size {self.patch_size} cannot be halved {len(self.stem)} times"
            )

    @property
    def depth(self) -> int:
        """Blocks that are built."""
        return self.layers + 1 + self.output_layer

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_prefix(self) -> int:
        """Class and register tokens in front of the patches."""
        return int(self.class_token) + self.register_tokens

    @classmethod
    def dinov2_large(cls) -> "ViTConfig":
        """timm `vit_large_patch14_reg4_dinov2` at 224 px, read one block before the end (OpenVLA)."""
        sizes = (224, 14, 1024, 24, 16, 4096)
        return cls(*sizes, class_token=True, register_tokens=4, layer_scale=True, output_layer=-2)

    @classmethod
    def siglip_so400m(cls) -> "ViTConfig":
        """timm `vit_so400m_patch14_siglip_224`, read one block before the end (OpenVLA)."""
        return cls(224, 14, 1152, 27, 16, 4304, output_layer=-2)

    @classmethod
    def clip_large_336(cls) -> "ViTConfig":
        """CLIP ViT-L/14 at 336 px, read one block before the end (LLaVA-1.5)."""
        return cls(336, 14, 1024, 24, 16, 4096, activation="quick_gelu", output_layer=-2, **_CLIP)

    @classmethod
    def openclip_huge(cls) -> "ViTConfig":
        """OpenCLIP ViT-H/14 (laion2B) at 224 px, all tokens after the last block."""
        return cls(224, 14, 1280, 32, 16, 5120, **_CLIP)


_CLIP = {
    "class_token": True,
    "pre_norm": True,
    "position_on_prefix": True,
    "patch_bias": False,
    "norm_eps": 1e-5,
}


def _layer_norm(config: ViTConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(config.norm_eps, dtype=config.dtype, use_fast_variance=False, name=name)


def _init_positions(key: Array, shape: tuple[int, int]) -> Array:
    """Two-dimensional sines and cosines (He et al. 2022, MAE) on the patches, zero on prefix tokens."""
    grid, width = int(shape[0] ** 0.5), shape[1]
    frequency = 1e4 ** (-jnp.arange(width // 4) / (width // 4))
    angle = jnp.arange(grid)[:, None] * frequency
    waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)
    rows, columns = jnp.repeat(waves, grid, axis=0), jnp.tile(waves, (grid, 1))
    patches = jnp.concatenate([rows, columns], axis=1)
    return jnp.pad(patches, ((shape[0] - grid**2, 0), (0, width - patches.shape[1])))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), each residual optionally scaled per channel."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Array, film: Array | None) -> tuple[Array, None]:
        x = constrain_batch(x)
        x = x + self._scaled("scale1", self._attention(_layer_norm(self.config, "norm1")(x)))
        if film is not None:
            scale = Dense(self.config.width, dtype=self.config.dtype, name="film_scale")(film)
            shift = Dense(self.config.width, dtype=self.config.dtype, name="film_shift")(film)
            x = x * (1.0 + scale[:, None]) + shift[:, None]
        x = constrain_batch(x)
        x = x + self._scaled("scale2", self._mlp(_layer_norm(self.config, "norm2")(x)))
        return constrain_batch(x), None

    def _attention(self, x: Array) -> Array:
        config = self.config
        qkv = Dense(3 * config.width, dtype=config.dtype, name="qkv")(x)
        q, k, v = jnp.split(qkv.reshape(*x.shape[:2], 3 * config.heads, -1), 3, axis=2)
        mixed = dot_product_attention(q, k, v)
        return Dense(config.width, dtype=config.dtype, name="proj")(mixed.reshape(x.shape))

    def _mlp(self, x: Array) -> Array:
        config = self.config
        hidden = ACTIVATIONS[config.activation](Dense(config.mlp_width, dtype=config.dtype, name="fc1")(x))
        return Dense(config.width, dtype=config.dtype, name="fc2")(hidden)

    def _scaled(self, name: str, x: Array) -> Array:
        if not self.config.layer_scale:
            return x
        # 0.1 trains from scratch up to 18 layers (Touvron et al. 2021, CaiT).
        return x * self.param(name, nn.initializers.constant(0.1), (self.config.width,)).astype(x.dtype)


class VisionTransformer(nn.Module):
    """Images float [B, H, W, 3], already normalised, to tokens [B, prefix + N, D] in row-major patch order.

    `film` [B, E] modulates every block: after the attention, x becomes x * (1 + scale(film)) + shift(film) with two
    linear layers (Perez et al. 2018; OpenVLA-OFT's "OFT+").

    Raises ValueError where the images do not have the configured size.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, images: Array, film: Array | None = None) -> Array:
        config = self.config
        expected = (config.image_size, config.image_size, 3)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(f"vision tower: got images {images.shape}, expected [B, {expected}]: resize them first")
        patches = self._patches(self._stem(images))
        x = Dense(config.width, use_bias=config.patch_bias, dtype=config.dtype, name="patch_embed")(patches)
        x = self._embed(x)
        if config.pre_norm:
            x = _layer_norm(config, "norm_pre")(x)
        block = nn.remat(Block, prevent_cse=False) if config.remat else Block
        axes = {"params": 0, "lora": 0}
        rngs = {"params": True}
        blocks = nn.scan(block, variable_axes=axes, split_rngs=rngs, in_axes=nn.broadcast, length=config.depth)
        x, _ = blocks(config, name="blocks")(x, film)
        return _layer_norm(config, "norm")(x) if config.final_norm else x

    def _stem(self, images: Array) -> Array:
        """Images [B, H, W, 3] at 1 / 2**n of their size after n convolutions."""
        x = images.astype(self.config.dtype)
        for i, channels in enumerate(self.config.stem):
            x = nn.Conv(channels, (3, 3), 2, padding=1, use_bias=False, dtype=x.dtype, name=f"stem{i}")(x)
            x = nn.gelu(nn.GroupNorm(8, dtype=x.dtype, name=f"stem_norm{i}")(x))
        return x

    def _patches(self, x: Array) -> Array:
        grid, patch = self.config.grid, self.config.patch_size // 2 ** len(self.config.stem)
        whole = x[:, : grid * patch, : grid * patch]
        return whole.reshape(-1, grid, patch, grid, patch, x.shape[-1]).swapaxes(2, 3).reshape(len(x), grid * grid, -1)

    def _embed(self, patches: Array) -> Array:
        """Adds positions and puts class and register tokens in front."""
        config = self.config
        normal = nn.initializers.normal(0.02)
        positions = config.grid**2 + (config.num_prefix if config.position_on_prefix else 0)
        position = self.param("position_embedding", _init_positions, (positions, config.width)).astype(patches.dtype)
        prefix = []
        if config.class_token:
            prefix.append(self.param("class_token", normal, (1, config.width)))
        if config.register_tokens:
            prefix.append(self.param("register_tokens", normal, (config.register_tokens, config.width)))
        prefix = [jnp.broadcast_to(p.astype(patches.dtype), (len(patches), *p.shape)) for p in prefix]
        if config.position_on_prefix:
            return jnp.concatenate([*prefix, patches], axis=1) + position
        return jnp.concatenate([*prefix, patches + position], axis=1)
