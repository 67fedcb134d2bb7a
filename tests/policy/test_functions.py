# SPDX-License-Identifier: Apache-2.0
"""The policy as pure functions: one distribution for sampling and scoring, preprocessing, prompts, presets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.policy import (
    PolicyConfig,
    functions,
    init_policy,
    laplace_log_prob,
    make_policy_fn,
    tokenize_policy_prompts,
)
from worldenv_jax.policy.functions import prepare_inputs
from worldenv_jax.policy.laplace import clip_log_scale, sample_laplace
from worldenv_jax.types import Observation, Statistics

CONFIG = PolicyConfig.debug()
KEYS = jax.random.split(jax.random.key(1), 2)  # one per row
policy_distribution = jax.jit(functions.policy_distribution, static_argnums=0)
STATISTICS = Statistics(-jnp.ones(7), jnp.ones(7), -jnp.ones(8), jnp.ones(8))


@pytest.fixture(scope="module")
def params():
    return init_policy(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def observation():
    images = np.random.default_rng(0).integers(0, 256, (2, 1, 32, 32, 3), dtype=np.uint8)
    text = tokenize_policy_prompts(CONFIG, ["Put the red box on the white plate", "push it"])
    return Observation(images, np.zeros((2, 8), np.float32), text)


def test_log_prob_by_hand():
    # b = e^-1, |a - loc| = 0.5: 1 - 0.5 e - ln 2.
    value = laplace_log_prob(jnp.array([0.7]), jnp.array([0.2]), jnp.array([-1.0]))
    np.testing.assert_allclose(value, [1.0 - 0.5 * np.e - np.log(2.0)], rtol=1e-6)


def test_samples_have_the_laplace_mean_deviation():
    keys = jax.random.split(jax.random.key(0), 2)
    samples = sample_laplace(keys, jnp.full((2, 100_000), 0.3), jnp.full((2, 100_000), -1.0))
    assert not jnp.array_equal(samples[0], samples[1])
    # E|x - loc| = b; the median is loc. Standard error of the first: b / sqrt(n) = 8e-4.
    np.testing.assert_allclose(jnp.abs(samples - 0.3).mean(), np.exp(-1.0), atol=4e-3)
    np.testing.assert_allclose(jnp.median(samples), 0.3, atol=4e-3)


def test_clip_keeps_the_gradient_that_leads_back_inside():
    gradient = lambda x, sign: jax.grad(lambda x: sign * clip_log_scale(x, -2.0, 0.5))(x)
    assert clip_log_scale(-3.0, -2.0, 0.5) == -2.0 and clip_log_scale(1.0, -2.0, 0.5) == 0.5
    # Descent on -x raises x, which leads back from -3 and further away from 1.
    assert gradient(-3.0, -1.0) == -1.0 and gradient(-3.0, 1.0) == 0.0
    assert gradient(1.0, 1.0) == 1.0 and gradient(1.0, -1.0) == 0.0
    assert gradient(0.0, 1.0) == 1.0 and gradient(0.0, -1.0) == -1.0


def test_samples_are_scored_by_the_distribution_they_came_from(params, observation):
    step = jax.jit(make_policy_fn(CONFIG, STATISTICS, scale_factor=3.0))(params, KEYS, observation)
    loc, log_scale = policy_distribution(CONFIG, params, STATISTICS, observation)
    # The head starts at -3: clipped to -2 and then widened threefold.
    np.testing.assert_allclose(log_scale, -2.0, atol=1e-6)
    np.testing.assert_allclose(step.log_scale, -2.0 + np.log(3.0), atol=1e-6)
    b = np.exp(-2.0) * 3.0
    expected = -np.log(2 * b) - np.abs(np.asarray(step.actions) - np.asarray(loc)) / b
    np.testing.assert_allclose(step.log_prob, expected.sum(-1), rtol=1e-4)
    np.testing.assert_allclose(step.loc, loc)


def test_deterministic_policy_acts_at_loc_whatever_the_key(params, observation):
    act = jax.jit(make_policy_fn(CONFIG, STATISTICS, deterministic=True))
    first, second = (act(params, keys, observation) for keys in (KEYS, KEYS[::-1]))
    np.testing.assert_array_equal(first.actions, first.loc)
    np.testing.assert_array_equal(first.actions, second.actions)


def test_diffusion_has_no_density(observation):
    config = PolicyConfig.debug(head="diffusion", diffusion_steps=2)
    params = init_policy(config, jax.random.key(0))
    with pytest.raises(ValueError, match="no density"):
        policy_distribution(config, params, STATISTICS, observation)
    step = jax.jit(make_policy_fn(config, STATISTICS))(params, KEYS, observation)
    assert jnp.isfinite(step.actions).all() and jnp.isnan(step.log_prob).all()


def test_adapters_start_as_the_identity_and_take_gradients(observation):
    config = dataclasses.replace(CONFIG, lora_rank=4)
    params = init_policy(config, jax.random.key(0))
    loc = lambda params: policy_distribution(config, params, STATISTICS, observation)[0]
    np.testing.assert_allclose(loc(params), loc({"params": params["params"]}), atol=1e-5)
    gradient = jax.jit(jax.grad(lambda lora: loc({**params, "lora": lora}).sum()))(params["lora"])
    assert set(gradient) == {"dino", "siglip", "projector", "llama"}
    assert all(jnp.abs(x["b"]).max() > 0 for x in gradient["llama"]["layers"].values())


def test_images_of_the_right_size_are_only_normalised(observation):
    inputs = prepare_inputs(CONFIG, STATISTICS, observation)
    x = observation.images.astype(np.float64) / 255.0
    np.testing.assert_allclose(inputs.siglip_images, (x - 0.5) / 0.5, atol=1e-6)
    dino = (x - np.array(CONFIG.dino_mean)) / np.array(CONFIG.dino_std)
    np.testing.assert_allclose(inputs.dino_images, dino, atol=1e-6)


def test_other_sizes_are_resized_and_cropped(observation):
    large = observation._replace(images=np.repeat(np.repeat(observation.images, 2, axis=2), 2, axis=3))
    resized = prepare_inputs(CONFIG, STATISTICS, large)
    cropped = prepare_inputs(dataclasses.replace(CONFIG, center_crop=True), STATISTICS, large)
    assert resized.dino_images.shape == cropped.dino_images.shape == (2, 1, 32, 32, 3)
    assert np.abs(resized.dino_images - cropped.dino_images).max() > 0.1


def test_observation_errors_list_both_sides(params, observation):
    bad = observation._replace(images=np.zeros((2, 2, 32, 32, 3), np.uint8), proprio=np.zeros((2, 7)))
    with pytest.raises(ValueError, match="views: got 2, expected 1; proprioception: got 7, expected 8"):
        policy_distribution(CONFIG, params, STATISTICS, bad)


def test_prompts_begin_with_bos_lower_case_and_end_with_the_last_token():
    text = tokenize_policy_prompts(CONFIG, ["Push It", "push it"])
    np.testing.assert_array_equal(text.tokens[0], text.tokens[1])
    assert text.tokens.shape == (2, CONFIG.text_length) and text.tokens[0, 0] == 1
    longer = tokenize_policy_prompts(dataclasses.replace(CONFIG, last_token=7), ["push it"])
    end = text.mask[0].sum()
    assert longer.mask[0].sum() == end + 1 and longer.tokens[0, end] == 7
    with pytest.raises(ValueError, match="text_length is 24"):
        tokenize_policy_prompts(CONFIG, ["put the box on the plate, " * 9])


@pytest.mark.parametrize("preset", ["debug", "tabletop", "libero_small", "libero_full"])
def test_presets_are_static_arguments_with_consistent_shapes(preset):
    config = getattr(PolicyConfig, preset)()
    assert hash(config) == hash(getattr(PolicyConfig, preset)())
    params = jax.eval_shape(lambda key: init_policy(config, key), jax.random.key(0))
    shapes = Observation(
        jax.ShapeDtypeStruct((2, config.views, 256, 256, 3), jnp.uint8),
        jax.ShapeDtypeStruct((2, 8), jnp.float32),
        jax.tree.map(
            lambda dtype: jax.ShapeDtypeStruct((2, config.text_length), dtype),
            type(tokenize_policy_prompts(CONFIG, ["x"]))(jnp.int32, jnp.bool_),
        ),
    )
    loc, log_scale = jax.eval_shape(lambda p, o: policy_distribution(config, p, STATISTICS, o), params, shapes)
    assert loc.shape == log_scale.shape == (2, config.chunk, 7)
    assert loc.dtype == log_scale.dtype == jnp.float32
