# SPDX-License-Identifier: Apache-2.0
"""Advantages with a critic, by hand and against loops in float64; a critic that learns what it can know."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.critic import (
    CriticConfig,
    explained_variance,
    generalized_advantages,
    leave_one_out,
    live_chunks,
    make_critic,
)
from worldenv_jax.loop_ppo import leave_one_out_advantages
from worldenv_jax.mesh import make_mesh, shard_batch, shard_state
from worldenv_jax.types import Observation, Rollout, Statistics, Text

STATISTICS = Statistics(-np.ones(7), np.ones(7), -np.ones(8), np.ones(8))


def test_generalized_advantages_by_hand():
    # V = 0.2, 0.6, 0.5 and R = 1: differences 0.4, -0.1, 0.5. Ends after two chunks with R = 0: 0.4, -0.6.
    values, reward = jnp.array([[0.2, 0.6, 0.5], [0.2, 0.6, 0.9]]), jnp.array([1.0, 0.0])
    live = jnp.array([[True, True, True], [True, True, False]])
    expected = [[0.4 + 0.5 * (-0.1 + 0.5 * 0.5), -0.1 + 0.5 * 0.5, 0.5], [0.4 - 0.5 * 0.6, -0.6, 0.0]]
    np.testing.assert_allclose(generalized_advantages(values, reward, live, 0.5), expected, atol=1e-6)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.3, 1.0])
def test_generalized_advantages_against_numpy(gae_lambda):
    rng = np.random.default_rng(0)
    values, reward, ends = rng.random((5, 7)), rng.random(5), np.array([7, 1, 4, 7, 0])
    expected = np.zeros((5, 7))
    for row, end in enumerate(ends):
        after = [*values[row, 1:end], reward[row]]
        for t in range(end):
            expected[row, t] = sum(gae_lambda ** (k - t) * (after[k] - values[row, k]) for k in range(t, end))
    live = np.arange(7) < ends[:, None]
    got = jax.jit(generalized_advantages, static_argnums=3)(values, jnp.asarray(reward), live, gae_lambda)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    if gae_lambda == 1.0:  # what is left is a baseline
        np.testing.assert_allclose(expected, np.where(live, reward[:, None] - values, 0), atol=1e-12)


def test_leave_one_out_by_hand():
    # One group of three, two chunks; the third trajectory has ended before the second.
    advantages = jnp.array([[1.0, 4.0], [2.0, 1.0], [6.0, 9.0]])
    live = jnp.array([[True, True], [True, True], [True, False]])
    expected = [[1 - 4.0, 4 - 1.0], [2 - 3.5, 1 - 4.0], [6 - 1.5, 0.0]]
    np.testing.assert_allclose(leave_one_out(advantages, live, 3), expected, atol=1e-6)
    alone = leave_one_out(advantages, jnp.array([[True, True], [True, False], [True, False]]), 3)
    np.testing.assert_allclose(alone[:, 1], [4.0, 0.0, 0.0])


def test_without_knowledge_it_is_loop():
    """A critic that says the same everywhere, lambda 1: the leave-one-out advantages of the rewards."""
    reward = np.random.default_rng(1).random(12).astype(np.float32)
    live = jnp.ones((12, 3), bool)
    advantages = leave_one_out(generalized_advantages(jnp.full((12, 3), 0.4), reward, live, 1.0), live, 4)
    expected = leave_one_out_advantages(reward.reshape(3, 4)).reshape(12, 1)
    np.testing.assert_allclose(advantages, np.repeat(expected, 3, 1), atol=1e-6)


def test_explained_variance_by_hand():
    rewards, live = jnp.array([[1.0], [0.0]]), jnp.array([[True, True], [True, False]])
    # Of R = 1, 1, 0 the mean is 2/3, the spread 2/3; errors 0, 1/4, 1/4.
    values = jnp.array([[1.0, 0.5], [0.5, 7.0]])
    np.testing.assert_allclose(explained_variance(values, rewards, live), 1 - 0.5 / (2 / 3), rtol=1e-6)


def _rollout(seed: int, batch: int = 64, chunks: int = 4, steps: int = 2):
    """The reward is 1 where the fingers are closed from chunk 2 on and the prompt says 3; they open at random."""
    rng = np.random.default_rng(seed)
    closed, asked = rng.random(batch) < 0.5, rng.random(batch) < 0.5
    proprio = rng.uniform(-1, 1, (batch, chunks, 8)).astype(np.float32)
    proprio[:, 2:, 6] = np.where(closed, 0.8, -0.8)[:, None]
    valid = np.ones((batch, chunks, steps), bool)
    valid[: batch // 4, 3:] = False
    text = Text(np.stack([np.ones(batch), np.where(asked, 3, 4)], 1).astype(np.int32), np.ones((batch, 2), bool))
    reward = (closed & asked).astype(np.float32)
    return SimpleNamespace(observations=Observation(None, proprio, text), valid=valid, reward=reward), closed & asked


def _as_rollout(fake):
    blank = {name: np.zeros(0, np.float32) for name in Rollout._fields}
    return Rollout(**{**blank, "observations": fake.observations, "valid": fake.valid, "reward": fake.reward})


def test_a_critic_learns_what_can_be_known():
    config = CriticConfig(updates=40, learning_rate=3e-3)
    critic = make_critic(config, STATISTICS, vocabulary=8, chunks=4)
    state = critic.init(jax.random.key(0))
    np.testing.assert_allclose(critic.values(state, _as_rollout(_rollout(0)[0])), 0.5)
    for number in range(3):
        rollout = _as_rollout(_rollout(number, 512)[0])
        state, metrics = critic.learn(state, jax.random.key(number), rollout)
    fake, success = _rollout(9, 512)
    asked = fake.observations.text.tokens[:, 1] == 3
    values = critic.values(state, _as_rollout(fake))
    live = np.asarray(live_chunks(fake))
    assert np.abs(values - success[:, None])[:, 2:][live[:, 2:]].mean() < 0.05
    assert np.mean(values[~asked, 0]) < 0.05 and 0.4 < np.mean(values[asked, 0]) < 0.6  # the prompt alone is known
    assert metrics["explained_variance"] > 0.5 and metrics["critic_loss"] < 0.4


def test_one_and_eight_devices_agree():
    critic = make_critic(CriticConfig(updates=20), STATISTICS, vocabulary=8, chunks=4)
    rollout, results = _as_rollout(_rollout(0)[0]), []
    for mesh in (make_mesh(1, devices=jax.devices()[:1]), make_mesh(8)):
        with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
            rows = rollout._replace(
                observations=shard_batch(rollout.observations._replace(images=rollout.reward), mesh),
                valid=shard_batch(rollout.valid, mesh),
                reward=shard_batch(rollout.reward, mesh),
            )
            state = shard_state(critic.init(jax.random.key(0)), mesh)
            state, metrics = jax.block_until_ready(critic.learn(state, jax.random.key(1), rows))
            results.append((jax.device_get(critic.values(state, rows)), jax.device_get(metrics)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)


def test_bad_input():
    with pytest.raises(ValueError, match="gae_lambda"):
        CriticConfig(gae_lambda=1.1)
