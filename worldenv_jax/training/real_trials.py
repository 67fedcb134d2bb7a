# SPDX-License-Identifier: Apache-2.0
"""Trajectories for post-training from episodes in a true world that is not written in JAX (RIPT-VLA's setting).

The same rows as an imagined rollout has, so the same update learns from them: the reward is the task predicate, an
episode ends with its first success or at the horizon of imagination.
"""

from collections.abc import Sequence

import jax
import numpy as np

from worldenv_jax.configs import ExperimentConfig
from worldenv_jax.data.episodes import Episode
from worldenv_jax.envs.base import Environment
from worldenv_jax.envs.runner import Outcome, run_episodes
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.mesh import own_rows, shard_batch
from worldenv_jax.training.acting import CompiledPolicy, compile_policy, policy_actor
from worldenv_jax.training.imagination import Trials
from worldenv_jax.training.models import Models
from worldenv_jax.training.post_training import sample_rows
from worldenv_jax.training.workdir import mesh_from_config
from worldenv_jax.types import Array, EpisodeSpec, Observation, Params, PolicyStep, Rollout, Text

ATTEMPTS = 3  # runs of an episode whose world failed


def real_trials(
    config: ExperimentConfig,
    models: Models,
    environment: Environment,
    starts: Sequence[Episode],
    held_out: Sequence[Episode],
) -> Trials:
    """Episodes from the starts of `starts`; the estimate is the success rate from those of `held_out`.

    Of the mean action, or with `post_training.held_out_samples` of as many samples from each.
    """
    settings, mesh = config.post_training, mesh_from_config(config.mesh)
    compile_for = lambda policy: compile_policy(policy, models.statistics, models.policy_prompts)
    sampling, mean = compile_for(models.policy(settings.scale_factor)), compile_for(models.policy(deterministic=True))

    def rollout(params: Params, key: Array, number: int, attempt: int) -> Rollout:
        rows = sample_rows(len(starts), settings.starts, config.seed, number, attempt)
        specs = [starts[row].spec._replace(sample=n) for row in rows for n in range(config.rollout.samples)]
        result = run_trials(config, models, environment, sampling, params, key, specs)
        return shard_batch(own_rows(result, mesh), mesh)

    def estimate(params: Params) -> dict[str, float]:
        tries = settings.held_out_samples
        act = policy_actor(sampling if tries else mean, params, jax.random.key(config.seed + 21), mesh)
        specs = [episode.spec._replace(sample=n) for episode in held_out for n in range(max(tries, 1))]
        outcomes = _run(environment, act, specs, _horizon(config))
        rate = float(np.mean([outcome.success for outcome in outcomes]))
        return {"held_out_reward": rate, "held_out_terminated": rate}

    return Trials(rollout, estimate)


def run_trials(
    config: ExperimentConfig,
    models: Models,
    environment: Environment,
    policy: CompiledPolicy,
    params: Params,
    key: Array,
    specs: Sequence[EpisodeSpec],
) -> Rollout:
    """Runs every spec once with the sampling policy; NumPy, row i is spec i. Frames after actions are left out (V = 0).

    Raises:
      WorldEnvError: the world failed `ATTEMPTS` times in an episode.
    """
    batch, chunks, steps, width = len(specs), config.rollout.num_chunks, config.policy.chunk, config.policy.action_dim
    zeros = lambda *shape, dtype=np.float32: np.zeros((batch, chunks, *shape), dtype)
    size, row_of = environment.image_size, {spec: row for row, spec in enumerate(specs)}
    seen = (zeros(environment.num_views, size, size, 3, dtype=np.uint8), zeros(8))
    drawn = PolicyStep(zeros(steps, width), zeros(steps), zeros(steps, width), zeros(steps, width))

    def record(specs, chunk_numbers, images, proprio, step) -> None:
        rows = [row_of[spec] for spec in specs]
        for table, values in zip((*seen, *drawn), (images, proprio, *step)):
            table[rows, chunk_numbers] = values

    act = policy_actor(policy, params, key, mesh_from_config(config.mesh), record)
    outcomes = _run(environment, act, specs, _horizon(config))
    success = np.array([outcome.success for outcome in outcomes])
    length = np.array([outcome.steps for outcome in outcomes], np.int32)
    text = Text(*(np.asarray(leaf)[[spec.task for spec in specs]] for leaf in models.policy_prompts))
    return Rollout(
        observations=Observation(*seen, text),
        **drawn._asdict(),
        frames=zeros(steps, 0, size, size, 3, dtype=np.uint8),
        proprio=zeros(steps, 8),
        success_probability=zeros(steps),
        valid=(np.arange(chunks * steps) < length[:, None]).reshape(batch, chunks, steps),
        reward=success.astype(np.float32),
        terminated=success,
        length=length,
    )


def _horizon(config: ExperimentConfig) -> int:
    return config.rollout.num_chunks * config.policy.chunk


def _run(environment: Environment, act, specs: Sequence[EpisodeSpec], max_steps: int) -> list[Outcome]:
    """The outcome of every episode; those whose world failed are run again."""
    outcomes: dict[int, Outcome] = {}
    for _ in range(ATTEMPTS):
        missing = [position for position in range(len(specs)) if position not in outcomes]
        played = run_episodes(environment, act, [specs[position] for position in missing], max_steps=max_steps)
        for index, outcome in played:
            if outcome.error:
                last_error = outcome.error
            else:
                outcomes[missing[index]] = outcome
        if len(outcomes) == len(specs):
            return [outcomes[position] for position in range(len(specs))]
    raise WorldEnvError(f"{len(specs) - len(outcomes)} episodes failed {ATTEMPTS} times; the last: {last_error}")
