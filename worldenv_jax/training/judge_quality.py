# SPDX-License-Identifier: Apache-2.0
"""The trained reflector beside the bare vision-language model that it is made of and beside a clock."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from worldenv_jax.data.episodes import Episode
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.evaluation.reflector_quality import DEFAULT_THRESHOLD, calibration_figures, clock
from worldenv_jax.reflector import answering
from worldenv_jax.training.models import Models
from worldenv_jax.training.pretrained import initial_reflector
from worldenv_jax.training.reflector_training import horizon, judge_episodes, labels_of, pad_steps, replay_episodes
from worldenv_jax.training.workdir import mesh_from_config
from worldenv_jax.types import Params


def judge_quality(
    models: Models,
    simulator_params: Params,
    reflector_params: Params,
    episodes: Sequence[Episode],
    training: Sequence[Episode],
) -> list[dict[str, Any]]:
    """Judges held-out episodes and their replays in the simulator over the rollout's horizon.

    Args:
      models: of a run, its temperature and threshold included.
      simulator_params: of the trained simulator.
      reflector_params: of the trained reflector.
      episodes: held-out ones, with decoded images.
      training: what the reflector was trained on; images are not read.

    Returns:
      Rows of "judge" ("trained", or "bare": the model as it was before training, asked whether the task is done, R from
      the logits of yes and no, the paper's ablation), "frames_of" ("true", "imagined"), "threshold" and the figures of
      `calibration_figures`. Without published weights the bare model is a random one and knows nothing. The last row
      is of the judge "clock" ("frames_of": "none"), which knows task and time: who is no better has not learned to see.

    Raises:
      WorldEnvError: no episodes.
    """
    if not episodes:
        raise WorldEnvError("judge quality: there are no held-out episodes to measure on")
    config = models.config
    key = jax.random.key(config.seed + 10)
    imagined = replay_episodes(models, simulator_params, episodes, key, config.rollout.num_chunks)
    frames_of = {"true": episodes, "imagined": imagined}
    labels = {kind: labels_of(config, seen) for kind, seen in frames_of.items()}
    _, valid = pad_steps([episode.images[1:] for episode in episodes], horizon(config))
    initial = initial_reflector(config, jax.random.key(config.seed + 3), mesh_from_config(config.mesh))
    asked = replace(models, config=replace(config, reflector=answering(replace(config.reflector, temperature=1.0))))
    judges = {
        "trained": (models, reflector_params, config.rollout.threshold),
        "bare": (asked, initial, DEFAULT_THRESHOLD),
    }
    rows = [
        {
            "judge": name,
            "frames_of": kind,
            "threshold": threshold,
            **calibration_figures(judge_episodes(judge, params, seen)[0], labels[kind], valid, threshold),
        }
        for name, (judge, params, threshold) in judges.items()
        for kind, seen in frames_of.items()
    ]
    steps, task = horizon(config), [episode.task for episode in episodes]
    known = pad_steps([episode.success[1:] for episode in training], steps)
    told = clock(task, [episode.task for episode in training], *known)
    figures = calibration_figures(np.where(valid, told, 0.0), labels["true"], valid, DEFAULT_THRESHOLD)
    return [*rows, {"judge": "clock", "frames_of": "none", "threshold": DEFAULT_THRESHOLD, **figures}]
