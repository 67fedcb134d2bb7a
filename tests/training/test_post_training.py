# SPDX-License-Identifier: Apache-2.0
"""LOOP-PPO learns to reach in a world of one dimension; groups, starts and updates by hand."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.configs import PostTrainingConfig, get_config
from worldenv_jax.critic import CriticConfig
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.loop_ppo import LoopConfig
from worldenv_jax.mesh import make_mesh, shard_batch, shard_state, shardings
from worldenv_jax.policy import laplace_log_prob
from worldenv_jax.rollout import RolloutConfig, RolloutParams, end_of_trajectories, fold_in
from worldenv_jax.training.imagination import judged_successes, make_estimate
from worldenv_jax.training.post_training import (
    collect_contrast,
    flatten_chunks,
    make_imagine,
    make_update,
    merge_groups,
    sample_starts,
)
from worldenv_jax.training.train_state import OptimizerConfig, init_train_state
from worldenv_jax.types import Camera, Observation, PolicyStep, Prediction, ReflectorFns, SimulatorFns, Starts, Text

K, A, SAMPLES = 2, 7, 8
LOOP = LoopConfig(clip=0.2)
ROLLOUT = RolloutConfig(num_chunks=2, samples=SAMPLES, threshold=0.95)
SETTINGS = PostTrainingConfig(starts=8, minibatches=2, optimizer=OptimizerConfig(learning_rate=0.03))


def distribution(params, observation):
    """loc = w * goal + b in every dimension; the goal is proprio[7]."""
    goal = observation.proprio[:, 7]
    loc = jnp.tanh(goal[:, None, None] * params["w"] + params["b"]) * jnp.ones((1, K, A))
    return loc, jnp.full_like(loc, -1.5)


def policy(params, key, observation):
    loc, log_scale = distribution(params, observation)
    noise = jax.vmap(lambda k: jax.random.laplace(k, (K, A)))(key)
    actions = loc + jnp.exp(log_scale) * noise
    return PolicyStep(actions, laplace_log_prob(actions, loc, log_scale).sum(-1), loc, log_scale)


def step(params, key, state, actions):
    """The position is the sum of the first action dimension; proprio keeps the goal."""
    position = state[:, :1] + jnp.cumsum(actions[..., 0], axis=1)
    proprio = jnp.zeros((*position.shape, 8)).at[..., 0].set(position).at[..., 7].set(state[:, 1:])
    frames = jnp.zeros((*position.shape, 1, 2, 2, 3), jnp.uint8)
    return jnp.stack([position[:, -1], state[:, 1]], axis=1), Prediction(frames, proprio)


def judge(params, state, prediction):
    """R falls with the distance to three times the goal."""
    distance = jnp.abs(prediction.proprio[..., 0] - 3.0 * prediction.proprio[..., 7])
    return state, jnp.exp(-distance)


WORLD = SimulatorFns(lambda params, key, starts: jnp.stack([starts.proprio[:, 0], starts.proprio[:, 7]], 1), step)
JUDGE = ReflectorFns(lambda params, starts: (), judge)


def make_starts(count):
    goals = np.linspace(-1, 1, count).astype(np.float32)
    text = Text(np.ones((count, 2), np.int32), np.ones((count, 2), bool))
    return Starts(
        images=np.zeros((count, 1, 2, 2, 3), np.uint8),
        proprio=np.zeros((count, 8), np.float32) + np.eye(8, dtype=np.float32)[7] * goals[:, None],
        policy_text=text,
        reflector_text=text,
        camera=Camera(np.ones((count, 1, 3, 3), np.float32), np.ones((count, 1, 4, 4), np.float32)),
        task=np.zeros(count, np.int32),
    )


def train(iterations, mesh):
    starts = make_starts(32)
    params = {"w": jnp.zeros(()), "b": jnp.zeros(())}
    state = shard_state(init_train_state(params, SETTINGS.optimizer, jax.random.key(0)), mesh)
    imagine = make_imagine(policy, WORLD, JUDGE, ROLLOUT)
    update = make_update(distribution, laplace_log_prob, SETTINGS, LOOP, SAMPLES, shardings(state, mesh))
    rewards = []
    with jax.set_mesh(mesh):
        for number in range(iterations):
            chosen = shard_batch(sample_starts(starts, SETTINGS.starts, SAMPLES, 0, number, 0), mesh)
            key = jax.random.fold_in(state.key, number)
            rollout = imagine(RolloutParams(state.params, (), ()), key, chosen)
            state, metrics = update(state, jax.random.fold_in(key, 1), rollout)
            jax.block_until_ready(state)
            rewards.append(float(metrics["reward"]))
    return state, rewards


def test_learns_to_reach():
    state, rewards = train(40, make_mesh(1, devices=jax.devices()[:1]))
    assert np.mean(rewards[:3]) < 0.45
    assert np.mean(rewards[-3:]) > 0.55
    assert float(state.params["w"]) > 0.5  # towards the goal


def test_one_and_eight_devices_agree():
    with jax.default_matmul_precision("highest"):
        one, rewards = train(20, make_mesh(1, devices=jax.devices()[:1]))
        eight, sharded_rewards = train(20, make_mesh(8))
    np.testing.assert_allclose(rewards, sharded_rewards, atol=1e-5)
    for name in ("w", "b"):
        np.testing.assert_allclose(one.params[name], eight.params[name], atol=1e-5)


def rollout_with_rewards(rewards, mark=0.0):
    imagine = make_imagine(policy, WORLD, JUDGE, ROLLOUT)
    params = {"w": jnp.zeros(()), "b": jnp.zeros(())}
    starts = sample_starts(make_starts(4), 2, 2, 0, 0, 0)
    rollout = imagine(RolloutParams(params, (), ()), jax.random.key(0), starts)
    return rollout._replace(reward=jnp.asarray(rewards), actions=jnp.full_like(rollout.actions, mark))


def test_groups_without_contrast_are_replaced_within_the_budget():
    attempts = []

    def imagine(index):
        attempts.append(index)
        return rollout_with_rewards([0.0, 0.0, 0.0, 1.0] if index == 0 else [0.2, 0.7, 0.3, 0.3], mark=float(index))

    config = replace(SETTINGS, resample_budget=2, resample_below=0.8)
    rollout, extra = collect_contrast(imagine, config, LOOP, samples=2)
    assert attempts == [0, 1] and extra == 1
    # Group 0 had no contrast and was replaced; group 1 was kept.
    np.testing.assert_allclose(rollout.reward, [0.2, 0.7, 0.0, 1.0])
    np.testing.assert_allclose(rollout.actions[:, 0, 0, 0], [1.0, 1.0, 0.0, 0.0])


def test_the_budget_ends():
    calls = []
    flat = lambda index: calls.append(index) or rollout_with_rewards([0.5] * 4)
    _, extra = collect_contrast(flat, replace(SETTINGS, resample_budget=2, resample_below=0.5), LOOP, samples=2)
    assert calls == [0, 1, 2] and extra == 2


def test_merge_groups():
    old, new = rollout_with_rewards([1.0, 2.0, 3.0, 4.0]), rollout_with_rewards([5.0, 6.0, 7.0, 8.0])
    merged = merge_groups(old, new, jnp.array([True, False]), samples=2)
    np.testing.assert_array_equal(merged.reward, [1.0, 2.0, 7.0, 8.0])


def test_a_batch_without_contrast_changes_nothing():
    state = init_train_state({"w": jnp.ones(()), "b": jnp.ones(())}, SETTINGS.optimizer, jax.random.key(0))
    update = make_update(distribution, laplace_log_prob, replace(SETTINGS, minibatches=1), LOOP, 2)
    new, metrics = update(state, jax.random.key(1), rollout_with_rewards([0.5, 0.5, 0.1, 0.1]))
    np.testing.assert_array_equal(new.params["w"], 1.0)
    assert metrics["loss"] == 0.0


def test_a_critic_that_knows_nothing_changes_nothing():
    """One value everywhere and lambda 1 are the leave-one-out advantages; another value at one chunk is not."""
    settings = replace(SETTINGS, minibatches=1, critic=CriticConfig(gae_lambda=1.0))
    state = init_train_state({"w": jnp.zeros(()), "b": jnp.zeros(())}, settings.optimizer, jax.random.key(0))
    imagine = make_imagine(policy, WORLD, JUDGE, replace(ROLLOUT, early_stop=False))
    starts = sample_starts(make_starts(32), 8, SAMPLES, 0, 0, 0)
    rollout = imagine(RolloutParams(state.params, (), ()), jax.random.key(0), starts)
    update = make_update(distribution, laplace_log_prob, settings, LOOP, SAMPLES)
    values = jnp.full(rollout.valid.shape[:2], 0.3)
    knowing = values.at[:, 1].set(rollout.reward)  # all was decided in the first chunk
    loss, same, other = (update(state, jax.random.key(1), rollout, v)[1] for v in (None, values, knowing))
    np.testing.assert_allclose(same["gradient_norm"], loss["gradient_norm"], rtol=1e-4)
    assert abs(other["gradient_norm"] / loss["gradient_norm"] - 1) > 0.02


def test_the_held_out_estimate_is_of_the_mean_action_or_of_samples():
    """loc = 0: of the mean action R = exp(-|3 goal|) at every frame; of samples what NumPy's noise gives."""
    goals = np.linspace(-1, 1, 6)
    scaled = lambda factor=1.0, deterministic=False: partial(_noisy, 0.0 if deterministic else factor)
    world = SimpleNamespace(simulator=WORLD, reflector=JUDGE, simulator_params=(), reflector_params=())
    rollout = replace(ROLLOUT, early_stop=False)
    estimates = []
    for samples in (0, 2000):
        settings = replace(SETTINGS, held_out_samples=samples, scale_factor=4.0)
        config = replace(get_config("debug"), post_training=settings, rollout=rollout)
        estimate = make_estimate(config, SimpleNamespace(policy=scaled), world, make_starts(6))
        estimates.append(estimate({"w": jnp.zeros(()), "b": jnp.zeros(())})["held_out_reward"])
    np.testing.assert_allclose(estimates[0], np.exp(-np.abs(3 * goals)).mean(), rtol=1e-6)
    noise = 4.0 * np.exp(-1.5) * np.random.default_rng(0).laplace(size=(20000, 2 * K)).sum(1)
    expected = np.exp(-np.abs(noise[:, None] - 3 * goals)).mean()
    np.testing.assert_allclose(estimates[1], expected, atol=0.01)
    assert abs(estimates[1] - estimates[0]) > 0.03


