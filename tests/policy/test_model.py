# SPDX-License-Identifier: Apache-2.0
"""The policy model: padding, the two masks, gradients through the prefix, FiLM, views, diffusion."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.networks.vision_transformer import ViTConfig
from worldenv_jax.policy import PolicyConfig, diffusion_actions, diffusion_loss, functions, init_policy
from worldenv_jax.policy.model import Inputs, Policy
from worldenv_jax.types import Observation, Statistics, Text

CONFIG = PolicyConfig.debug()
apply_policy = jax.jit(functions.apply_policy, static_argnames=("config", "method"))
STATISTICS = Statistics(-jnp.ones(7), jnp.ones(7), -jnp.ones(8), jnp.ones(8))


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def params():
    return init_policy(CONFIG, jax.random.key(0))


def make_inputs(config: PolicyConfig, lengths: list[int], text_length: int = 24) -> Inputs:
    rng = np.random.default_rng(3)
    size = (len(lengths), config.views, config.image_size, config.image_size, 3)
    images = rng.standard_normal((2, *size)).astype(np.float32)
    tokens = jnp.asarray(rng.integers(5, 500, (len(lengths), text_length)), jnp.int32)
    mask = jnp.arange(text_length) < jnp.asarray(lengths)[:, None]
    proprio = jnp.asarray(rng.standard_normal((len(lengths), 8)), jnp.float32)
    return Inputs(jnp.asarray(images[0]), jnp.asarray(images[1]), proprio, Text(tokens, mask))


@pytest.mark.parametrize("attention", ["bidirectional", "prefix"])
def test_a_row_does_not_depend_on_padding_or_on_the_rows_beside_it(params, attention):
    config = dataclasses.replace(CONFIG, attention=attention)
    inputs = make_inputs(config, [9, 24])
    together, _ = apply_policy(config, params, inputs)
    for row, length in enumerate([9, 24]):
        alone = jax.tree.map(lambda x, row=row: x[row : row + 1], inputs)
        alone = alone._replace(text=Text(alone.text.tokens[:, :length], alone.text.mask[:, :length]))
        loc, _ = apply_policy(config, params, alone)
        np.testing.assert_allclose(loc[0], together[row], atol=1e-5)


def test_every_prompt_position_reaches_the_actions(params):
    inputs = make_inputs(CONFIG, [10])
    text = lambda tokens: apply_policy(CONFIG, params, inputs._replace(text=Text(tokens, inputs.text.mask)))[0]
    before = text(inputs.text.tokens)
    for position in (0, 1, 8, 9):
        assert jnp.abs(text(inputs.text.tokens.at[0, position].add(1)) - before).max() > 1e-6, position
    np.testing.assert_array_equal(text(inputs.text.tokens.at[0, 10:].add(1)), before)


def test_prefix_mask_hides_the_slots_from_the_prompt(params):
    """With the prefix mask a cached context equals a full pass under the explicit mask."""
    config = dataclasses.replace(CONFIG, attention="prefix")
    inputs = make_inputs(CONFIG, [10, 24])
    cached = apply_policy(
        config, params, apply_policy(config, params, inputs, method=Policy.encode), method=Policy.decode
    )

    def explicit(model, inputs):
        context = model.encode(inputs)
        start = context.embeddings.shape[1]
        slots = jnp.zeros((2, CONFIG.num_slots, CONFIG.llama.width))
        stop = model.llama.embed(jnp.full((2, 1), CONFIG.stop_token))
        embeddings = jnp.concatenate([context.embeddings, context.last_token, slots, stop], axis=1)
        suffix = context.last_position + jnp.arange(CONFIG.num_slots + 2)
        valid = jnp.concatenate([context.valid, jnp.ones(suffix.shape, bool)], axis=1)
        prefix = jnp.arange(valid.shape[1]) < start
        mask = valid[:, None, None] & (~prefix[:, None] | prefix)[None, None]
        positions = jnp.concatenate([context.positions, suffix], axis=1)
        return model.llama(embeddings, positions, mask)[0][:, start:]

    np.testing.assert_allclose(cached.states, apply_policy(CONFIG, params, inputs, method=explicit), atol=1e-5)


def test_detached_prefix_takes_no_gradient_through_the_towers(params):
    def gradient(detach):
        config = dataclasses.replace(CONFIG, attention="prefix", detach_prefix=detach)
        loss = lambda p: apply_policy(config, p, make_inputs(config, [9]))[0].sum()
        return jax.jit(jax.grad(loss))(params)["params"]

    attached, detached = gradient(False), gradient(True)
    assert jnp.abs(attached["dino"]["patch_embed"]["kernel"]).max() > 0
    assert not jnp.abs(detached["dino"]["patch_embed"]["kernel"]).max() > 0
    assert jnp.abs(detached["llama"]["layers"]["q_proj"]["kernel"]).max() > 0


def test_film_with_zero_weights_is_the_identity():
    config = dataclasses.replace(CONFIG, film=True)
    params = init_policy(config, jax.random.key(0))
    for tower in ("dino", "siglip"):
        for name in ("film_scale", "film_shift"):
            zeros = jax.tree.map(jnp.zeros_like, params["params"][tower]["blocks"][name])
            params["params"][tower]["blocks"][name] = zeros
    inputs = make_inputs(config, [9, 12])
    plain, _ = apply_policy(CONFIG, params, inputs)
    np.testing.assert_allclose(apply_policy(config, params, inputs)[0], plain, atol=1e-5)


def test_film_reads_the_prompt_but_not_its_padding():
    config = dataclasses.replace(CONFIG, film=True)
    params = init_policy(config, jax.random.key(0))
    inputs = make_inputs(config, [9])
    features = lambda tokens: apply_policy(
        config, params, inputs._replace(text=Text(tokens, inputs.text.mask)), method=Policy.vision_features
    )[0]
    before = features(inputs.text.tokens)
    assert jnp.abs(features(inputs.text.tokens.at[0, 3].add(1)) - before).max() > 0
    np.testing.assert_array_equal(features(inputs.text.tokens.at[0, 12].add(1)), before)


@pytest.mark.parametrize("views", [1, 3])
def test_views_and_proprio_change_the_sequence_not_the_actions_shape(views):
    config = PolicyConfig.debug(views=views, use_proprio=views == 1)
    params = init_policy(config, jax.random.key(0))
    inputs = make_inputs(config, [9, 12])
    hidden = apply_policy(
        config, params, apply_policy(config, params, inputs, method=Policy.encode), method=Policy.decode
    )
    # Positions run without gaps from 0 to the stop token: patches, proprioception, prompt, slots, stop.
    for row, length in enumerate([9, 12]):
        used = np.sort(np.asarray(hidden.positions[row])[np.asarray(hidden.valid[row])])
        total = 4 * views + (views == 1) + length + config.num_slots + 1
        np.testing.assert_array_equal(used, np.arange(total))
    loc, log_scale = apply_policy(config, params, inputs)
    assert loc.shape == log_scale.shape == (2, 4, 7)


def test_scale_head_starts_at_minus_three(params):
    _, log_scale = apply_policy(CONFIG, params, make_inputs(CONFIG, [9]))
    np.testing.assert_allclose(log_scale, -3.0, atol=0.1)


def test_diffusion_actions_are_bounded_and_the_loss_has_a_gradient():
    config = PolicyConfig.debug(head="diffusion", diffusion_steps=5)
    params = init_policy(config, jax.random.key(0))
    inputs = make_inputs(config, [9, 12])
    observation = Observation(jnp.zeros((2, 1, 32, 32, 3), jnp.uint8), inputs.proprio, inputs.text)
    noise = jax.random.normal(jax.random.key(1), (2, 4, 7))
    sample = jax.jit(diffusion_actions, static_argnums=0)
    actions = sample(config, params, STATISTICS, observation, noise)
    assert jnp.abs(actions).max() <= 1.0
    arguments = (STATISTICS, jax.random.key(2), observation, actions)
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: diffusion_loss(config, p, *arguments)))(params)
    assert 0.3 < loss < 5.0
    assert jnp.abs(gradient["params"]["noisy_action_projector"]["fc1"]["kernel"]).max() > 0


def test_config_lists_all_problems():
    with pytest.raises(ValueError) as error:
        PolicyConfig.debug(
            head="gaussian", detach_prefix=True, text_length=4000, siglip=ViTConfig(64, 16, 16, 3, 2, 32)
        )
    for words in ("head is 'gaussian'", "detach_prefix", "positions", "differ in image size"):
        assert words in str(error.value)
