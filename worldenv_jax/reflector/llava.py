# SPDX-License-Identifier: Apache-2.0
"""LLaVA: a vision tower, a two-layer projector and a language model (Liu et al. 2024; OneVision: Li et al. 2024).

Computes what `transformers` computes. LLaVA-1.5: CLIP ViT-L/14 at 336 px read one block before the end, class token
dropped, Llama. LLaVA-OneVision: SigLIP at 384 px read after the last block, Qwen2, a learned newline after every
image or video, and a bilinear reduction of every video frame.

Parameters: `vision_tower`, `projector` (`linear_1`, `linear_2`), `language_model`, and `image_newline` [D] for
OneVision.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from worldenv_jax.networks.llama import Cache, Llama, LlamaConfig
from worldenv_jax.networks.lora import Dense
from worldenv_jax.networks.vision_transformer import VisionTransformer, ViTConfig
from worldenv_jax.types import Array, Params

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class LlavaConfig:
    """Sizes of the two networks and how a video frame becomes tokens."""

    vision: ViTConfig
    language: LlamaConfig
    image_token: int  # id that marks the place of one image feature
    frame_grid: int  # tokens along one side of a video frame after pooling
    pooling: str = "average"  # "average": over equal windows | "bilinear": without antialiasing (OneVision)
    image_newline: bool = False  # OneVision
    center_crop: bool = False  # shortest side to size, then crop (LLaVA-1.5); else both sides are resized
    pixel_mean: tuple[float, float, float] = field(default=HALF)
    pixel_std: tuple[float, float, float] = field(default=HALF)

    def __post_init__(self):
        if self.pooling not in ("average", "bilinear"):
            raise ValueError(f"pooling {self.pooling!r} is neither 'average' nor 'bilinear'")
        if self.pooling == "average" and self.vision.grid % self.frame_grid:
            raise ValueError(f"average pooling: grid {self.vision.grid} is not a multiple of {self.frame_grid}")

    @classmethod
    def llava_1_5_7b(cls) -> "LlavaConfig":
        """`llava-hf/llava-1.5-7b-hf`; video frames are averaged to 6 x 6 tokens."""
        language = LlamaConfig(32064, 4096, 11008, 32, 32, 32, max_positions=4096, rms_eps=1e-5, dtype="bfloat16")
        vision = ViTConfig.clip_large_336()
        return cls(vision, language, 32000, 6, center_crop=True, pixel_mean=CLIP_MEAN, pixel_std=CLIP_STD)

    @classmethod
    def onevision_0_5b(cls) -> "LlavaConfig":
        """`llava-hf/llava-onevision-qwen2-0.5b-ov-hf`."""
        language = LlamaConfig(152000, 896, 4864, 24, 14, 2, 32768, rope_theta=1e6, **_QWEN2, tie_embeddings=True)
        return cls(_siglip_384(), language, 151646, 14, pooling="bilinear", image_newline=True)

    @classmethod
    def onevision_7b(cls) -> "LlavaConfig":
        """`llava-hf/llava-onevision-qwen2-7b-ov-hf`."""
        language = LlamaConfig(152128, 3584, 18944, 28, 28, 4, 32768, rope_theta=1e6, **_QWEN2)
        return cls(_siglip_384(), language, 151646, 14, pooling="bilinear", image_newline=True)


_QWEN2 = {"qkv_bias": True, "dtype": "bfloat16"}


def _siglip_384() -> ViTConfig:
    return ViTConfig(384, 14, 1152, 26, 16, 4304, activation="gelu_tanh", dtype="bfloat16")


class Projector(nn.Module):
    """Vision width to language width: linear, exact GELU, linear."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.gelu(Dense(self.width, dtype=self.dtype, name="linear_1")(x), approximate=False)
        return Dense(self.width, dtype=self.dtype, name="linear_2")(x)


