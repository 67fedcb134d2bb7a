# SPDX-License-Identifier: Apache-2.0
"""EVAC's video U-Net: 2-D convolutions, causal temporal convolutions, spatial and temporal transformers.

Sources: the parent design is DynamiCrafter (Apache-2.0); what EVAC adds (per-frame time embedding, alternating
attention to action and image tokens, views side by side) follows its description in the literature. Videos are
[B, V, T, h, w, C]: views are kept apart from trajectories, the F history frames come first on the time axis.

What does not change over the denoising steps is computed once by `prepare`: the stem's share of the conditioning
channels, the embeddings of frame rate, domain and actions, and the keys and values of every cross-attention.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from worldenv_jax.simulator.layers import (
    GroupNorm,
    ReferenceAttention,
    ResBlock,
    SpatialTransformer,
    TemporalTransformer,
    TimestepEmbedding,
    conv3x3,
    upsample,
)
from worldenv_jax.types import Array


@dataclass(frozen=True)
class VideoUNetConfig:
    """Sizes; the defaults are EVAC's (1,464,484,100 parameters, of which 51 M are never used)."""

    channels: int = 320
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)
    head_dim: int = 64
    init_attention_heads: int = 8
    context_width: int = 1024
    latent_channels: int = 4
    condition_channels: int = 15
    domains: int = 30
    norm_groups: int = 32
    # Differs from EVAC: features of each frame's own action and pose, added to that frame's time embedding (as in
    # IRASim and Cosmos); EVAC's action tokens do not know the order of the actions. 0: off.
    frame_features: int = 0
    # Differs from EVAC: the physically consistent variant (World-Env v5). D of the tokens of a frozen geometry encoder;
    # 0: off. The paper names VGGT and CLIP features, injected by cross-attention at several resolutions, and publishes
    # no more. Chosen here: geometry tokens are normalised and projected to the context's width, CLIP's resampled tokens
    # stand beside them, and one more cross-attention after every spatial transformer, so at each resolution that has
    # attention, reads both. Its output starts at zero: switched on, a trained model is the same function as before.
    geometry_width: int = 0
    dtype: str = "float32"
    remat: bool = False


class Stage(NamedTuple):
    """One block of the U-Net; `spatial` numbers the spatial transformers in the order of execution."""

    name: str
    kind: str  # "res" | "down"
    features: int
    spatial: int | None = None  # None: no transformers
    up: bool = False  # doubles the resolution at its end


class Layout(NamedTuple):
    """All blocks after the stem, in the order of execution."""

    down: tuple[Stage, ...]
    middle: Stage
    up: tuple[Stage, ...]


def unet_layout(config: VideoUNetConfig) -> Layout:
    """The blocks, named by their number in the published checkpoint (`input1`, ..., `output0`, ...)."""
    down, up, spatial = [], [], 0
    last = len(config.multipliers) - 1

    def block(name: str, level: int, is_up: bool = False) -> Stage:
        nonlocal spatial
        features = config.channels * config.multipliers[level]
        has_attention = level in config.attention_levels
        stage = Stage(name, "res", features, spatial if has_attention else None, is_up)
        spatial += has_attention
        return stage

    for level in range(last + 1):
        for _ in range(config.res_blocks):
            down.append(block(f"input{len(down) + 1}", level))
        if level < last:
            down.append(Stage(f"input{len(down) + 1}", "down", down[-1].features))
    middle = Stage("middle", "res", down[-1].features, spatial)
    spatial += 1
    for level in reversed(range(last + 1)):
        for i in range(config.res_blocks + 1):
            up.append(block(f"output{len(up)}", level, is_up=level > 0 and i == config.res_blocks))
    return Layout(tuple(down), middle, tuple(up))


class Prepared(NamedTuple):
    """What is constant over the denoising steps."""

    stem: Array  # [B, V, T, h, w, channels]
    embedding: Array  # [B, V, T, 4 * channels]
    keys_values: tuple[tuple[Array, Array], ...]  # per spatial transformer, [B, M, heads, head_dim]
    geometry: tuple[tuple[Array, Array], ...] | None = None  # the same for the attention to geometry tokens; None: off
    reference: Array | None = None  # [B, V, T, h, w, c], the image latents, where the denoiser predicts a change


