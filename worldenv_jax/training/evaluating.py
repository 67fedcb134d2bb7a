# SPDX-License-Identifier: Apache-2.0
"""Success in the true world, on test starts that no stage has seen: of policies, and of what they are compared with.

An episode that could not be run (the simulator failed) is an error. It is listed and counted apart; rates and intervals
are over the completed episodes.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from worldenv_jax import files
from worldenv_jax.configs import ExperimentConfig
from worldenv_jax.data.episodes import Episode
from worldenv_jax.envs.base import Environment, EpisodeError
from worldenv_jax.envs.protocol import protocol_hash
from worldenv_jax.envs.runner import ActFn, Outcome, run_episodes
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.evaluation.summary import paired_comparison, success_rate
from worldenv_jax.metrics import Progress
from worldenv_jax.training.acting import replay_actor
from worldenv_jax.training.models import Models
from worldenv_jax.training.reflector_training import make_judge
from worldenv_jax.training.workdir import Workdir
from worldenv_jax.types import EpisodeSpec, Params

# Runs episodes; yields (position in specs, outcome) as they end.
PlayFn = Callable[[Sequence[EpisodeSpec]], Iterator[tuple[int, Outcome]]]

# Who ends an episode (World-Env, table 4) -> what then counts as success; part of the protocol and its hash.
TERMINATIONS = {
    "predicate": "task predicate after any step up to max_steps",
    "limit": "task predicate after max_steps",
    "reflector": "task predicate after the first step with R > eta, else after max_steps",
}
JUDGED = 8  # episodes that are judged at once


def evaluate(
    config: ExperimentConfig,
    workdir: Workdir,
    environment: Environment,
    play: PlayFn,
    policy: str,
    starts: str | None = None,
    termination: str = "predicate",
) -> dict[str, Any]:
    """Runs `episodes_per_task` test starts of every task; writes evaluation/<policy>.json.

    Args:
      play: runs the episodes; `termination_player` makes those of the terminations "limit" and "reflector".
      policy: whose result it is. The file's name has the termination and the starts too, where they are not the usual.
      starts: "official" or "shifted"; by default those of the config.
      termination: a key of `TERMINATIONS`.

    Returns:
      {"success": rate with interval over the completed episodes, "errors": how many could not be run, "per_task": the
      same of each task, "protocol_hash", "starts", "termination", "episodes": one {task, seed, success, steps, error}
      each}. A result that is already there is returned as it is, unless it was measured by another protocol.

    Raises:
      WorldEnvError: the world has no such starts, or not one episode could be run.
    """
    starts = starts or config.environment.starts
    if starts not in environment.protocol["start_kinds"]:
        raise WorldEnvError(f"{environment.name} has no {starts} starts: {environment.protocol['start_kinds']}")
    name = policy if termination == "predicate" else f"{policy}_{termination}"
    name += "" if starts == config.environment.starts else f"_{starts}"
    saved = workdir / "evaluation" / f"{name}.json"
    rules = protocol_hash(environment.protocol | {"success": TERMINATIONS[termination]})
    if saved.exists() and (known := files.read_json(saved))["protocol_hash"] == rules:
        return known
    specs, stage = test_specs(config, starts), f"evaluate_{name}"
    outcomes: list[Any] = [None] * len(specs)
    progress = Progress(stage, len(specs))
    with workdir.timed(stage):
        for done, (position, outcome) in enumerate(play(specs)):
            outcomes[position] = outcome
            progress.update(done + 1)
    progress.close()
    if all(outcome.error for outcome in outcomes):
        raise WorldEnvError(f"{stage}: not one of {len(specs)} episodes could be run: {outcomes[0].error}")
    result = {
        **_rate(outcomes),
        "per_task": [_flat(o for o in outcomes if o.spec.task == task) for task in range(config.environment.tasks)],
        "protocol_hash": rules,
        "starts": starts,
        "termination": termination,
        "episodes": [
            {"task": o.spec.task, "seed": o.spec.seed, "success": o.success, "steps": o.steps, "error": o.error}
            for o in outcomes
        ],
    }
    files.write_json(saved, result)
    return result


def test_specs(config: ExperimentConfig, starts: str) -> list[EpisodeSpec]:
    """The test episodes: the same for every policy and every seed of the experiment."""
    return [
        EpisodeSpec(task, seed, "test", starts)
        for seed in range(config.evaluation.episodes_per_task)
        for task in range(config.environment.tasks)
    ]


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """`paired_comparison` of two results of `evaluate`, over the episodes that both have completed.

    Raises:
      WorldEnvError: they were measured on other starts or by other rules.
    """
    rules = [[result[key] for key in ("protocol_hash", "starts")] for result in (before, after)]
    episodes = [[(row["task"], row["seed"]) for row in result["episodes"]] for result in (before, after)]
    if rules[0] != rules[1] or episodes[0] != episodes[1]:
        raise WorldEnvError(f"results of different episodes cannot be compared: {rules[0]}, {rules[1]}")
    pairs = [(a["success"], b["success"]) for a, b in zip(before["episodes"], after["episodes"])]
    completed = [pair for pair in pairs if None not in pair]
    if not completed:
        raise WorldEnvError("no episode was completed by both policies: there is nothing to compare")
    return paired_comparison(*np.array(completed, bool).T)


def expert_outcomes(environment: Environment, specs: Sequence[EpisodeSpec]) -> Iterator[tuple[int, Outcome]]:
    """The scripted expert without noise, under a policy's step limit."""
    order = sorted(range(len(specs)), key=lambda position: specs[position].task)  # a scene is loaded once
    episodes = environment.expert_episodes([specs[position] for position in order], 0.0, draw=False)
    for position, episode in zip(order, episodes):
        spec = specs[position]
        if isinstance(episode, EpisodeError):
            yield position, Outcome(spec, None, None, error=str(episode))
            continue
        inside = episode.success[1 : environment.max_steps + 1]
        steps = int(inside.argmax()) + 1 if inside.any() else environment.max_steps
        yield position, Outcome(spec, bool(inside.any()), steps)


