# SPDX-License-Identifier: Apache-2.0
"""One iteration of post-training in imagination: roll out, advantages, clipped updates (World-Env, section 1.5).

`imagine` and `update` are each one compiled program for a whole run. The simulator and the reflector are frozen.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.configs import PostTrainingConfig
from worldenv_jax.critic import generalized_advantages, leave_one_out, live_chunks
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.loop_ppo import LoopConfig, clipped_loss, groups_with_contrast, leave_one_out_advantages
from worldenv_jax.mesh import constrain_batch
from worldenv_jax.rollout import RolloutConfig, RolloutParams, imagine_rollout
from worldenv_jax.training.train_state import TrainState, apply_gradients, value_and_grad
from worldenv_jax.types import Array, Observation, Params, PolicyFn, ReflectorFns, Rollout, SimulatorFns, Starts, Text

# (params, observation) -> (loc [B, K, A], log_scale [B, K, A]): the distribution that was sampled from
DistributionFn = Callable[[Params, Observation], tuple[Array, Array]]
# (actions, loc, log_scale) -> log density per dimension
LogProbFn = Callable[[Array, Array, Array], Array]


def make_imagine(
    policy: PolicyFn, simulator: SimulatorFns, reflector: ReflectorFns, config: RolloutConfig
) -> Callable[[RolloutParams, Array, Starts], Rollout]:
    """The compiled rollout: (params, key, starts of B trajectories) -> Rollout.

    The starts of a group are repeated before they are put on a mesh (`sample_starts`), so that no device needs the
    rows of another.
    """
    config = replace(config, samples=1)

    def imagine(params: RolloutParams, key: Array, starts: Starts) -> Rollout:
        return imagine_rollout(policy, simulator, reflector, params, key, starts, config)

    return jax.jit(imagine)


def merge_groups(old: Rollout, new: Rollout, keep: Array, samples: int) -> Rollout:
    """Takes the groups of `old` where `keep` (bool [S]) and those of `new` elsewhere."""
    rows = jnp.repeat(keep, samples)

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(rows.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, old, new)


def collect_contrast(
    imagine: Callable[[Array, int], Rollout], config: PostTrainingConfig, loop: LoopConfig, samples: int
) -> tuple[Rollout, int]:
    """Imagines one batch; while too few groups have contrast, replaces the others, within the budget.

    Args:
      imagine: (attempt number) -> a rollout of S groups from fresh starts.

    Returns:
      The rollout and the number of extra rollouts spent (RIPT's dynamic sampling, bounded).
    """
    rollout = imagine(0)
    for attempt in range(1, config.resample_budget + 1):
        contrast = groups_with_contrast(rollout.reward.reshape(-1, samples), loop)
        if float(contrast.mean()) >= config.resample_below:
            return rollout, attempt - 1
        rollout = merge_groups(rollout, imagine(attempt), contrast, samples)
    return rollout, config.resample_budget


def make_update(
    distribution: DistributionFn,
    log_prob: LogProbFn,
    config: PostTrainingConfig,
    loop: LoopConfig,
    samples: int,
    state_shardings: Any = None,
) -> Callable[[TrainState, Array, Rollout, Array | None], tuple[TrainState, dict[str, Array]]]:
    """The compiled update of one iteration: epochs x minibatches of the clipped loss over the trajectories.

    The last argument is what a critic expected before each chunk, float32 [B, T]; None: without a critic every chunk
    carries its trajectory's advantage. `state_shardings`: layout of the state on a mesh (`mesh.shardings`), kept from
    update to update.
    """

    def loss(params: Params, key: Array, batch: tuple[Rollout, Array]) -> tuple[Array, dict[str, Array]]:
        rollout, advantages = batch
        loc, log_scale = read_chunks(partial(distribution, params), rollout.observations, config.chunks_at_once)
        density = log_prob(rollout.actions, loc, log_scale).sum(-1)
        return clipped_loss(density, rollout.log_prob, advantages, rollout.valid, loop)

    def one_update(carry, rows):
        state, stopped, batch = carry
        part = constrain_batch(jax.tree.map(lambda leaf: leaf[rows], batch))

        def go(state):
            value, metrics, gradients = value_and_grad(loss, config.optimizer, state.params, state.key, part)
            exploded = metrics["kl"] > config.max_kl
            new, norms = apply_gradients(state, gradients, config.optimizer, loss=value)
            new = jax.lax.cond(exploded, lambda: state, lambda: new)
            return new, exploded, {**metrics, **norms, "loss": value}

        shapes = jax.eval_shape(go, state)[2]
        stay = lambda state: (state, True, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))
        nothing = ~part[0].valid.any()  # dropped groups come last: minibatches of nothing else cost nothing
        state, exploded, metrics = jax.lax.cond(stopped | nothing, stay, go, state)
        stopped |= exploded & ~nothing
        return (state, stopped, batch), {**metrics, "updated": 1.0 - exploded}

    def advantages_of(rollout: Rollout, values: Array | None) -> Array:
        live = live_chunks(rollout)
        if values is None:
            whole = leave_one_out_advantages(rollout.reward.reshape(-1, samples)).reshape(-1, 1)
            return jnp.broadcast_to(whole, live.shape)
        advantages = generalized_advantages(values, rollout.reward, live, config.critic.gae_lambda)
        return leave_one_out(advantages, live, samples)

    @partial(jax.jit, out_shardings=(state_shardings, None))
    def update(
        state: TrainState, key: Array, rollout: Rollout, values: Array | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        contrast = jnp.repeat(groups_with_contrast(rollout.reward.reshape(-1, samples), loop), samples)
        advantages = jnp.where(contrast[:, None], advantages_of(rollout, values), 0.0)
        learning = rollout._replace(valid=rollout.valid & contrast[:, None, None])
        batch = len(rollout.reward)
        draws = jax.random.uniform(key, (config.epochs, batch))
        orders = jnp.argsort(jnp.where(contrast, draws, 1.0 + draws), axis=1)
        rows = orders.reshape(config.epochs * config.minibatches, batch // config.minibatches)
        carry = (state, jnp.zeros((), bool), (learning, advantages))
        (state, _, _), metrics = jax.lax.scan(one_update, carry, rows)
        updated = metrics.pop("updated")
        mean = {name: (value * updated).sum() / jnp.maximum(updated.sum(), 1) for name, value in metrics.items()}
        return state, {**mean, "updates": updated.sum(), **rollout_metrics(rollout, samples)}

    return update


def read_chunks(
    read: Callable[[Observation], tuple[Array, Array]], observations: Observation, at_once: int
) -> tuple[Array, Array]:
    """The distribution at every chunk of B trajectories: loc and log_scale, float32 [B, T, K, A] each.

    Args:
      read: observations of N rows -> loc, log_scale [N, K, A].
      observations: leaves [B, T, ...].
      at_once: this many chunks of every trajectory in one call, a divisor of T; the activations of the others are
        computed again in the backward pass. 0: all, none twice.

    Raises:
      WorldEnvError: `at_once` does not divide T.
    """
    batch, chunks = observations.proprio.shape[:2]
    at_once = at_once or chunks
    if chunks % at_once:
        raise WorldEnvError(f"chunks_at_once is {at_once}, which does not divide the {chunks} chunks of a trajectory")

    def read_part(part: tuple[Array, Array]) -> tuple[Array, Array]:
        rows = constrain_batch(flatten_chunks(Observation(*part, observations.text), at_once))
        return jax.tree.map(lambda leaf: leaf.reshape(batch, at_once, *leaf.shape[1:]), read(rows))

    if at_once == chunks:
        return read_part((observations.images, observations.proprio))
    split = lambda leaf: jnp.moveaxis(leaf.reshape(batch, -1, at_once, *leaf.shape[2:]), 1, 0)
    parts = jax.lax.map(jax.checkpoint(read_part), (split(observations.images), split(observations.proprio)))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(batch, chunks, *leaf.shape[3:]), parts)


def flatten_chunks(observations: Observation, chunks: int) -> Observation:
    """Observations with leaves [B, T, ...] -> [B * T, ...]; the instruction is repeated for every chunk."""
    flat = lambda leaf: leaf.reshape((-1,) + leaf.shape[2:])
    text = Text(*(jnp.repeat(leaf, chunks, axis=0) for leaf in observations.text))
    return Observation(flat(observations.images), flat(observations.proprio), text)


def rollout_metrics(rollout: Rollout, samples: int) -> dict[str, Array]:
    """Reward, share of trajectories that the reflector ended, their length, the spread inside groups."""
    rewards = rollout.reward.reshape(-1, samples)
    return {
        "reward": rollout.reward.mean(),
        "terminated": rollout.terminated.mean(),
        "length": rollout.length.mean(),
        "group_contrast": (rewards.max(1) - rewards.min(1)).mean(),
    }


def sample_starts(starts: Starts, count: int, samples: int, seed: int, iteration: int, attempt: int) -> Starts:
    """The starts of `sample_rows`, each `samples` times in a row."""
    rows = sample_rows(len(starts.task), count, seed, iteration, attempt)
    return jax.tree.map(lambda leaf: np.repeat(leaf[rows], samples, axis=0), starts)


def sample_rows(total: int, count: int, seed: int, iteration: int, attempt: int) -> np.ndarray:
    """`count` different ones of `total` starts, int [count]: a function of (seed, iteration, attempt) only.

    Raises:
      WorldEnvError: fewer than `count` starts were collected.
    """
    if count > total:
        raise WorldEnvError(
            f"an iteration needs {count} starts, but only {total} were collected: collect more episodes"
        )
    return np.random.default_rng([seed, iteration, attempt]).choice(total, count, replace=False)