class _Block(nn.Module):
    """ResBlock, then (where the stage has them) spatial transformer, reference attention and temporal transformer."""

    config: VideoUNetConfig
    stage: Stage

    def setup(self):
        config, features = self.config, self.stage.features
        heads, groups = features // config.head_dim, config.norm_groups
        self.res = ResBlock(features, groups, config.dtype)
        if self.stage.spatial is not None:
            self.spatial = SpatialTransformer(features, heads, groups, config.dtype)
            self.temporal = TemporalTransformer(features, heads, groups, config.dtype)
            if config.geometry_width:
                self.geometry = ReferenceAttention(features, heads, config.dtype)
        if self.stage.name == "middle":
            self.res2 = ResBlock(features, groups, config.dtype)
        if self.stage.up:
            self.up = conv3x3(features, config.dtype)

    def keys_values(self, tokens: Array) -> tuple[Array, Array]:
        """Of the spatial transformer's cross-attention, for context tokens [B, M, D]."""
        return self.spatial.keys_values(tokens)

    def geometry_keys_values(self, tokens: Array) -> tuple[Array, Array]:
        """Of the reference attention, for reference tokens [B, M, D]."""
        return self.geometry.keys_values(tokens)

    def __call__(
        self,
        x: Array,
        embedding: Array,
        keys_values: tuple[Array, Array] | None,
        geometry: tuple[Array, Array] | None,
    ) -> Array:
        x = _over_views(self.res, x, embedding)
        if keys_values is not None:
            x = self.spatial(x, keys_values)
            if geometry is not None:
                x = self.geometry(x, geometry)
            x = self.temporal(x)
        if self.stage.name == "middle":
            x = _over_views(self.res2, x, embedding)
        return _over_frames(lambda y: self.up(upsample(y)), x) if self.stage.up else x