def _noisy(factor, params, key, observation):
    step = policy(params, key, observation)
    return step._replace(actions=step.loc + factor * (step.actions - step.loc))


def test_minibatches_of_dropped_groups_are_skipped():
    settings = replace(SETTINGS, epochs=3, minibatches=2, max_kl=1e9)
    state = init_train_state({"w": jnp.zeros(()), "b": jnp.zeros(())}, settings.optimizer, jax.random.key(0))
    update = make_update(distribution, laplace_log_prob, settings, LOOP, 2)
    new, metrics = update(state, jax.random.key(1), rollout_with_rewards([0.5, 0.5, 0.1, 0.9]))
    assert metrics["updates"] == int(new.step) == 3  # one minibatch of each epoch
    assert metrics["kept"] == 1.0


def test_a_kl_explosion_ends_the_updates():
    settings = replace(SETTINGS, epochs=3, minibatches=2, max_kl=1e-6, optimizer=OptimizerConfig(learning_rate=0.5))
    state = init_train_state({"w": jnp.zeros(()), "b": jnp.zeros(())}, settings.optimizer, jax.random.key(0))
    imagine = make_imagine(policy, WORLD, JUDGE, ROLLOUT)
    starts = sample_starts(make_starts(32), 8, SAMPLES, 0, 0, 0)
    rollout = imagine(RolloutParams(state.params, (), ()), jax.random.key(0), starts)
    update = make_update(distribution, laplace_log_prob, settings, LOOP, SAMPLES)
    new, metrics = update(state, jax.random.key(1), rollout)
    assert metrics["updates"] < 6
    assert int(new.step) == 1  # the second update was already too far


