# SPDX-License-Identifier: Apache-2.0
"""imagine_rollout with a counting simulator, a constant policy and a step-function judge: every number by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.rollout import RolloutConfig, RolloutParams, fold_in, imagine_rollout
from worldenv_jax.types import Camera, PolicyStep, Prediction, ReflectorFns, SimulatorFns, Starts, Text

K, A = 2, 7
PARAMS = RolloutParams(policy=jnp.float32(0.5), simulator=jnp.float32(1.0), reflector=jnp.float32(0.25))


def make_starts(count):
    text = Text(jnp.ones((count, 3), jnp.int32), jnp.ones((count, 3), bool))
    return Starts(
        images=jnp.zeros((count, 1, 4, 4, 3), jnp.uint8),
        proprio=jnp.zeros((count, 8)),
        policy_text=text,
        reflector_text=text,
        camera=Camera(jnp.ones((count, 1, 3, 3)), jnp.ones((count, 1, 4, 4))),
        task=jnp.arange(count, dtype=jnp.int32),
    )


def noisy_policy(params, key, observation):
    """Actions = params + uniform noise of the trajectory's own key."""
    batch = observation.proprio.shape[0]
    noise = jax.vmap(lambda k: jax.random.uniform(k, (K, A)))(key)
    loc = jnp.full((batch, K, A), params)
    return PolicyStep(loc + noise, -noise.sum(-1), loc, jnp.zeros((batch, K, A)))


def count_init(params, key, starts):
    return {"count": jnp.zeros(starts.task.shape, jnp.int32), "sum": jnp.zeros(starts.task.shape)}


def count_step(params, key, state, actions):
    """Frame k shows the number of actions so far; proprio[0] holds the sum of the first action dimension."""
    count = state["count"][:, None] + jnp.arange(1, K + 1)
    total = state["sum"][:, None] + params * jnp.cumsum(actions[..., 0], axis=1)
    frames = jnp.broadcast_to(count[:, :, None, None, None, None], (*count.shape, 1, 4, 4, 3)).astype(jnp.uint8)
    proprio = jnp.zeros((*count.shape, 8)).at[..., 0].set(total)
    return {"count": count[:, -1], "sum": total[:, -1]}, Prediction(frames, proprio)


def judge(params, state, prediction):
    """R = params * (frame number - task), so that task 0 passes 0.5 at frame 3 and task 2 at frame 5."""
    number = prediction.frames[:, :, 0, 0, 0, 0].astype(jnp.float32)
    return state, jnp.clip(params * (number - state[:, None]), 0.0, 1.0)


SIMULATOR = SimulatorFns(count_init, count_step)
REFLECTOR = ReflectorFns(lambda params, starts: starts.task.astype(jnp.float32), judge)


def imagine(config, starts, policy=noisy_policy, key=None):
    key = jax.random.key(0) if key is None else key
    return imagine_rollout(policy, SIMULATOR, REFLECTOR, PARAMS, key, starts, config)


def test_termination_masks_and_reward_by_hand():
    rollout = imagine(RolloutConfig(num_chunks=3, samples=2), make_starts(4))
    chex.assert_shape(rollout.frames, (8, 3, K, 1, 4, 4, 3))
    # R(frame n) of task s is (n - s) / 4, frames 1..6: > 0.5 first at n = 3 + s. Tasks 0..3 end at 3, 4, 5, 6.
    np.testing.assert_array_equal(rollout.length, [3, 3, 4, 4, 5, 5, 6, 6])
    np.testing.assert_array_equal(rollout.terminated, True)
    np.testing.assert_allclose(rollout.reward, 0.75)
    np.testing.assert_array_equal(rollout.valid[0], [[True, True], [True, False], [False, False]])
    np.testing.assert_array_equal(rollout.frames[0, :, :, 0, 0, 0, 0], [[1, 2], [3, 0], [0, 0]])
    np.testing.assert_array_equal(rollout.observations.images[4, :, 0, 0, 0, 0], [0, 2, 4])
    assert not np.any(rollout.actions[0, 1, 1]) and not np.any(rollout.actions[0, 2])