def replay_outcomes(environment: Environment, episodes: Sequence[Episode]) -> Iterator[tuple[Episode, Outcome]]:
    """Every recorded episode again: its own actions, open loop, from its own start, however long it is."""
    recorded = {episode.spec: episode for episode in episodes}
    longest = max((e.num_steps for e in episodes), default=0)
    act = replay_actor(recorded.__getitem__)
    for _, outcome in run_episodes(environment, act, list(recorded), max_steps=longest):
        yield recorded[outcome.spec], outcome


def termination_player(
    environment: Environment, act: ActFn, termination: str, models: Models, reflector: Params
) -> PlayFn:
    """Plays episodes that go on after success, to the limit or until the reflector stops them.

    Chunks are executed open loop and do not depend on who watches, so the reflector is asked after an episode has run
    to the limit: the outcome is the one that it would have had, had it been stopped there.

    Raises:
      WorldEnvError: an episode has more frames than the reflector can read.
    """
    limit, config = environment.max_steps, models.config
    readable = (config.reflector.max_frames - 1) // config.policy.chunk * config.policy.chunk
    if termination == "reflector" and readable < limit:
        raise WorldEnvError(
            f"an episode has {limit} steps, the reflector can read {readable}: train one with a larger "
            f"reflector.max_frames (now {config.reflector.max_frames})"
        )

    def play_to_the_limit(specs):
        for position, outcome in run_episodes(environment, act, specs, after_success=limit):
            yield position, outcome if outcome.error else outcome._replace(success=outcome.holds, steps=limit)

    def play_until_stopped(specs):
        judge = make_judge(models, JUDGED)
        played = run_episodes(environment, act, specs, record=True, after_success=limit)
        while group := list(islice(played, JUDGED)):
            completed = [outcome.episode for _, outcome in group if not outcome.error]
            probability = iter(judge(reflector, completed, limit)[0] if completed else ())
            for position, outcome in group:
                if not outcome.error:
                    over = next(probability)[:limit] > config.rollout.threshold
                    stop = int(over.argmax()) + 1 if over.any() else limit
                    outcome = Outcome(outcome.spec, bool(outcome.episode.success[stop]), stop)
                yield position, outcome

    return play_to_the_limit if termination == "limit" else play_until_stopped


def _rate(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    completed = [outcome.success for outcome in outcomes if not outcome.error]
    return {"success": success_rate(sum(completed), len(completed)), "errors": len(outcomes) - len(completed)}


def _flat(outcomes: Iterator[Outcome]) -> dict[str, Any]:
    rate = _rate(list(outcomes))
    return {**rate["success"], "errors": rate["errors"]}
