# SPDX-License-Identifier: Apache-2.0
"""The reflector as pure functions: R(o_1:t, g) = sigmoid(head(h_t)), for every frame t (World-Env).

h_t is the mean of the language model's hidden states over the tokens of frame t, which have seen the instruction and
the frames before. The sequence is instruction, frame 1, frame 2, ...; each frame is frame_tokens long (all views).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from worldenv_jax.networks.llama import Cache
from worldenv_jax.networks.lora import Dense, init_lora, scale_lora
from worldenv_jax.reflector.config import ReflectorConfig
from worldenv_jax.reflector.llava import Llava
from worldenv_jax.reflector.preprocess import preprocess
from worldenv_jax.types import Array, Params, Text


class Reflector(nn.Module):
    """LLaVA with a reward head; `params` has `llava` and `reward_head`."""

    config: ReflectorConfig

    def setup(self):
        self.llava = Llava(self.config.llava)
        self.reward_head = RewardHead(self.config.llava.language.width)

    def frame_tokens(self, frames: Array) -> Array:
        """uint8 [N, V, H, W, 3] -> [N, frame_tokens, D]."""
        images = preprocess(self.config.llava, frames.reshape(-1, *frames.shape[2:]))
        return self.llava.frame_features(images).reshape(len(frames), self.config.frame_tokens, -1)

    def embed(self, tokens: Array) -> Array:
        """Token ids int32 [B, N] -> embeddings [B, N, D]."""
        return self.llava.embed(tokens)

    def newline(self) -> Array:
        """The embedding [D] that ends a video (OneVision)."""
        return self.llava.newline_embedding()

    def decode(self, embeddings, positions, mask, cache: Cache | None = None, index: Array | int = 0):
        """The language model; see `networks.llama.Llama`."""
        return self.llava.decode(embeddings, positions, mask, cache, index)

    def reward(self, pooled: Array) -> Array:
        """Pooled embeddings [..., D] -> logits float32 [...]."""
        return self.reward_head(pooled)

    def vocabulary(self, hidden: Array) -> Array:
        """Hidden states [B, N, D] -> vocabulary logits [B, N, vocab]."""
        return self.llava.logits(hidden)

    def __call__(self, frames: Array, text: Text) -> tuple[Array, Array]:
        """Touches every parameter, once."""
        embeddings = jnp.concatenate([self.embed(text.tokens), self.frame_tokens(frames)], axis=1)
        length = embeddings.shape[1]
        positions = jnp.broadcast_to(jnp.arange(length), embeddings.shape[:2])
        hidden, _ = self.decode(embeddings, positions, jnp.ones((1, 1, length, length), bool))
        return self.reward(hidden.mean(1)), self.vocabulary(hidden)


class RewardHead(nn.Module):
    """[..., D] -> logit float32 [...]: linear, GELU, linear."""

    width: int

    @nn.compact
    def __call__(self, pooled: Array) -> Array:
        hidden = nn.gelu(Dense(self.width, name="hidden")(pooled.astype(jnp.float32)))
        return Dense(1, name="logit")(hidden)[..., 0]


def init_reflector(config: ReflectorConfig, key: Array) -> Params:
    """Random parameters {"params": ...}, with "lora" (language model only) where config.lora_rank > 0."""
    size = config.image_size
    frames = jnp.zeros((1, config.views, size, size, 3), jnp.uint8)
    text = Text(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))
    params_key, lora_key = jax.random.split(key)
    params = {"params": Reflector(config).init(params_key, frames, text)["params"]}
    if config.lora_rank:
        layers = params["params"]["llava"]["language_model"]["layers"]
        adapters = init_lora(lora_key, layers, config.lora_rank)
        params["lora"] = {"llava": {"language_model": {"layers": adapters}}}
    return params


def apply(config: ReflectorConfig, params: Params, method: str, *args):
    """Calls a method of `Reflector` on parameters in the layout of `init_reflector`."""
    if config.lora_rank:
        params = params | {"lora": scale_lora(params["lora"], config.lora_alpha / config.lora_rank)}
    return Reflector(config).apply(params, *args, method=method)


def success_logits(
    config: ReflectorConfig,
    params: Params,
    frames: Array,
    text: Text,
    frame_mask: Array,
    frame_index: Array | None = None,
) -> Array:
    """The logit of R(o_1:t, g) for every frame t, before the temperature.

    Args:
        frames: uint8 [B, F, V, H, W, 3].
        text: from `tokenize_reflector_prompts`.
        frame_mask: bool [B, F], False on padding, which follows the frames.
        frame_index: int32 [B, F], ascending, the times of the frames where some are left out ("streaming" only);
            None: 0 .. F - 1.

    Returns: float32 [B, F]; arbitrary where the mask is False.

    Raises ValueError where the frames are none, or have another size or number of views than the config.
    """
    check_frames(config, frames)
    batch, count = frames.shape[:2]
    tokens = apply(config, params, "frame_tokens", frames.reshape(-1, *frames.shape[2:]))
    tokens = tokens.reshape(batch, count, config.frame_tokens, -1)
    if config.mode == "streaming":
        return _streamed_logits(config, params, tokens, text, frame_mask, frame_index)
    judge = lambda t: uniform_logits(config, params, tokens, text, t)
    return jax.lax.map(judge, jnp.arange(count)).T


def _streamed_logits(
    config: ReflectorConfig,
    params: Params,
    tokens: Array,
    text: Text,
    frame_mask: Array,
    frame_index: Array | None,
) -> Array:
    """All frames in one pass: tokens [B, F, P, D] -> logits [B, F]."""
    batch, count, per_frame, width = tokens.shape
    embeddings = jnp.concatenate(
        [apply(config, params, "embed", text.tokens), tokens.reshape(batch, -1, width)], axis=1
    )
    slots = jnp.arange(embeddings.shape[1])
    valid = jnp.concatenate([text.mask, jnp.repeat(frame_mask, per_frame, axis=1)], axis=1)
    mask = attention_mask(config, text, slots, slots) & valid[:, None, None, :]
    rotary = positions(text, slots)
    if frame_index is not None:
        left_out = jnp.repeat(frame_index - jnp.arange(count), per_frame, axis=1) * per_frame
        rotary = rotary.at[:, text.tokens.shape[1] :].add(left_out)
    hidden, _ = apply(config, params, "decode", embeddings, rotary, mask)
    pooled = hidden[:, text.tokens.shape[1] :].reshape(tokens.shape).mean(2)
    return apply(config, params, "reward", pooled)


def attention_mask(config: ReflectorConfig, text: Text, queries: Array, keys: Array) -> Array:
    """Who may attend to whom, bool [B, 1, N, M], for slots int32 [N] and [M] of the sequence.

    Slots 0 .. text_length - 1 hold the right-padded instruction, then come the frames. The order is causal, except
    that the tokens of one frame see each other where the config says so.
    """
    length = text.tokens.shape[1]

    def rank(slots: Array) -> Array:
        slots = slots - length
        frame = slots // config.frame_tokens
        return jnp.where(slots < 0, slots, frame) if config.bidirectional_frames else slots

    padding = jnp.pad(~text.mask, ((0, 0), (0, len(keys) - length)))
    return (rank(keys) <= rank(queries)[:, None])[None, None] & ~padding[:, None, None, :]


def positions(text: Text, slots: Array) -> Array:
    """Rotary positions int32 [B, N] of slots [N]: the first frame follows the last real token of its instruction."""
    padding = text.tokens.shape[1] - text.mask.sum(1)
    return slots - jnp.where(slots < text.tokens.shape[1], 0, padding[:, None])


def uniform_logits(config: ReflectorConfig, params: Params, tokens: Array, text: Text, last: Array) -> Array:
    """R's logit at frame `last` from at most config.sampled_frames of the frames 0 .. last, evenly spaced; one: `last`.

    Args:
        tokens: [B, F, P, D], the frames so far; those after `last` are not read.
        last: int32 [], shared by the batch.

    Returns: float32 [B]. The reward head pools the last frame; the answer is logit(yes) - logit(no).
    """
    batch, _, per_frame, width = tokens.shape
    samples = min(config.sampled_frames, tokens.shape[1])
    used = jnp.minimum(last + 1, samples)
    step = jnp.arange(samples)
    spaced = step * last // (samples - 1) if samples > 1 else last
    chosen = jnp.where(last < samples, step, spaced)
    frames = tokens[:, jnp.minimum(chosen, last)].reshape(batch, -1, width)
    suffix = _suffix(config, params, batch)
    embeddings = jnp.concatenate([apply(config, params, "embed", text.tokens), frames, suffix], axis=1)

    length, slots = text.tokens.shape[1], jnp.arange(embeddings.shape[1])
    is_suffix = slots >= length + samples * per_frame
    missing = (samples - used) * per_frame  # slots of frames that there are not yet
    valid = is_suffix | (slots < length + used * per_frame)
    mask = attention_mask(config, text, slots, slots) & valid
    rotary = positions(text, slots) - jnp.where(is_suffix, missing, 0)
    hidden, _ = apply(config, params, "decode", embeddings, rotary, mask)
    if config.kind == "answer":
        logits = apply(config, params, "vocabulary", hidden[:, -1:])[:, 0].astype(jnp.float32)
        return logits[:, config.yes_token] - logits[:, config.no_token]
    current = jax.lax.dynamic_slice_in_dim(hidden, length + (used - 1) * per_frame, per_frame, axis=1)
    return apply(config, params, "reward", current.mean(1))


def _suffix(config: ReflectorConfig, params: Params, batch: int) -> Array:
    """What follows the frames, [B, N, D]: nothing for the reward head; a newline (OneVision) and the question."""
    width = config.llava.language.width
    if config.kind == "reward_head":
        return jnp.zeros((batch, 0, width), config.llava.language.dtype)
    question = apply(config, params, "embed", jnp.array([config.question], jnp.int32))
    if config.llava.image_newline:
        newline = apply(config, params, "newline").astype(question.dtype)
        question = jnp.concatenate([newline[None, None], question], axis=1)
    return jnp.broadcast_to(question, (batch, *question.shape[1:]))


def check_frames(config: ReflectorConfig, frames: Array) -> None:
    """Raises ValueError unless frames are uint8 [B, F >= 1, V, H, W, 3] of the config's views and size."""
    expected = (config.views, config.image_size, config.image_size, 3)
    if frames.ndim != 6 or frames.shape[2:] != expected or frames.dtype != jnp.uint8:
        raise ValueError(
            f"reflector: got frames {frames.dtype}{list(frames.shape)}, expected uint8[B, F, V, H, W, 3] with "
            f"(V, H, W, 3) = {expected}: render at this size or change the config's views and image_size"
        )
    if not 1 <= frames.shape[1] <= config.max_frames:
        raise ValueError(f"reflector: got {frames.shape[1]} frames, expected 1 to max_frames = {config.max_frames}")
