# SPDX-License-Identifier: Apache-2.0
"""Measures simulator and reflector on held-out exploration and applies the gate (`evaluation/gate.py`).

Everything is measured over the horizon that post-training will use, from first frames: recorded actions open loop, and
the policy that recorded them in closed loop.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from worldenv_jax import files
from worldenv_jax.configs import ExperimentConfig
from worldenv_jax.data.episodes import Episode
from worldenv_jax.evaluation.agreement import imagination_agreement
from worldenv_jax.evaluation.gate import GateResult, evaluate_gate
from worldenv_jax.evaluation.reflector_quality import calibration_figures, figures_per_task, judge_curves
from worldenv_jax.evaluation.strips import Strip, draw_strip, merge_views, save_image
from worldenv_jax.evaluation.video_quality import action_sensitivity, open_loop_quality
from worldenv_jax.mesh import shard_state, split_rows
from worldenv_jax.rollout import RolloutParams
from worldenv_jax.simulator import proprioception_error
from worldenv_jax.training.imagination import judged_successes
from worldenv_jax.training.models import Models
from worldenv_jax.training.post_training import make_imagine
from worldenv_jax.training.reflector_training import (
    REPLAY_BATCH,
    horizon,
    judge_episodes,
    labels_of,
    pad_steps,
    replay_episodes,
)
from worldenv_jax.training.workdir import Workdir, mesh_from_config


def measure_gate(
    config: ExperimentConfig,
    workdir: Workdir,
    models: Models,
    params: RolloutParams,
    held_out: Sequence[Episode],
) -> GateResult:
    """Replays held-out episodes in the simulator, judges true and imagined frames, writes gate.json and strips.

    `params.policy`: of the policy that explored.
    """
    episodes = [replace(episode, images=np.asarray(episode.images[:])) for episode in held_out]
    chunks = config.rollout.num_chunks
    key = jax.random.key(config.seed + 10)
    imagined = replay_episodes(models, params.simulator, episodes, key, chunks)
    still = replay_episodes(models, params.simulator, [_without_motion(e) for e in episodes], key, chunks)
    other = replay_episodes(models, params.simulator, _with_other_actions(episodes), key, chunks)

    steps = horizon(config)
    truth, valid = pad_steps([e.images[1:] for e in episodes], steps)
    predictions = {
        "simulator": pad_steps([e.images[1:] for e in imagined], steps)[0],
        "no_action": pad_steps([e.images[1:] for e in still], steps)[0],
    }
    succeeded = np.array([e.succeeded for e in episodes])
    context = np.stack([e.images[0] for e in episodes])
    figures = open_loop_quality(context, truth, valid, succeeded, predictions)
    sensitivity = action_sensitivity(
        truth, valid, predictions["simulator"], pad_steps([e.images[1:] for e in other], steps)[0]
    )
    judged = {
        "true": judge_episodes(models, params.reflector, episodes)[0],
        "imagined": judge_episodes(models, params.reflector, imagined)[0],
    }
    labels = {"true": labels_of(config, episodes), "imagined": labels_of(config, imagined)}
    threshold, tasks = config.rollout.threshold, [episode.task for episode in episodes]
    reflector = {
        kind: {
            **calibration_figures(probability, labels[kind], valid, threshold),
            **judge_curves(probability, labels[kind], valid),
            "per_task": figures_per_task(tasks, probability, labels[kind], valid, threshold),
        }
        for kind, probability in judged.items()
    }
    outcomes = {
        kind: imagination_agreement(((probability > threshold) & valid).any(1), succeeded)
        for kind, probability in judged.items()
    }
    if all(episode.actor == "policy" for episode in episodes):
        outcomes["policy"] = _closed_loop(config, models, params, episodes)
    result = evaluate_gate(figures, reflector, outcomes, config.gate)
    files.write_json(
        workdir / "gate.json",
        {
            **result.to_dict(),
            "simulator": figures,
            "reflector": reflector,
            "outcomes": outcomes,
            "action_sensitivity": sensitivity,
            "proprioception": _proprioception(config, episodes, imagined, valid),
        },
    )
    _draw_strips(config, workdir, episodes, imagined, judged["imagined"])
    return result


def _closed_loop(
    config: ExperimentConfig, models: Models, params: RolloutParams, episodes: Sequence[Episode]
) -> dict[str, Any]:
    """Does the policy succeed where it sees imagined frames as often as when it recorded the episodes?

    From the same starts, at most `REPLAY_BATCH` of them, with other noise.
    """
    episodes = episodes[:: -(-len(episodes) // REPLAY_BATCH)]
    policy, rollout = models.policy(config.collect.exploration_scale), replace(config.rollout, samples=1)
    imagine = make_imagine(policy, models.simulator, models.reflector, rollout)
    mesh = mesh_from_config(config.mesh)
    starts = split_rows(models.starts(episodes), mesh)
    with jax.set_mesh(mesh):
        imagined = imagine(shard_state(params, mesh), jax.random.key(config.seed + 11), starts)
    truth = np.array([episode.success[: horizon(config) + 1].any() for episode in episodes])
    return imagination_agreement(judged_successes(imagined, config.rollout.threshold), truth)


def _proprioception(
    config: ExperimentConfig, episodes: Sequence[Episode], imagined: Sequence[Episode], valid: np.ndarray
) -> dict[str, list[float | None]]:
    """The error of proprioception advanced from actions, at the end of every chunk; null beyond the longest episode."""
    steps, chunk = horizon(config), config.policy.chunk
    rows = [pad_steps([e.proprio[1:] for e in part], steps)[0] for part in (imagined, episodes)]
    errors = proprioception_error(*rows, valid)
    finite = lambda value: float(value) if np.isfinite(value) else None
    return {name: [finite(value) for value in error[chunk - 1 :: chunk]] for name, error in errors.items()}


def _without_motion(episode: Episode) -> Episode:
    """Zero deltas; the gripper keeps the recorded command."""
    return replace(episode, actions=episode.actions * np.array([0, 0, 0, 0, 0, 0, 1], np.float32))


def _with_other_actions(episodes: Sequence[Episode]) -> list[Episode]:
    """Each episode with the actions of the next one, cut or held to its own length."""
    others = [*episodes[1:], episodes[0]]
    result = []
    for own, other in zip(episodes, others):
        actions = np.concatenate([other.actions, np.zeros((own.num_steps, 7), np.float32)])[: own.num_steps]
        result.append(replace(own, actions=actions))
    return result


def _draw_strips(
    config: ExperimentConfig,
    workdir: Workdir,
    episodes: Sequence[Episode],
    imagined: Sequence[Episode],
    probability: np.ndarray,
) -> None:
    """Two successes and two failures: true | imagined | error, with R under the frames."""
    succeeded = [i for i, episode in enumerate(episodes) if episode.succeeded][:2]
    failed = [i for i, episode in enumerate(episodes) if not episode.succeeded][:2]
    for row in succeeded + failed:
        episode, dream = episodes[row], imagined[row]
        length = len(dream.images)
        curve = np.concatenate([[np.nan], probability[row, : length - 1]])
        over = np.flatnonzero(curve > config.rollout.threshold)
        strip = Strip(
            imagined=merge_views(dream.images),
            true=merge_views(episode.images[:length]),
            probability=curve,
            threshold=config.rollout.threshold,
            end=int(over[0]) if len(over) else None,
            success=episode.success[:length],
        )
        outcome = "success" if episode.succeeded else "failure"
        name = f"replay_{outcome}_{row}.png"
        caption = f"Held-out {outcome}, replayed open loop: {episode.instruction}"
        save_image(workdir.add_picture(name, caption), draw_strip(strip))
