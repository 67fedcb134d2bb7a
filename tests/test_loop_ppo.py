# SPDX-License-Identifier: Apache-2.0
"""LOOP against hand arithmetic and an independent float64 NumPy version, with holes in the masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.loop_ppo import LoopConfig, clipped_loss, groups_with_contrast, leave_one_out_advantages


def test_leave_one_out_by_hand():
    # Group 1: R = 1, 0, 0 -> baselines 0, 1/2, 1/2. Group 2: R = .9, .6, .3 -> baselines .45, .6, .75.
    rewards = jnp.array([[1.0, 0.0, 0.0], [0.9, 0.6, 0.3]])
    expected = [[1.0, -0.5, -0.5], [0.45, 0.0, -0.45]]
    np.testing.assert_allclose(leave_one_out_advantages(rewards), expected, atol=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out_advantages(jnp.ones((3, 1)))


def test_groups_with_contrast():
    rewards = jnp.array([[1.0, 1.0], [0.3, 0.8], [0.50, 0.51]])
    np.testing.assert_array_equal(groups_with_contrast(rewards, LoopConfig(min_contrast=0.02)), [False, True, False])


@pytest.mark.parametrize("geometric,low", [(False, 0.9), (True, 1 / 1.1)])
def test_clipped_loss_by_hand(geometric, low):
    # One chunk of two steps, two trajectories; ratios 1.5 and 0.5.
    # A = +2: step 1 min(3, 1.1*2=2.2) = 2.2; step 2 min(1, low*2) = 1      -> loss -(2.2+1)/2 = -1.6
    # A = -1: step 1 min(-1.5, -1.1) = -1.5;  step 2 is invalid              -> loss 1.5
    log_ratio = jnp.log(jnp.array([[[1.5, 0.5]], [[1.5, 0.5]]]))
    valid = jnp.array([[[True, True]], [[True, False]]])
    config = LoopConfig(clip=0.1, geometric_clip=geometric)
    loss, metrics = clipped_loss(log_ratio, jnp.zeros_like(log_ratio), jnp.array([2.0, -1.0]), valid, config)
    np.testing.assert_allclose(loss, (-1.6 + 1.5) / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["ratio_mean"], (1.5 + 0.5 + 1.5) / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["clip_fraction"], 1 / 3, rtol=1e-6)
    # A negative advantage with a small ratio is where the lower bound shows.
    loss, _ = clipped_loss(log_ratio[:1], jnp.zeros((1, 1, 2)), jnp.array([-1.0]), valid[:1], config)
    np.testing.assert_allclose(loss, (1.5 + low) / 2, rtol=1e-6)


def numpy_loss(log_prob, behaviour, advantages, valid, epsilon):
    """Loops in float64, written from the paper's formula; advantages [B] or [B, T]."""
    losses, advantages = [], np.broadcast_to(advantages.reshape(len(advantages), -1), valid.shape[:2])
    for b in range(log_prob.shape[0]):
        terms = []
        for t in range(log_prob.shape[1]):
            for k in range(log_prob.shape[2]):
                if valid[b, t, k]:
                    r = np.exp(np.float64(log_prob[b, t, k]) - np.float64(behaviour[b, t, k]))
                    a = advantages[b, t]
                    terms.append(-min(r * a, np.clip(r, 1 - epsilon, 1 + epsilon) * a))
        if terms:
            losses.append(np.mean(terms))
    return np.mean(losses) if losses else 0.0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("shape", [(6,), (6, 4)], ids=["per_trajectory", "per_chunk"])
def test_clipped_loss_against_numpy(seed, jit, shape):
    rng = np.random.default_rng(seed)
    log_prob, behaviour = rng.normal(0, 0.3, (2, 6, 4, 5)).astype(np.float32)
    advantages = rng.normal(size=shape).astype(np.float32)
    valid = rng.random((6, 4, 5)) < 0.6  # holes anywhere
    valid[2] = False  # a dropped trajectory
    function = jax.jit(clipped_loss, static_argnums=4) if jit else clipped_loss
    loss, metrics = function(log_prob, behaviour, advantages, valid, LoopConfig(clip=0.2))
    np.testing.assert_allclose(loss, numpy_loss(log_prob, behaviour, advantages, valid, 0.2), rtol=2e-6)
    assert metrics["kl"] >= 0
    np.testing.assert_allclose(metrics["kept"], 5 / 6)


def test_no_valid_step_gives_zero_loss_and_finite_gradients():
    def loss(log_prob):
        return clipped_loss(
            log_prob, jnp.full((2, 1, 3), -1e30), jnp.ones(2), jnp.zeros((2, 1, 3), bool), LoopConfig()
        )[0]

    value, gradient = jax.value_and_grad(loss)(jnp.zeros((2, 1, 3)))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_gradient_stops_outside_the_clip():
    # r = 1.5 with A > 0 is past the upper bound: no gradient. r = 0.5 with A > 0 still has one.
    def loss(log_prob):
        return clipped_loss(log_prob, jnp.zeros((1, 1, 2)), jnp.ones(1), jnp.ones((1, 1, 2), bool), LoopConfig())[0]

    gradient = jax.grad(loss)(jnp.log(jnp.array([[[1.5, 0.5]]])))
    np.testing.assert_allclose(gradient, [[[0.0, -0.25]]], atol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="clip"):
        LoopConfig(clip=1.5)