class VideoUNet(nn.Module):
    """Predicts v for noisy latents; see `prepare` and `__call__`."""

    config: VideoUNetConfig

    def setup(self):
        config = self.config
        width = 4 * config.channels
        layout = unet_layout(config)
        self.time_embedding = TimestepEmbedding(config.channels, width, config.dtype)
        self.rate_embedding = TimestepEmbedding(config.channels, width, config.dtype)
        self.domain_embedding = nn.Embed(config.domains, width, dtype=config.dtype)
        if config.frame_features:
            self.frame_embedding = [nn.Dense(width, dtype=config.dtype), nn.Dense(width, dtype=config.dtype)]
        inputs = config.latent_channels + config.condition_channels
        self.stem_kernel = self.param("stem_kernel", nn.initializers.lecun_normal(), (3, 3, inputs, config.channels))
        self.stem_bias = self.param("stem_bias", nn.initializers.zeros, (config.channels,))
        if config.geometry_width:
            self.geometry_norm = nn.LayerNorm(1e-5, dtype=config.dtype, use_fast_variance=False)
            self.geometry_projection = nn.Dense(config.context_width, dtype=config.dtype)
        heads = config.init_attention_heads
        inner = heads * config.head_dim
        self.init_attention = TemporalTransformer(inner, heads, config.norm_groups, config.dtype)
        block = nn.remat(_Block) if config.remat else _Block
        self.down = [
            conv3x3(stage.features, config.dtype, stage.name, stride=2)
            if stage.kind == "down"
            else block(config, stage, name=stage.name)
            for stage in layout.down
        ]
        self.middle = block(config, layout.middle)
        self.up = [block(config, stage, name=stage.name) for stage in layout.up]
        self.norm_out = GroupNorm(config.norm_groups, 1e-5, 3, config.dtype)
        self.conv_out = conv3x3(config.latent_channels, config.dtype, zero=True)

    def prepare(
        self,
        condition: Array,
        image_tokens: Array,
        action_tokens: Array,
        frame_rate: Array,
        domain: Array,
        frame_features: Array | None = None,
        geometry_tokens: Array | None = None,
    ) -> Prepared:
        """Everything that one chunk's denoising steps share.

        Args:
            condition: float [B, V, T, h, w, condition channels].
            image_tokens: float [B, M, D], of all views side by side; read by odd spatial transformers.
            action_tokens: float [B, N, D]; read by even spatial transformers.
            frame_rate, domain: int32 [B].
            frame_features: float [B, T, config.frame_features] where the configuration has them.
            geometry_tokens: float [B, M', config.geometry_width] of all views, where the configuration has them.
        """
        config = self.config
        embedding = self.rate_embedding(frame_rate) + self.domain_embedding(domain)
        embedding = embedding[:, None, None]
        if config.frame_features:
            fc1, fc2 = self.frame_embedding
            embedding = embedding + fc2(nn.silu(fc1(frame_features)))[:, None]
        blocks = [block for block in (*self.down, self.middle, *self.up) if getattr(block, "stage", None)]
        blocks = [block for block in blocks if block.stage.spatial is not None]
        keys_values = tuple(
            block.keys_values(image_tokens if block.stage.spatial % 2 else action_tokens) for block in blocks
        )
        geometry = None
        if config.geometry_width:
            reference = self.geometry_projection(self.geometry_norm(geometry_tokens))
            reference = jnp.concatenate([reference, image_tokens.astype(reference.dtype)], axis=1)
            geometry = tuple(block.geometry_keys_values(reference) for block in blocks)
        stem = self._stem(condition, slice(config.latent_channels, None))
        stem = stem + self.stem_bias.astype(config.dtype)
        shape = (*condition.shape[:3], embedding.shape[-1])
        return Prepared(stem, jnp.broadcast_to(embedding, shape), keys_values, geometry)

    def __call__(self, latents: Array, t: Array, history: int, prepared: Prepared) -> Array:
        """v for latents float [B, V, T, h, w, c]; the first `history` frames are clean.

        Args:
            t: int [B, V], the noise step of the future frames (history frames have 0).
        Returns: float32 [B, V, T, h, w, c].
        """
        config = self.config
        frames = latents.shape[2]
        is_history = jnp.arange(frames)[:, None] < history
        embedding = jnp.where(is_history, self.time_embedding(jnp.zeros(1)), self.time_embedding(t)[:, :, None])
        embedding = nn.silu(embedding + prepared.embedding)

        x = self._stem(latents, slice(0, config.latent_channels)) + prepared.stem
        x = self.init_attention(x)
        skips = [x]
        for block in self.down:
            x = self._run(block, x, embedding, prepared)
            skips.append(x)
        x = self._run(self.middle, x, embedding, prepared)
        for block in self.up:
            x = self._run(block, jnp.concatenate([x, skips.pop()], axis=-1), embedding, prepared)
        return _over_frames(self.conv_out, nn.silu(self.norm_out(x))).astype(jnp.float32)

    def initialise(self, latents, t, *arguments):
        """Runs both halves, `arguments` being those of `prepare`; used to create all parameters."""
        return self(latents, t, 1, self.prepare(*arguments))

    def _run(self, block: nn.Module, x: Array, embedding: Array, prepared: Prepared) -> Array:
        if isinstance(block, nn.Conv):
            return _over_frames(block, x)
        number = block.stage.spatial
        if number is None:
            return block(x, embedding, None, None)
        geometry = None if prepared.geometry is None else prepared.geometry[number]
        return block(x, embedding, prepared.keys_values[number], geometry)

    def _stem(self, x: Array, channels: slice) -> Array:
        dtype = self.config.dtype
        kernel = self.stem_kernel[:, :, channels].astype(dtype)
        convolve = lambda y: jax.lax.conv_general_dilated(
            y, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return _over_frames(convolve, x.astype(dtype))


def _over_frames(function, x: Array) -> Array:
    """Applies a function of images [N, h, w, C] to videos [B, V, T, h, w, C]."""
    y = function(x.reshape(-1, *x.shape[3:]))
    return y.reshape(*x.shape[:3], *y.shape[1:])


def _over_views(function, x: Array, embedding: Array) -> Array:
    """Applies a function of single-view videos [N, T, h, w, C] and embeddings [N, T, E]."""
    y = function(x.reshape(-1, *x.shape[2:]), embedding.reshape(-1, *embedding.shape[2:]))
    return y.reshape(*x.shape[:2], *y.shape[1:])
