# SPDX-License-Identifier: Apache-2.0
"""The reflector inside a rollout: state in, frames appended, one probability per new frame out.

Both modes have fixed shapes, so that the state can be carried by `lax.scan`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from worldenv_jax.networks.llama import Cache, init_cache
from worldenv_jax.reflector.config import ReflectorConfig
from worldenv_jax.reflector.model import apply, attention_mask, check_frames, positions, uniform_logits
from worldenv_jax.types import Array, Params, Prediction, ReflectorFns, Starts, Text


class StreamingState(NamedTuple):
    """Everything read so far, as keys and values."""

    cache: Cache
    text: Text
    count: Array  # int32 [], frames read


class UniformState(NamedTuple):
    """Every frame so far, as tokens of the language model."""

    tokens: Array  # [B, max_frames, frame_tokens, D]
    text: Text
    count: Array  # int32 [], frames read


def make_reflector_fns(config: ReflectorConfig) -> ReflectorFns:
    """The judge for `imagine_rollout`; starts carry one frame, so a rollout has max_frames - 1 steps at most.

    Frames beyond config.max_frames overwrite the last ones: choose it at least the horizon plus one.
    """
    if config.mode == "streaming":
        start, append = _start_streaming, _append_streaming
    else:
        start, append = _start_uniform, _append_uniform

    def init(params: Params, starts: Starts):
        frames = starts.images[:, None]
        check_frames(config, frames)
        return start(config, params, frames, starts.reflector_text)

    def judge(params: Params, state, prediction: Prediction):
        check_frames(config, prediction.frames)
        state, logits = append(config, params, state, prediction.frames)
        return state, jax.nn.sigmoid(logits / config.temperature)

    return ReflectorFns(init, judge)


def _frame_tokens(config: ReflectorConfig, params: Params, frames: Array) -> Array:
    """uint8 [B, K, V, H, W, 3] -> [B, K, frame_tokens, D]."""
    tokens = apply(config, params, "frame_tokens", frames.reshape(-1, *frames.shape[2:]))
    return tokens.reshape(*frames.shape[:2], *tokens.shape[1:])


def _start_streaming(config: ReflectorConfig, params: Params, frames: Array, text: Text) -> StreamingState:
    embeddings = apply(config, params, "embed", text.tokens)
    length = text.tokens.shape[1]
    slots = length + config.max_frames * config.frame_tokens
    state = StreamingState(init_cache(config.llava.language, len(frames), slots), text, jnp.int32(0))
    cache, _ = _extend(config, params, state, embeddings, jnp.arange(length))
    return _append_streaming(config, params, state._replace(cache=cache), frames)[0]


def _append_streaming(config: ReflectorConfig, params: Params, state: StreamingState, frames: Array):
    batch, count = frames.shape[:2]
    tokens = _frame_tokens(config, params, frames)
    first = state.text.tokens.shape[1] + state.count * config.frame_tokens
    slots = first + jnp.arange(count * config.frame_tokens)
    cache, hidden = _extend(config, params, state, tokens.reshape(batch, len(slots), -1), slots)
    logits = apply(config, params, "reward", hidden.reshape(tokens.shape).mean(2))
    return state._replace(cache=cache, count=state.count + count), logits


def _extend(
    config: ReflectorConfig, params: Params, state: StreamingState, embeddings: Array, slots: Array
) -> tuple[Cache, Array]:
    """Decodes embeddings [B, N, D] at slots [N]; slots not yet written rank behind every query and stay unseen."""
    keys = jnp.arange(state.cache["k"].shape[2])
    mask = attention_mask(config, state.text, slots, keys)
    rotary = positions(state.text, slots)
    hidden, cache = apply(config, params, "decode", embeddings, rotary, mask, state.cache, slots[0])
    return cache, hidden


def _start_uniform(config: ReflectorConfig, params: Params, frames: Array, text: Text) -> UniformState:
    language = config.llava.language
    shape = (len(frames), config.max_frames, config.frame_tokens, language.width)
    state = UniformState(jnp.zeros(shape, language.dtype), text, jnp.int32(0))
    return _remember(state, _frame_tokens(config, params, frames))


def _append_uniform(config: ReflectorConfig, params: Params, state: UniformState, frames: Array):
    first, state = state.count, _remember(state, _frame_tokens(config, params, frames))
    judge = lambda t: uniform_logits(config, params, state.tokens, state.text, t)
    return state, jax.lax.map(judge, first + jnp.arange(frames.shape[1])).T


def _remember(state: UniformState, tokens: Array) -> UniformState:
    buffer = jax.lax.dynamic_update_slice_in_dim(state.tokens, tokens.astype(state.tokens.dtype), state.count, axis=1)
    return state._replace(tokens=buffer, count=state.count + tokens.shape[1])