def test_starts_are_a_function_of_the_iteration():
    starts = make_starts(10)
    first, again = (sample_starts(starts, 4, 2, 7, 3, 0) for _ in range(2))
    np.testing.assert_array_equal(first.proprio, again.proprio)
    np.testing.assert_array_equal(first.proprio[::2], first.proprio[1::2])  # a group shares its start
    assert len(np.unique(first.proprio[:, 7])) == 4
    assert not np.array_equal(first.proprio, sample_starts(starts, 4, 2, 7, 4, 0).proprio)
    with pytest.raises(WorldEnvError, match="11 starts, but only 10"):
        sample_starts(starts, 11, 2, 0, 0, 0)


@pytest.mark.parametrize("early_stop", [True, False])
def test_an_imagined_success_is_one_with_and_without_an_early_end(early_stop):
    probability = np.array([[0.1, 0.2], [0.1, 0.6], [0.7, 0.1]])
    alive, reward = jnp.ones(3, bool), jnp.zeros(3)
    valid, _, _ = end_of_trajectories(probability, alive, reward, RolloutConfig(early_stop=early_stop))
    rollout = SimpleNamespace(success_probability=np.where(valid, probability, 0.0)[:, None])
    np.testing.assert_array_equal(judged_successes(rollout, 0.5), [False, True, True])


def test_flatten_chunks_repeats_the_instruction():
    text = Text(jnp.array([[1, 2], [3, 4]]), jnp.ones((2, 2), bool))
    flat = flatten_chunks(Observation(jnp.zeros((2, 3, 1, 2, 2, 3)), jnp.arange(48.0).reshape(2, 3, 8), text), 3)
    assert flat.images.shape == (6, 1, 2, 2, 3)
    np.testing.assert_array_equal(flat.text.tokens[:, 0], [1, 1, 1, 3, 3, 3])
    np.testing.assert_array_equal(flat.proprio[4], np.arange(32.0, 40.0))


def test_keys_give_every_trajectory_its_own_noise():
    keys = fold_in(jax.random.split(jax.random.key(0), 3), 1)
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in keys}) == 3
