# SPDX-License-Identifier: Apache-2.0
"""Who acts, as the runner wants it: frames in, a chunk of environment actions out."""

from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from worldenv_jax.data.episodes import Episode
from worldenv_jax.data.windows import padded_chunk
from worldenv_jax.envs.runner import ActFn
from worldenv_jax.mesh import shard_state, split_rows
from worldenv_jax.types import EpisodeSpec, Observation, Params, PolicyFn, PolicyStep, Statistics, Text

# Rows that the policy sees at once, whatever the number of slots: sums are rounded differently in another batch size,
# and an episode must not depend on how many workers there are.
BATCH = 8
LET_GO = np.array([0.0, 0.0, 0.5, 0.0, 0.0, 0.0, -1.0], np.float32)  # environment action: up, and open
LET_GO_STEPS = 16  # the fingers need 12


# (params, key, images, proprio, tasks, seeds, samples, chunks), rows of BATCH -> environment actions, PolicyStep
CompiledPolicy = Callable[..., tuple[jax.Array, PolicyStep]]
# (specs, chunks, images, proprio, step): what the policy saw, and what it drew, NumPy, one row per spec
RecordFn = Callable[[Sequence[EpisodeSpec], Sequence[int], np.ndarray, np.ndarray, PolicyStep], None]


def compile_policy(policy: PolicyFn, statistics: Statistics, prompts: Text) -> CompiledPolicy:
    """A `PolicyFn` with the noise of `policy_actor`, compiled once for all parameters and keys.

    Args:
      policy: samples (exploration) or returns the mean (evaluation), as it was made.
      statistics: maps its normalised actions to environment actions.
      prompts: tokenised instruction of every task, [tasks, N].
    """

    @jax.jit
    def act(params, key, images, proprio, tasks, seeds, samples, chunks):
        keys = jax.vmap(lambda *ids: _noise_key(key, *ids))(tasks, seeds, samples, chunks)
        text = Text(jnp.asarray(prompts.tokens)[tasks], jnp.asarray(prompts.mask)[tasks])
        step = policy(params, keys, Observation(images, proprio, text))
        return statistics.unnormalize_action(step.actions), step

    return act


def policy_actor(
    compiled: CompiledPolicy, params: Params, key: jax.Array, mesh: Mesh, record: RecordFn | None = None
) -> ActFn:
    """A policy for `run_episodes`.

    Args:
      compiled: from `compile_policy`.
      params: its parameters.
      key: noise of an episode's chunk depends on (key, task, seed, sample, chunk) only, not on who runs beside it.
      mesh: devices that share the rows.
      record: told of every chunk, with the actions normalised as they were drawn.
    """
    params = shard_state(params, mesh)

    def act(images: np.ndarray, proprio: np.ndarray, specs: Sequence[EpisodeSpec], chunks: Sequence[int]) -> np.ndarray:
        numbers = [[s.task for s in specs], [s.seed for s in specs], [s.sample for s in specs], list(chunks)]
        columns = [images, proprio, *(np.array(column, np.int32) for column in numbers)]
        parts = [
            compiled(params, key, *split_rows([_pad(column[first : first + BATCH]) for column in columns], mesh))
            for first in range(0, len(specs), BATCH)
        ]
        join = lambda *leaves: np.concatenate(leaves)[: len(specs)]
        if record:
            record(specs, chunks, images, proprio, jax.tree.map(join, *(step for _, step in parts)))
        return join(*(actions for actions, _ in parts))

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


def trying_again(act: ActFn, is_empty: Callable[[np.ndarray], np.ndarray], specs: Collection[EpisodeSpec]) -> ActFn:
    """`act`, but a hand that was closed on nothing at two chunk beginnings in a row opens and rises.

    A cloned policy that has missed keeps its fist to the end of the episode: no demonstration shows anything else.

    Args:
      is_empty: proprioception [n, 8] to bool [n].
      specs: the episodes that it is done in.
    """
    fist: dict[EpisodeSpec, bool] = {}  # whether the hand was empty at the last chunk's beginning
    left: dict[EpisodeSpec, int] = {}  # chunks until it is open

    def act_again(
        images: np.ndarray, proprio: np.ndarray, running: Sequence[EpisodeSpec], chunks: Sequence[int]
    ) -> np.ndarray:
        actions = np.array(act(images, proprio, running, chunks))
        for row, (spec, chunk, empty) in enumerate(zip(running, chunks, is_empty(proprio))):
            if chunk and empty and fist[spec] and not left[spec] and spec in specs:
                left[spec] = -(-LET_GO_STEPS // actions.shape[1])
            if chunk and left[spec]:
                actions[row], left[spec], fist[spec] = LET_GO, left[spec] - 1, False
            else:
                left[spec], fist[spec] = 0, bool(empty)
        return actions

    return act_again


def _noise_key(key: jax.Array, task: jax.Array, seed: jax.Array, sample: jax.Array, chunk: jax.Array) -> jax.Array:
    """The first sample's key does not depend on there being others."""
    start = jax.random.fold_in(jax.random.fold_in(key, task), seed)
    start = jax.lax.select(sample > 0, jax.random.fold_in(start, sample), start)
    return jax.random.fold_in(start, chunk)


def _pad(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows, np.repeat(rows[:1], BATCH - len(rows), axis=0)])
