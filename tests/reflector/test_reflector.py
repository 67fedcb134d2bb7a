# SPDX-License-Identifier: Apache-2.0
"""The judge: streaming equals one pass, uniform equals its definition, what it must not see, losses, errors."""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.reflector import (
    ReflectorConfig,
    answering,
    init_reflector,
    make_reflector_fns,
    reflector_loss,
    success_logits,
    tokenize_reflector_prompts,
    trainable_patterns,
)
from worldenv_jax.reflector import loss as loss_module
from worldenv_jax.reflector.llava import LlavaConfig
from worldenv_jax.types import Prediction, Starts, Text

STREAMING = ReflectorConfig.debug()
UNIFORM = replace(STREAMING, mode="uniform", sampled_frames=3)
CAUSAL_TWO_VIEWS = replace(STREAMING, views=2, bidirectional_frames=False, lora_rank=2)
COUNT = 5
INSTRUCTIONS = ["put the bowl on the plate", "lift it"]


def frames_of(config: ReflectorConfig, seed: int = 0) -> np.ndarray:
    shape = (2, COUNT, config.views, config.image_size, config.image_size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def one_pass(config, params, frames, text, mask=None, index=None):
    mask = np.ones(frames.shape[:2], bool) if mask is None else mask
    return np.asarray(jax.jit(success_logits, static_argnums=0)(config, params, frames, text, mask, index))


@pytest.fixture(scope="module")
def streaming():
    params = init_reflector(STREAMING, jax.random.key(0))
    return params, tokenize_reflector_prompts(STREAMING, INSTRUCTIONS)


@pytest.mark.parametrize("config", [STREAMING, CAUSAL_TWO_VIEWS, UNIFORM, answering(UNIFORM)], ids=lambda c: c.kind)
def test_judging_in_chunks_equals_one_pass(config):
    params = init_reflector(config, jax.random.key(0))
    text, frames = tokenize_reflector_prompts(config, INSTRUCTIONS), frames_of(config)
    fns = make_reflector_fns(replace(config, temperature=2.0))

    @jax.jit
    def judge_all(frames):
        state = fns.init(params, Starts(frames[:, 0], None, None, text, None, None))
        chunks = frames[:, 1:].reshape(2, 2, 2, *frames.shape[2:]).swapaxes(0, 1)
        step = lambda state, chunk: fns.judge(params, state, Prediction(chunk, None))
        return jax.lax.scan(step, state, chunks)[1].swapaxes(0, 1).reshape(2, 4)

    expected = jax.nn.sigmoid(one_pass(config, params, frames, text)[:, 1:] / 2.0)
    np.testing.assert_allclose(judge_all(frames), expected, rtol=0, atol=1e-5)


def test_a_frame_depends_on_the_past_and_the_instruction_only(streaming):
    params, text = streaming
    frames = frames_of(STREAMING)
    reference = one_pass(STREAMING, params, frames, text)
    changed = frames.copy()
    changed[:, 3] = 255 - changed[:, 3]
    got = one_pass(STREAMING, params, changed, text)
    np.testing.assert_allclose(got[:, :3], reference[:, :3], atol=1e-6)
    assert np.all(np.abs(got[:, 3:] - reference[:, 3:]) > 1e-5)
    other = one_pass(STREAMING, params, frames, Text(text.tokens[::-1], text.mask[::-1]))
    assert np.all(np.abs(other - reference) > 1e-5)


def test_padding_of_text_and_frames_changes_nothing(streaming):
    params, text = streaming
    frames = frames_of(STREAMING)
    reference = one_pass(STREAMING, params, frames, text)
    length = int(text.mask[1].sum())
    short = Text(text.tokens[1:, :length], text.mask[1:, :length])
    np.testing.assert_allclose(one_pass(STREAMING, params, frames[1:], short), reference[1:], atol=1e-5)
    mask = np.arange(COUNT) < np.array([[COUNT], [2]])
    got = one_pass(STREAMING, params, np.where(mask[..., None, None, None, None], frames, 0), text, mask)
    np.testing.assert_allclose(got[mask], reference[mask], atol=1e-5)


def test_left_out_frames_keep_the_times_of_the_others(streaming):
    params, text = streaming
    frames, mask = frames_of(STREAMING), np.ones((2, COUNT), bool)
    reference = one_pass(STREAMING, params, frames, text, mask, np.tile(np.arange(COUNT), (2, 1)))
    np.testing.assert_allclose(one_pass(STREAMING, params, frames, text), reference, atol=1e-6)
    hole = one_pass(STREAMING, params, frames[:, [0, 3]], text, mask[:, :2], np.array([[0, 3], [0, 3]]))
    # The same as a full pass in which the frames between are masked.
    masked = one_pass(STREAMING, params, frames, text, np.tile([True, False, False, True, False], (2, 1)))
    np.testing.assert_allclose(hole, masked[:, [0, 3]], atol=1e-5)


def test_uniform_reads_evenly_spaced_frames_up_to_now():
    params = init_reflector(UNIFORM, jax.random.key(0))
    text, frames = tokenize_reflector_prompts(UNIFORM, INSTRUCTIONS), frames_of(UNIFORM)
    got = one_pass(UNIFORM, params, frames, text)
    # At t = 4 the three samples are frames 0, 2 and 4: a streaming pass over those three ends in the same logit.
    expected = one_pass(STREAMING, params, frames[:, [0, 2, 4]], text)[:, -1]
    np.testing.assert_allclose(got[:, 4], expected, atol=1e-5)
    np.testing.assert_allclose(got[:, :3], one_pass(STREAMING, params, frames[:, :3], text), atol=1e-5)
    of_one = one_pass(replace(UNIFORM, sampled_frames=1), params, frames, text)
    np.testing.assert_allclose(of_one[:, 4], one_pass(STREAMING, params, frames[:, 4:5], text)[:, 0], atol=1e-5)


def test_loss_is_cross_entropy_of_the_frames_that_count(monkeypatch):
    logits = jnp.array([[0.0, math.log(3.0)], [math.log(3.0), 50.0]])
    monkeypatch.setattr(loss_module, "success_logits", lambda *_: logits)
    labels, mask = jnp.array([[True, True], [False, False]]), jnp.array([[True, True], [True, False]])
    loss, metrics = reflector_loss(STREAMING, None, None, None, labels, mask)
    # -ln of 1/2, 3/4 and 1 - 3/4.
    assert float(loss) == pytest.approx((math.log(2) + math.log(4 / 3) + math.log(4)) / 3, rel=1e-6)
    assert float(metrics["accuracy"]) == pytest.approx(1 / 3)
    assert float(metrics["false_positive_rate"]) == 1.0
    assert float(metrics["false_negative_rate"]) == 0.5
    assert float(metrics["positive_fraction"]) == pytest.approx(2 / 3)


def test_frozen_parts():
    frozen = replace(STREAMING, freeze_llava=True, lora_rank=2)
    names = ["params/reward_head/logit/kernel", "params/llava/projector/linear_1/kernel", "lora/llava/x/a"]
    trained = lambda config: [n for n in names if any(re.match(p, n) for p in trainable_patterns(config))]
    assert trained(STREAMING) == names
    assert trained(frozen) == [names[0], names[2]]
    assert trained(replace(frozen, lora_rank=0)) == names[:1]


def test_prompts():
    text = tokenize_reflector_prompts(STREAMING, INSTRUCTIONS)
    assert text.tokens.shape == (2, STREAMING.text_length) and text.tokens.dtype == np.int32
    assert text.mask[0].sum() > text.mask[1].sum() > 0
    assert np.all(text.tokens[~text.mask] == 0)
    with pytest.raises(ValueError, match=r"instructions \[1\] are empty"):
        tokenize_reflector_prompts(STREAMING, ["lift it", "  "])
    with pytest.raises(ValueError, match="raise text_length"):
        tokenize_reflector_prompts(replace(STREAMING, text_length=2), INSTRUCTIONS)


def test_bad_input(streaming):
    params, text = streaming
    frames, mask = frames_of(STREAMING), np.ones((2, COUNT), bool)
    with pytest.raises(ValueError, match=r"got frames .*16, 16, 3.* expected .*\(1, 32, 32, 3\)"):
        success_logits(STREAMING, params, frames[:, :, :, ::2, ::2], text, mask)
    with pytest.raises(ValueError, match="got 0 frames, expected 1 to max_frames = 33"):
        success_logits(STREAMING, params, frames[:, :0], text, mask[:, :0])
    with pytest.raises(ValueError, match="got frames float32"):
        success_logits(STREAMING, params, frames.astype(np.float32), text, mask)
    with pytest.raises(ValueError, match="mode 'stream'"):
        replace(STREAMING, mode="stream")
    with pytest.raises(ValueError, match="kind 'answer' needs mode 'uniform' and a question"):
        replace(STREAMING, kind="answer")
    with pytest.raises(ValueError, match="grid 4 is not a multiple of 3"):
        replace(STREAMING.llava, frame_grid=3)


@pytest.mark.parametrize(
    "config", [ReflectorConfig.tabletop(), ReflectorConfig.libero_small()], ids=["tabletop", "libero"]
)
def test_small_presets_stay_small(config):
    abstract = jax.eval_shape(lambda key: init_reflector(config, key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) < 1.5e6
    text = tokenize_reflector_prompts(config, ["put the purple cylinder on the white plate"])
    assert text.mask.sum() < config.text_length


@pytest.mark.parametrize("llava", [LlavaConfig.llava_1_5_7b(), LlavaConfig.onevision_0_5b()], ids=["1.5", "onevision"])
def test_full_sizes_judge_abstractly(llava):
    config = replace(ReflectorConfig.libero_full(), llava=llava)
    abstract = jax.eval_shape(lambda key: init_reflector(config, key), jax.random.key(0))
    frames = jax.ShapeDtypeStruct((2, 3, 1, 256, 256, 3), jnp.uint8)
    text = Text(jax.ShapeDtypeStruct((2, 64), jnp.int32), jax.ShapeDtypeStruct((2, 64), bool))
    mask = jax.ShapeDtypeStruct((2, 3), bool)
    logits = jax.eval_shape(lambda p, *inputs: success_logits(config, p, *inputs), abstract, frames, text, mask)
    assert logits.shape == (2, 3) and logits.dtype == jnp.float32
