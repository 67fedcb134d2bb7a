# SPDX-License-Identifier: Apache-2.0
"""Every preset constructs, and the shapes of its stages agree: abstractly, nothing is computed."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from worldenv_jax.configs import PRESETS, apply_variant, get_config
from worldenv_jax.overrides import from_dict, to_dict
from worldenv_jax.policy import init_policy, make_policy_fn
from worldenv_jax.reflector import init_reflector, make_reflector_fns
from worldenv_jax.rollout import RolloutParams, imagine_rollout
from worldenv_jax.simulator import Kinematics, init_simulator, make_simulator_fns
from worldenv_jax.training.train_state import trainable_mask
from worldenv_jax.types import Camera, Starts, Statistics, Text

ABSTRACT = jax.ShapeDtypeStruct


@functools.cache
def _params(name):
    config, key = get_config(name), jax.random.key(0)
    pairs = (init_policy, config.policy), (init_simulator, config.simulator), (init_reflector, config.reflector)
    return RolloutParams(*(jax.eval_shape(lambda k, i=i, c=c: i(c, k), key) for i, c in pairs))


def _starts(config, count):
    f32 = lambda *shape: ABSTRACT((count, *shape), jnp.float32)
    views, size = config.environment.views, config.environment.image_size
    text = lambda length: Text(ABSTRACT((count, length), jnp.int32), ABSTRACT((count, length), bool))
    return Starts(
        images=ABSTRACT((count, views, size, size, 3), jnp.uint8),
        proprio=f32(8),
        policy_text=text(config.policy.text_length),
        reflector_text=text(config.reflector.text_length),
        camera=Camera(f32(views, 3, 3), f32(views, 4, 4)),
        task=ABSTRACT((count,), jnp.int32),
        photographs=ABSTRACT((count, *config.simulator.photographs_shape), jnp.uint8),
    )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json_and_hash(name):
    config = get_config(name)
    assert from_dict(type(config), to_dict(config)) == config and hash(config) == hash(get_config(name))


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_stage_trains_exists(name):
    config, params = get_config(name), _params(name)
    simulator = {part: leaf for part, leaf in params.simulator.items() if part != "autoencoder"}
    stages = (
        (config.cloning, params.policy),
        (config.scale_head, params.policy),
        (config.autoencoder, params.simulator["autoencoder"]),
        (config.denoiser, simulator),
        (config.reflector_training, params.reflector),
        (config.post_training, params.policy),
    )
    for stage, tree in stages:
        optimizer = stage.optimizer
        assert any(jax.tree.leaves(trainable_mask(tree, optimizer.trainable)))
        trainable_mask(tree, tuple(pattern for pattern, _ in optimizer.group_learning_rates))
        assert getattr(stage, "batch_size", 0) % optimizer.micro_batches == 0
    trajectories = config.post_training.starts * config.rollout.samples
    assert trajectories % (config.post_training.minibatches * config.post_training.optimizer.micro_batches) == 0


@pytest.mark.parametrize("name", PRESETS)
def test_the_three_models_fit_into_one_rollout(name):
    config = get_config(name)
    statistics = Statistics(*(jnp.zeros(n) for n in (7, 7, 8, 8)))
    fns = (
        make_policy_fn(config.policy, statistics),
        make_simulator_fns(config.simulator, statistics, Kinematics.osc_pose()),
        make_reflector_fns(config.reflector),
    )
    imagine = lambda params, key, starts: imagine_rollout(*fns, params, key, starts, config.rollout)
    rollout = jax.eval_shape(imagine, _params(name), jax.random.key(0), _starts(config, 1))
    samples, chunks, chunk = config.rollout.samples, config.rollout.num_chunks, config.policy.chunk
    size = config.environment.image_size
    assert rollout.frames.shape == (samples, chunks, chunk, config.environment.views, size, size, 3)
    assert rollout.success_probability.shape == (samples, chunks, chunk)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"environment": replace(c.environment, views=2)}, "different numbers of views: .*'environment': 2"),
        (lambda c: {"environment": replace(c.environment, image_size=64)}, "environment.image_size is 64, simulator"),
        (
            lambda c: {"environment": replace(c.environment, photograph_size=64)},
            "environment.photograph_size is 64, simulator.photograph_size 0",
        ),
        (lambda c: {"rollout": replace(c.rollout, num_chunks=5)}, "simulator.max_chunks is 4"),
        (lambda c: {"collect": replace(c.collect, tries_per_start=0)}, "collect.tries_per_start is 0"),
        (lambda c: {"collect": replace(c.collect, try_again=1.5)}, "collect.try_again is 1.5"),
    ],
)
def test_models_that_do_not_fit_are_refused(change, message):
    config = get_config("debug")
    with pytest.raises(ValueError, match=message):
        replace(config, **change(config))


def test_the_last_row_of_the_ablation_has_neither():
    config = get_config("libero_cpu")
    neither, full = (apply_variant(config, name) for name in ("neither", "full"))
    assert neither.variant == "neither" and full == config
    assert (neither.collect.train_on_exploration, neither.rollout.reward) == (False, "binary")
    assert replace(neither, variant="full", collect=config.collect, rollout=config.rollout) == config
