# SPDX-License-Identifier: Apache-2.0
"""Success of a policy in the true world, on test starts that no stage has seen."""

from typing import Any

import jax
import numpy as np

from worldenv_jax import files
from worldenv_jax.configs import ExperimentConfig
from worldenv_jax.envs.base import Environment
from worldenv_jax.envs.protocol import protocol_hash
from worldenv_jax.envs.runner import run_episodes
from worldenv_jax.evaluation.summary import success_rate
from worldenv_jax.metrics import Progress
from worldenv_jax.training.acting import policy_actor
from worldenv_jax.training.models import Models
from worldenv_jax.training.workdir import Workdir
from worldenv_jax.types import EpisodeSpec, Params


def evaluate_policy(
    config: ExperimentConfig, workdir: Workdir, environment: Environment, models: Models, params: Params, name: str
) -> dict[str, Any]:
    """Runs the mean action on `episodes_per_task` test starts of every task; writes evaluation/<name>.json.

    Returns:
      {"success": rate with interval, "protocol_hash", "episodes": one {task, seed, success, steps} each}. A result
      that is already there is returned as it is.
    """
    saved = workdir / "evaluation" / f"{name}.json"
    if saved.exists():
        return files.read_json(saved)
    specs = test_specs(config)
    act = policy_actor(
        models.policy(deterministic=True),
        params,
        models.statistics,
        models.policy_prompts,
        jax.random.key(config.seed),
        environment.num_slots,
    )
    stage = f"evaluate_{name}"
    progress = Progress(stage, len(specs))
    outcomes: list[Any] = [None] * len(specs)
    with workdir.timed(stage):
        for done, (position, outcome) in enumerate(run_episodes(environment, act, specs)):
            outcomes[position] = outcome
            progress.update(done + 1)
    progress.close()
    rows = [{"task": o.spec.task, "seed": o.spec.seed, "success": o.success, "steps": o.steps} for o in outcomes]
    result = {
        "success": success_rate(sum(o.success for o in outcomes), len(outcomes)),
        "per_task": [
            success_rate(*_count([o.success for o in outcomes if o.spec.task == task]))
            for task in range(config.environment.tasks)
        ],
        "protocol_hash": protocol_hash(environment.protocol),
        "starts": config.environment.starts,
        "episodes": rows,
    }
    files.write_json(saved, result)
    return result


def test_specs(config: ExperimentConfig) -> list[EpisodeSpec]:
    """The test episodes: the same for every policy and every seed of the experiment."""
    return [
        EpisodeSpec(task, seed, "test", config.environment.starts)
        for seed in range(config.evaluation.episodes_per_task)
        for task in range(config.environment.tasks)
    ]


def outcomes(result: dict[str, Any]) -> np.ndarray:
    """bool [episodes] of an `evaluate_policy` result, in the order of `test_specs`."""
    return np.array([row["success"] for row in result["episodes"]], bool)


def _count(successes: list[bool]) -> tuple[int, int]:
    return sum(successes), len(successes)
