# SPDX-License-Identifier: Apache-2.0
"""Losses of cloning against hand arithmetic on the policy's own distribution; augmentation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.configs import AugmentationConfig
from worldenv_jax.policy import PolicyConfig, init_policy, policy_distribution, tokenize_policy_prompts
from worldenv_jax.training.cloning import CloningBatch, augment, make_action_loss, make_scale_loss
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


def test_augmentation_shifts_by_whole_pixels_the_same_for_all_views():
    row = np.arange(8, dtype=np.uint8)
    images = np.broadcast_to((10 * row)[None, None, None, :, None], (64, 2, 8, 8, 3)).astype(np.uint8)
    moved = np.asarray(augment(jax.random.key(0), jnp.asarray(images), AugmentationConfig(shift=2)))
    np.testing.assert_array_equal(moved[:, 0], moved[:, 1])
    offsets = {int(v) for v in moved[:, 0, 4, 4, 0].astype(int) // 10 - 4}  # column 4 shows column 4 + offset
    assert offsets == {-2, -1, 0, 1, 2}
    assert moved.dtype == np.uint8


def test_augmentation_brightness_stays_in_range():
    images = jnp.full((32, 1, 4, 4, 3), 250, jnp.uint8)
    bright = np.asarray(augment(jax.random.key(1), images, AugmentationConfig(brightness=0.2)))
    assert bright.max() == 255 and bright.min() >= 250 - 51 and len(np.unique(bright[:, 0, 0, 0, 0])) > 5
    np.testing.assert_array_equal(augment(jax.random.key(1), images, NONE), images)
