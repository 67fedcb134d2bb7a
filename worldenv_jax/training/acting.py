# SPDX-License-Identifier: Apache-2.0
"""Who acts, as the runner wants it: frames in, a chunk of environment actions out."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from worldenv_jax.data.episodes import Episode
from worldenv_jax.data.windows import padded_chunk
from worldenv_jax.envs.runner import ActFn
from worldenv_jax.mesh import shard_state, split_rows
from worldenv_jax.types import EpisodeSpec, Observation, Params, PolicyFn, Statistics, Text

# Rows that the policy sees at once, whatever the number of slots: sums are rounded differently in another batch size,
# and an episode must not depend on how many workers there are.
BATCH = 8


def policy_actor(
    policy: PolicyFn, params: Params, statistics: Statistics, prompts: Text, key: jax.Array, mesh: Mesh
) -> ActFn:
    """Wraps a `PolicyFn` for `run_episodes`.

    Args:
      policy: samples (exploration) or returns the mean (evaluation), as it was made.
      params: its parameters.
      statistics: maps its normalised actions to environment actions.
      prompts: tokenised instruction of every task, [tasks, N].
      key: noise of an episode's chunk depends on (key, task, seed, chunk) only, not on who runs beside it.
      mesh: devices that share the rows.
    """
    params = shard_state(params, mesh)

    @jax.jit
    def act_on_device(params, images, proprio, tasks, seeds, chunks):
        keys = jax.vmap(lambda *ids: _fold_in_all(key, ids))(tasks, seeds, chunks)
        text = Text(jnp.asarray(prompts.tokens)[tasks], jnp.asarray(prompts.mask)[tasks])
        step = policy(params, keys, Observation(images, proprio, text))
        return statistics.unnormalize_action(step.actions)

    def act(images: np.ndarray, proprio: np.ndarray, specs: Sequence[EpisodeSpec], chunks: Sequence[int]) -> np.ndarray:
        numbers = [[s.task for s in specs], [s.seed for s in specs], list(chunks)]
        columns = [images, proprio, *(np.array(column, np.int32) for column in numbers)]
        parts = [
            act_on_device(params, *split_rows([_pad(column[first : first + BATCH]) for column in columns], mesh))
            for first in range(0, len(specs), BATCH)
        ]
        return np.concatenate(parts)[: len(specs)]

    return act


def replay_actor(recorded: Callable[[EpisodeSpec], Episode], chunk: int = 40) -> ActFn:
    """Repeats recorded actions without looking; then stands still, the gripper held.

    Args:
      recorded: whose actions.
      chunk: K, actions at a time. The outcome does not depend on it, but every chunk ends with a picture.
    """

    def act(images: np.ndarray, proprio: np.ndarray, specs: Sequence[EpisodeSpec], chunks: Sequence[int]) -> np.ndarray:
        return np.stack([padded_chunk(recorded(spec).actions, t * chunk, chunk) for spec, t in zip(specs, chunks)])

    return act


def _fold_in_all(key: jax.Array, ids: tuple[jax.Array, ...]) -> jax.Array:
    for value in ids:
        key = jax.random.fold_in(key, value)
    return key


def _pad(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows, np.repeat(rows[:1], BATCH - len(rows), axis=0)])
