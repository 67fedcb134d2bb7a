# SPDX-License-Identifier: Apache-2.0
"""A critic beside LOOP: only the chunks that changed what a trajectory is worth get the credit.

World-Env, LOOP and RIPT-VLA know none: every step of a trajectory carries the advantage of the whole. Most of 20 chunks
have nothing to do with the outcome, and their noise drowns those that have. A small network of where the hand is, what
it was told and how much time is left foretells the reward; generalised advantages (GAE, arXiv 1506.02438) follow what
it foretells from chunk to chunk, and the group gives the baseline, as in LOOP.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from worldenv_jax.types import PROPRIO_DIM, Array, Params, Rollout, Statistics, Text


@dataclass(frozen=True)
class CriticConfig:
    """Whether there is a critic, and how it learns."""

    updates: int = 0  # after each iteration's rollout; 0: no critic (World-Env, LOOP, RIPT-VLA)
    warmup: int = 2  # first ones of post_training.iterations, in which the critic alone learns
    gae_lambda: float = 0.7  # 1: a baseline only; 0: only the next chunk's value counts
    width: int = 128
    batch_size: int = 256  # chunks in an update
    learning_rate: float = 1e-3

    def __post_init__(self):
        if not 0.0 <= self.gae_lambda <= 1.0:
            raise ValueError(f"gae_lambda must lie in [0, 1], got {self.gae_lambda}")


class CriticState(NamedTuple):
    """The critic's parameters and its optimiser's state."""

    params: Params
    opt_state: optax.OptState


class CriticFns(NamedTuple):
    """From `make_critic`, compiled."""

    init: Callable[[Array], CriticState]  # of a key
    values: Callable[[CriticState, Rollout], Array]  # float32 [B, T], the reward to expect before each chunk
    # (state, key, rollout) -> state, {"critic_loss", "explained_variance"}: the latter before learning from the rollout
    learn: Callable[[CriticState, Array, Rollout], tuple[CriticState, dict[str, Array]]]


class Critic(nn.Module):
    """Proprioception, instruction and the number of the chunk to the logit of the reward."""

    width: int
    vocabulary: int
    chunks: int

    @nn.compact
    def __call__(self, proprio: Array, text: Text, chunk: Array) -> Array:
        """Normalised proprioception [N, 8], prompts and int [N] to logits float32 [N]."""
        words = nn.Embed(self.vocabulary, 16)(text.tokens) * text.mask[..., None]
        hidden = jnp.concatenate([proprio, words.sum(1), jax.nn.one_hot(chunk, self.chunks)], axis=-1)
        for _ in range(2):
            hidden = nn.relu(nn.Dense(self.width)(hidden))
        return nn.Dense(1, kernel_init=nn.initializers.zeros)(hidden)[:, 0]


def make_critic(config: CriticConfig, statistics: Statistics, vocabulary: int, chunks: int) -> CriticFns:
    """The critic of rollouts of T = `chunks` chunks; `vocabulary` is the number of tokens that prompts are made of."""
    critic, optimizer = Critic(config.width, vocabulary, chunks), optax.adamw(config.learning_rate, weight_decay=1e-2)

    def logits(params: Params, rollout: Rollout, rows: Array, chunk: Array) -> Array:
        proprio, text = rollout.observations.proprio, rollout.observations.text
        text = jax.tree.map(lambda leaf: leaf[rows], text)
        return critic.apply({"params": params}, statistics.normalize_proprio(proprio[rows, chunk]), text, chunk)

    @jax.jit
    def init(key: Array) -> CriticState:
        one = jnp.zeros(1, jnp.int32)
        text = Text(one[:, None], jnp.ones((1, 1), bool))
        params = critic.init(key, jnp.zeros((1, PROPRIO_DIM)), text, one)["params"]
        return CriticState(params, optimizer.init(params))

    @jax.jit
    def values(state: CriticState, rollout: Rollout) -> Array:
        rows, chunk = jnp.indices(live_chunks(rollout).shape).reshape(2, -1)
        return jax.nn.sigmoid(logits(state.params, rollout, rows, chunk)).reshape(-1, chunks)

    @jax.jit
    def learn(state: CriticState, key: Array, rollout: Rollout) -> tuple[CriticState, dict[str, Array]]:
        live = live_chunks(rollout)

        def loss(params: Params, chosen: Array) -> Array:
            rows, chunk = jnp.divmod(chosen, chunks)
            errors = optax.sigmoid_binary_cross_entropy(logits(params, rollout, rows, chunk), rollout.reward[rows])
            return errors.mean()

        def update(state: CriticState, key: Array) -> tuple[CriticState, Array]:
            chosen = jax.random.choice(key, live.size, (config.batch_size,), p=live.ravel() / live.sum())
            value, gradients = jax.value_and_grad(loss)(state.params, chosen)
            changes, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            return CriticState(optax.apply_updates(state.params, changes), opt_state), value

        explained = explained_variance(values(state, rollout), rollout.reward[:, None], live)
        state, losses = jax.lax.scan(update, state, jax.random.split(key, config.updates))
        return state, {"critic_loss": losses.mean(), "explained_variance": explained}

    return CriticFns(init, values, learn)


def live_chunks(rollout: Rollout) -> Array:
    """Bool [B, T]: the chunks that began before the trajectory's end."""
    return rollout.valid.any(-1)


def explained_variance(values: Array, rewards: Array, live: Array) -> Array:
    """1 - mean (R - V)^2 / variance of R over the live chunks: 1 is perfect, 0 no better than a constant.

    `values` [B, T], `rewards` [B, 1], `live` [B, T].
    """
    count = jnp.maximum(live.sum(), 1)
    mean = (rewards * live).sum() / count
    spread = (jnp.square(rewards - mean) * live).sum()
    return 1.0 - (jnp.square(rewards - values) * live).sum() / jnp.maximum(spread, 1e-8)


def generalized_advantages(values: Array, reward: Array, live: Array, gae_lambda: float) -> Array:
    """A_t = sum over k of lambda^k d_{t+k}, with d_t = V_{t+1} - V_t (GAE, equation 16, without discount).

    Args:
      values: float32 [B, T], V before each chunk.
      reward: float32 [B], at the end; it stands in the place of V after the last live chunk.
      live: bool [B, T], True up to some chunk, False after it.
      gae_lambda: in [0, 1].

    Returns:
      float32 [B, T]; 0 where not live.
    """
    chex.assert_equal_shape([values, live])
    known = jnp.where(live, values, reward[:, None])
    difference = jnp.concatenate([known[:, 1:], reward[:, None]], axis=1) - known

    def back(later: Array, now: Array) -> tuple[Array, Array]:
        advantage = now + gae_lambda * later
        return advantage, advantage

    _, advantages = jax.lax.scan(back, jnp.zeros_like(reward), difference.T, reverse=True)
    return jnp.where(live, advantages.T, 0.0)


def leave_one_out(advantages: Array, live: Array, samples: int) -> Array:
    """Minus the mean of the group's other live trajectories at the same chunk, as LOOP does with rewards.

    What the critic has wrong about a start goes with it. A chunk that only one trajectory of the group reaches keeps
    its advantage.

    Args:
      advantages: float32 [B, T]; the `samples` trajectories of a group next to each other.
      live: bool [B, T].
    """
    grouped, present = (leaf.reshape(-1, samples, leaf.shape[1]) for leaf in (advantages * live, live))
    others = present.sum(1, keepdims=True) - present
    mean = (grouped.sum(1, keepdims=True) - grouped) / jnp.maximum(others, 1)
    return jnp.where(present, grouped - mean, 0.0).reshape(advantages.shape)
