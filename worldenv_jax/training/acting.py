# SPDX-License-Identifier: Apache-2.0
"""A policy as the runner wants it: frames in, a chunk of environment actions out."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.envs.runner import ActFn
from worldenv_jax.types import EpisodeSpec, Observation, Params, PolicyFn, Statistics, Text


def policy_actor(
    policy: PolicyFn, params: Params, statistics: Statistics, prompts: Text, key: jax.Array, batch: int
) -> ActFn:
    """Wraps a `PolicyFn` for `run_episodes`.

    Args:
      policy: samples (exploration) or returns the mean (evaluation), as it was made.
      params: its parameters.
      statistics: maps its normalised actions to environment actions.
      prompts: tokenised instruction of every task, [tasks, N].
      key: noise of an episode's chunk depends on (key, task, seed, chunk) only, not on who runs beside it.
      batch: rows are padded to this number, so that the policy compiles once.
    """

    @jax.jit
    def act_on_device(params, images, proprio, tasks, seeds, chunks):
        keys = jax.vmap(lambda *ids: _fold_in_all(key, ids))(tasks, seeds, chunks)
        text = Text(jnp.asarray(prompts.tokens)[tasks], jnp.asarray(prompts.mask)[tasks])
        step = policy(params, keys, Observation(images, proprio, text))
        return statistics.unnormalize_action(step.actions)

    def act(images: np.ndarray, proprio: np.ndarray, specs: Sequence[EpisodeSpec], chunks: Sequence[int]) -> np.ndarray:
        rows = len(specs)
        columns = [[s.task for s in specs], [s.seed for s in specs], list(chunks)]
        padded = [_pad(images, batch), _pad(proprio, batch)]
        padded += [_pad(np.array(column, np.int32), batch) for column in columns]
        return np.asarray(act_on_device(params, *padded))[:rows]

    return act


def _fold_in_all(key: jax.Array, ids: tuple[jax.Array, ...]) -> jax.Array:
    for value in ids:
        key = jax.random.fold_in(key, value)
    return key


def _pad(rows: np.ndarray, batch: int) -> np.ndarray:
    if len(rows) > batch:
        raise ValueError(f"the actor was made for at most {batch} rows, got {len(rows)}")
    return np.concatenate([rows, np.repeat(rows[:1], batch - len(rows), axis=0)])