def test_horizon_reward_and_ablations():
    starts = make_starts(4)
    short = imagine(RolloutConfig(num_chunks=2, samples=1), starts)  # frames 1..4
    np.testing.assert_allclose(short.reward, [0.75, 0.75, 0.5, 0.25])
    np.testing.assert_array_equal(short.terminated, [True, True, False, False])
    binary = imagine(RolloutConfig(num_chunks=2, samples=1, reward="binary"), starts)
    np.testing.assert_allclose(binary.reward, [1, 1, 0, 0])
    running = imagine(RolloutConfig(num_chunks=2, samples=1, early_stop=False), starts)
    np.testing.assert_array_equal(running.length, 4)
    np.testing.assert_allclose(running.reward, [1.0, 0.75, 0.5, 0.25])
    with pytest.raises(ValueError, match="reward"):
        RolloutConfig(reward="sparse")


def python_loop(config, starts, key):
    """The same parts, stepped by hand without scan, jit or masks."""
    keys = jax.random.split(key, starts.task.shape[0])
    state, judge_state = count_init(PARAMS.simulator, None, starts), starts.task.astype(jnp.float32)
    history = []
    for t in range(config.num_chunks):
        chunk_keys = fold_in(keys, t + 1)
        step = noisy_policy(PARAMS.policy, fold_in(chunk_keys, 0), imagine_observation(starts))
        state, prediction = count_step(PARAMS.simulator, None, state, step.actions)
        history.append((step, prediction, judge(PARAMS.reflector, judge_state, prediction)[1]))
    return history


def imagine_observation(starts):
    class Observation:
        proprio = starts.proprio

    return Observation


def test_equal_to_a_python_loop():
    config, starts, key = RolloutConfig(num_chunks=3, samples=1), make_starts(5), jax.random.key(7)
    rollout = jax.jit(lambda k, s: imagine(config, s, key=k))(key, starts)
    for t, (step, prediction, probability) in enumerate(python_loop(config, starts, key)):
        mask = np.asarray(rollout.valid[:, t])
        for ours, theirs in (
            (rollout.actions, step.actions),
            (rollout.log_prob, step.log_prob),
            (rollout.proprio, prediction.proprio),
            (rollout.success_probability, probability),
        ):
            np.testing.assert_allclose(np.asarray(ours[:, t])[mask], np.asarray(theirs)[mask], atol=1e-5)


def test_batched_equals_one_at_a_time():
    config, starts = RolloutConfig(num_chunks=3, samples=2), make_starts(3)
    keys = jax.random.split(jax.random.key(3), 6)
    together = imagine(config, starts, key=keys)
    for s in range(3):
        one = jax.tree.map(lambda leaf, s=s: leaf[s : s + 1], starts)
        alone = imagine(config, one, key=keys[2 * s : 2 * s + 2])
        chex.assert_trees_all_close(alone, jax.tree.map(lambda leaf, s=s: leaf[2 * s : 2 * s + 2], together), atol=1e-5)


def test_recorded_actions_are_replayed():
    config, starts = RolloutConfig(num_chunks=3, samples=1, early_stop=False), make_starts(2)
    actions = jnp.arange(2 * 3 * K * A, dtype=jnp.float32).reshape(2, 3, K, A)
    rollout = imagine(config, starts, policy=actions)
    np.testing.assert_array_equal(rollout.actions, actions)
    np.testing.assert_allclose(rollout.proprio[:, -1, -1, 0], actions[..., 0].sum((1, 2)))
    with pytest.raises(ValueError, match=r"\[2, 3, K, 7\]"):
        imagine(config, starts, policy=actions[:, :2])


def test_one_compilation_and_no_host_transfer():
    config, starts, key = RolloutConfig(num_chunks=3, samples=2), make_starts(2), jax.random.key(1)
    traced = jax.jit(chex.assert_max_traces(lambda k, s: imagine(config, s, key=k), n=1))
    jax.block_until_ready(traced(key, starts))
    for seed in range(3):
        key = jax.random.key(seed)
        with jax.transfer_guard("disallow"):
            jax.block_until_ready(traced(key, starts))


def test_remaining_chunks_are_skipped_when_all_have_ended():
    calls = []

    def counting_step(params, key, state, actions):
        jax.debug.callback(lambda: calls.append(1))
        return count_step(params, key, state, actions)

    config = RolloutConfig(num_chunks=6, samples=2)
    simulator = SimulatorFns(count_init, counting_step)
    rollout = imagine_rollout(noisy_policy, simulator, REFLECTOR, PARAMS, jax.random.key(0), make_starts(1), config)
    jax.block_until_ready(rollout)
    jax.effects_barrier()
    assert len(calls) == 2  # task 0 ends at frame 3, in the second chunk
