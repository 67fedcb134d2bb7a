# SPDX-License-Identifier: Apache-2.0
"""Losses of cloning against hand arithmetic on the policy's own distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.configs import AugmentationConfig
from worldenv_jax.policy import PolicyConfig, init_policy, policy_distribution, tokenize_policy_prompts
from worldenv_jax.training.cloning import CloningBatch, make_action_loss, make_scale_loss
from worldenv_jax.types import Observation, Statistics, Text

CONFIG = PolicyConfig.debug()
ONES = np.ones(7, np.float32)
STATISTICS = Statistics(-ONES, ONES, np.full(8, -2, np.float32), np.full(8, 2, np.float32))
NONE = AugmentationConfig()


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    text = tokenize_policy_prompts(CONFIG, ["put the red box on the white plate", "open the drawer"])
    images = rng.integers(0, 256, (2, 1, 32, 32, 3)).astype(np.uint8)
    observation = Observation(images, rng.normal(size=(2, 8)).astype(np.float32), Text(*map(jnp.asarray, text)))
    return CloningBatch(observation, rng.uniform(-1, 1, (2, CONFIG.chunk, 7)).astype(np.float32))


@pytest.fixture(scope="module")
def params():
    return init_policy(CONFIG, jax.random.key(0))


def test_action_loss_is_the_mean_absolute_error(batch, params):
    loss, metrics = make_action_loss(CONFIG, STATISTICS, NONE)(params, jax.random.key(0), batch)
    loc = np.asarray(policy_distribution(CONFIG, params, STATISTICS, batch.observation)[0], np.float64)
    np.testing.assert_allclose(loss, np.abs(batch.actions - loc).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["l1_gripper"], np.abs(batch.actions - loc)[..., 6].mean(), rtol=1e-5)


def test_scale_loss_is_the_laplace_likelihood_and_leaves_the_mean_alone(batch, params):
    loss_fn = make_scale_loss(CONFIG, STATISTICS, NONE)
    loss, _ = loss_fn(params, jax.random.key(0), batch)
    loc, log_scale = (
        np.asarray(x, np.float64) for x in policy_distribution(CONFIG, params, STATISTICS, batch.observation)
    )
    nll = log_scale + np.abs(batch.actions - loc) / np.exp(log_scale) + np.log(2)
    np.testing.assert_allclose(loss, nll.sum(-1).mean(), rtol=1e-5)
    gradient = jax.grad(lambda p: loss_fn(p, jax.random.key(0), batch)[0])(params)["params"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["action_head"]))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient["scale_head"]))
