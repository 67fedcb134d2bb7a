# SPDX-License-Identifier: Apache-2.0
"""Episodes from the true world: expert demonstrations, the policy's own successes and failures, and mere starts.

Only `train` starts are used here. Exploration is recorded in parts, each written atomically, so that a stopped
collection goes on where it was.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from worldenv_jax.configs import ExperimentConfig, PretrainedConfig
from worldenv_jax.data.episodes import Episode
from worldenv_jax.data.rlds import add_episodes, open_episodes
from worldenv_jax.data.statistics import compute_statistics, statistics_from_dict
from worldenv_jax.envs.base import Environment, EpisodeError
from worldenv_jax.envs.runner import record_starts, run_episodes
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.metrics import Progress
from worldenv_jax.simulator import fit_kinematics, is_empty
from worldenv_jax.training.acting import compile_policy, policy_actor, trying_again
from worldenv_jax.training.models import Models, to_lists
from worldenv_jax.training.pretrained import published_statistics
from worldenv_jax.training.workdir import Workdir, mesh_from_config
from worldenv_jax.types import EpisodeSpec, Params

# Start numbers: demonstrations count from 0, exploration from here, so that the two never share a start.
EXPLORATION_SEED = 100_000
PART = 128  # episodes per written folder
STARTS_SEED = 50_000  # starts without an episode count from here behind the first of exploration
ATTEMPTS = 4  # starts tried per wanted demonstration


def collect_demonstrations(config: ExperimentConfig, workdir: Workdir, environment: Environment) -> None:
    """Writes `demonstrations_per_task` successful expert episodes per task, statistics and kinematics.

    Raises:
      WorldEnvError: the expert failed too often.
    """
    root = workdir / "data" / "demonstrations"
    present = Counter(episode.task for episode in open_episodes(root)) if root.exists() else Counter()
    wanted = config.collect.demonstrations_per_task
    tried = range(config.seed * wanted * ATTEMPTS, (config.seed + 1) * wanted * ATTEMPTS)  # start numbers
    kept: dict[int, list[Episode]] = {t: [] for t in range(config.environment.tasks) if present[t] < wanted}
    progress = Progress("collect demonstrations", wanted * config.environment.tasks, present.total())
    for first in tried[::wanted]:
        seeds = range(first, first + wanted)
        specs = [EpisodeSpec(task, seed, "train", config.environment.starts) for task in kept for seed in seeds]
        # All tasks in one call: every slot has a scene of its own to stay with.
        for spec, episode in zip(specs, environment.expert_episodes(specs, config.collect.demonstration_noise)):
            if isinstance(episode, EpisodeError):
                print(f"an expert episode could not be run: {episode}", flush=True)
            elif episode.succeeded and spec.task in kept:
                kept[spec.task].append(episode)
                progress.update(present.total() + sum(map(len, kept.values())))
                if len(kept[spec.task]) == wanted:
                    add_episodes(root, kept.pop(spec.task))
                    present[spec.task] += wanted
    progress.close()
    if kept:
        task, episodes = next(iter(kept.items()))
        raise WorldEnvError(
            f"the expert solved {len(episodes)} of {len(tried)} starts of task {task} "
            f"({environment.instructions[task]!r}), {wanted} demonstrations are needed: lower "
            "collect.demonstration_noise"
        )
    if "statistics" not in workdir.calibration:  # shipped models bring those that they were trained with
        calibrate_workdir(workdir, config.pretrained)


def calibrate_workdir(workdir: Workdir, pretrained: PretrainedConfig) -> None:
    """Statistics (of the demonstrations, or those of a published policy) and kinematics, for the models."""
    root = workdir / "data" / "demonstrations"
    episodes = list(open_episodes(root))
    kinematics = fit_kinematics([e.proprio for e in episodes], [e.actions for e in episodes])
    statistics = published_statistics(pretrained) or statistics_from_dict(compute_statistics(episodes), root)
    workdir.calibrate(statistics=to_lists(statistics), kinematics=to_lists(kinematics))


def collect_exploration(
    config: ExperimentConfig, workdir: Workdir, environment: Environment, models: Models, params: Params
) -> None:
    """Writes `exploration_per_task` episodes per task of the policy acting with its Laplace noise.

    Raises:
      WorldEnvError: not one episode could be run.
    """
    root = workdir / "data" / "exploration"
    collect = config.collect
    specs = exploration_specs(config)
    written = {e.spec for e in open_episodes(root)} if root.exists() else set()
    missing = [spec for spec in specs if spec not in written]
    policy = models.policy(collect.exploration_scale)
    key = jax.random.fold_in(jax.random.key(config.seed), EXPLORATION_SEED)
    compiled = compile_policy(policy, models.statistics, models.policy_prompts)
    act = policy_actor(compiled, params, key, mesh_from_config(config.mesh))
    if collect.try_again:
        act = trying_again(act, partial(is_empty, models.kinematics), retried_specs(config))
    progress = Progress("collect exploration", len(specs), len(written))
    errors: list[str] = []
    for first in range(0, len(missing), PART):
        part: dict[int, Episode] = {}
        for done, (position, outcome) in enumerate(
            run_episodes(
                environment,
                act,
                missing[first : first + PART],
                record=True,
                noise=collect.exploration_scale,
                after_success=collect.after_success,
            )
        ):
            if outcome.error:
                errors.append(outcome.error)
            else:
                part[position] = outcome.episode
            progress.update(len(written) + first + done + 1)
        if part:
            add_episodes(root, [part[position] for position in sorted(part)])
    progress.close()
    if not root.exists():
        raise WorldEnvError(f"not one of {len(specs)} exploration episodes could be run: {errors[0]}")
    success = [episode.succeeded for episode in open_episodes(root)]
    print(f"exploration: {len(success)} episodes, {np.mean(success):.0%} successful", flush=True)
    if errors:
        print(f"{len(errors)} could not be run, the next start tries them again; the first: {errors[0]}", flush=True)


def collect_starts(config: ExperimentConfig, workdir: Workdir, environment: Environment) -> None:
    """Writes the first frames of `starts_per_task` further starts per task; no step is taken.

    Imagination can begin at them. From the starts of exploration alone, a few per task, a policy learns by heart.

    Raises:
      WorldEnvError: a start cannot be made.
    """
    root = workdir / "data" / "starts"
    first = EXPLORATION_SEED * (config.seed + 1) + STARTS_SEED
    specs = [
        EpisodeSpec(task, first + number, "train", config.environment.starts)
        for number in range(config.collect.starts_per_task)
        for task in range(config.environment.tasks)
    ]
    written = {e.spec for e in open_episodes(root)} if root.exists() else set()
    missing = [spec for spec in specs if spec not in written]
    progress = Progress("collect starts", len(specs), len(written))
    for begin in range(0, len(missing), PART):
        part: dict[int, Episode] = {}
        for done, (position, outcome) in enumerate(record_starts(environment, missing[begin : begin + PART])):
            if outcome.error:
                raise WorldEnvError(f"start {outcome.spec} could not be made: {outcome.error}")
            part[position] = outcome.episode
            progress.update(len(written) + begin + done + 1)
        add_episodes(root, [part[position] for position in sorted(part)])
    progress.close()


def exploration_specs(config: ExperimentConfig) -> list[EpisodeSpec]:
    """The episodes of exploration, task by task in turn: `tries_per_start` from each start of the training part.

    Tries that differ from the same start are what a simulator learns from which hands miss *this* thing.
    """
    collect, first = config.collect, EXPLORATION_SEED * (config.seed + 1)
    held_out = _held_out(collect.exploration_per_task, collect.held_out_fraction)
    training = collect.exploration_per_task - held_out
    tries = [number % collect.tries_per_start for number in range(training)] + [0] * held_out
    return [
        EpisodeSpec(task, first + number - sample, "train", config.environment.starts, sample)
        for number, sample in enumerate(tries)
        for task in range(config.environment.tasks)
    ]


def training_specs(config: ExperimentConfig) -> list[EpisodeSpec]:
    """Those of `exploration_specs` that are not held out."""
    held_out = _held_out(config.collect.exploration_per_task, config.collect.held_out_fraction)
    return exploration_specs(config)[: -held_out * config.environment.tasks]


def retried_specs(config: ExperimentConfig) -> set[EpisodeSpec]:
    """Those of `training_specs` in which empty hands try again, `collect.try_again` of them, evenly spread.

    The others are needed, too: hands that carry nothing to the end are what simulator and reflector have to know.
    """
    share, tasks = config.collect.try_again, config.environment.tasks
    chosen = lambda number: int(share * (number + 1)) > int(share * number)
    return {spec for row, spec in enumerate(training_specs(config)) if chosen(row // tasks)}


def split_exploration(episodes: Sequence[Episode], held_out_fraction: float) -> tuple[list[Episode], list[Episode]]:
    """(training, held-out) exploration; the last starts of each task are held out, images stay encoded."""
    per_task: dict[int, list[Episode]] = {}
    for episode in episodes:
        per_task.setdefault(episode.task, []).append(episode)
    training, held_out = [], []
    for task in sorted(per_task):
        ordered = sorted(per_task[task], key=lambda episode: (episode.seed, episode.sample))
        cut = len(ordered) - _held_out(len(ordered), held_out_fraction)
        while cut and ordered[cut - 1].seed == ordered[cut].seed:  # where held-out episodes could not be run
            cut -= 1
        training += ordered[:cut]
        held_out += ordered[cut:]
    return training, held_out


def _held_out(episodes: int, fraction: float) -> int:
    return max(1, round(fraction * episodes))