class Llava(nn.Module):
    """The parts of the model; `llava_forward` puts them together as `transformers` does."""

    config: LlavaConfig

    def setup(self):
        language = self.config.language
        self.vision_tower = VisionTransformer(self.config.vision)
        self.projector = Projector(language.width, language.dtype)
        self.language_model = Llama(language)
        if self.config.image_newline:
            initializer = nn.initializers.normal(language.width**-0.5)
            self.newline = self.param("image_newline", initializer, (language.width,))

    def image_features(self, images: Array) -> Array:
        """Normalised images float [I, S, S, 3] -> projected features [I, grid * grid, D]."""
        return self.projector(self.vision_tower(images)[:, self.config.vision.num_prefix :])

    def frame_features(self, images: Array) -> Array:
        """Normalised video frames float [I, S, S, 3] -> pooled features [I, frame_grid * frame_grid, D]."""
        grid, target = self.config.vision.grid, self.config.frame_grid
        features = self.image_features(images)
        features = features.reshape(len(images), grid, grid, -1)
        if self.config.pooling == "average":
            windows = features.reshape(len(images), target, grid // target, target, grid // target, -1)
            features = windows.mean((2, 4))
        else:
            shape = (len(images), target, target, features.shape[-1])
            features = jax.image.resize(features, shape, "linear", antialias=False)
        return features.reshape(len(images), target * target, -1)

    def embed(self, tokens: Array) -> Array:
        """Token ids int32 [B, N] -> embeddings [B, N, D]."""
        return self.language_model.embed(tokens)

    def newline_embedding(self) -> Array:
        """The embedding [D] that ends an image or a video (OneVision)."""
        return self.newline

    def decode(
        self, embeddings: Array, positions: Array, mask: Array, cache: Cache | None = None, index: Array | int = 0
    ) -> tuple[Array, Cache | None]:
        """The language model; see `networks.llama.Llama`."""
        return self.language_model(embeddings, positions, mask, cache, index)

    def logits(self, hidden: Array) -> Array:
        """Hidden states [B, N, D] -> vocabulary logits [B, N, vocab]."""
        return self.language_model.logits(hidden)

    def __call__(self, tokens: Array, mask: Array, images: Array, video: bool) -> tuple[Array, Array]:
        features = self.frame_features(images) if video else self.image_features(images)
        if self.config.image_newline:
            features = self._with_newline(features, video)
        embeddings = _scatter_features(self.embed(tokens), tokens == self.config.image_token, features)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
        hidden, _ = self.decode(embeddings, positions, causal & mask[:, None, None, :])
        return hidden, self.logits(hidden)

    def _with_newline(self, features: Array, video: bool) -> Array:
        """One newline after every image, or after all frames of the one video."""
        groups = features.reshape(1, -1, features.shape[-1]) if video else features
        newline = jnp.broadcast_to(self.newline.astype(groups.dtype), (len(groups), 1, groups.shape[-1]))
        return jnp.concatenate([groups, newline], axis=1)


def _scatter_features(embeddings: Array, is_image: Array, features: Array) -> Array:
    """Puts features [I, P, D], in order, at the marked places [B, N] of the embeddings [B, N, D]."""
    features = features.reshape(-1, features.shape[-1]).astype(embeddings.dtype)
    order = jnp.cumsum(is_image.reshape(-1)).reshape(is_image.shape) - 1
    return jnp.where(is_image[..., None], features[jnp.clip(order, 0, len(features) - 1)], embeddings)


def num_image_tokens(config: LlavaConfig, images: int, video: bool = False) -> int:
    """Placeholders that a prompt needs for its images, or for one video of so many frames."""
    if video:
        return images * config.frame_grid**2 + int(config.image_newline)
    return images * (config.vision.grid**2 + int(config.image_newline))


def llava_forward(
    config: LlavaConfig, params: Params, tokens: Array, mask: Array, images: Array, video: bool = False
) -> tuple[Array, Array]:
    """The whole model, as `LlavaForConditionalGeneration` and `LlavaOnevisionForConditionalGeneration` compute it.

    Args:
        params: {"params": ...} of `Llava`.
        tokens: int32 [B, N]; every feature has a placeholder `config.image_token`.
        mask: bool [B, N], False on padding.
        images: float [I, S, S, 3], normalised, in the order of their placeholders over the whole batch.
        video: the images are the frames of one video (OneVision); else they are separate images.
            Differs from LLaVA: a single high-resolution image is not cut into tiles (OneVision's anyres).

    Returns: hidden states [B, N, D] after the final norm, logits [B, N, vocab].

    Raises ValueError where the number of placeholders is not the number of features. Not checked under jit.
    """
    if not isinstance(tokens, jax.core.Tracer):
        got = int(np.sum(np.asarray(tokens) == config.image_token))
        expected = num_image_tokens(config, len(images), video)
        if got != expected:
            raise ValueError(
                f"the prompts hold {got} placeholders (id {config.image_token}), but {len(images)} images give "
                f"{expected} features: repeat the placeholder once per feature"
            )
    return Llava(config).apply(params, tokens, mask, images, video)
