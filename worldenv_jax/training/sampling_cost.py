# SPDX-License-Identifier: Apache-2.0
"""What few-step sampling costs: quality and time of the simulator over the number of denoising steps."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from worldenv_jax.data.episodes import Episode
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.evaluation.video_quality import psnr
from worldenv_jax.training.models import Models
from worldenv_jax.training.reflector_training import horizon, make_replay, pad_steps, recorded_chunks
from worldenv_jax.types import Params

STEPS = (1, 2, 4, 8, 27)  # 27: EVAC's


def sampling_cost(
    models: Models, params: Params, episodes: Sequence[Episode], steps: Sequence[int] = STEPS
) -> list[dict[str, Any]]:
    """Replays episodes open loop, as one batch, over the rollout's horizon, once per number of denoising steps.

    Args:
      models: whose simulator.
      params: the simulator's parameters.
      episodes: held-out ones, with decoded images; their first frames and actions are given.
      steps: numbers of denoising steps.

    Returns:
      A row of 0 steps (the first frame repeated), then one per number: "steps"; "psnr", "psnr_success" and
      "psnr_failure" in dB, means over valid steps and views (None where there is no such episode); "seconds" of the
      second call, compilation excluded; "frames_per_second"; "trained": False where the model was trained for other
      numbers of steps only (`sampled_steps_only`).

    Raises:
      WorldEnvError: no episodes, or ones that the simulator cannot replay.
    """
    if not episodes:
        raise WorldEnvError("sampling cost: there are no held-out episodes to measure on")
    chunks = models.config.rollout.num_chunks
    truth, valid = pad_steps([np.asarray(episode.images[1:]) for episode in episodes], horizon(models.config))
    succeeded = np.array([episode.succeeded for episode in episodes])
    starts, actions = models.starts(episodes), recorded_chunks(models, episodes, chunks)
    keys = jax.random.split(jax.random.key(0), len(episodes))

    def quality_of(frames: np.ndarray) -> dict[str, float | None]:
        quality = psnr(frames, truth).mean(-1)
        mean = lambda chosen: float(quality[chosen].mean()) if chosen.any() else None
        outcomes = {"psnr_success": succeeded, "psnr_failure": ~succeeded}
        return {"psnr": mean(valid)} | {name: mean(valid & chosen[:, None]) for name, chosen in outcomes.items()}

    still = np.broadcast_to(np.asarray(starts.images)[:, None], truth.shape)
    rows = [{"steps": 0, **quality_of(still), "seconds": 0.0, "frames_per_second": None, "trained": False}]
    for count in steps:
        simulator = replace(models.config.simulator, ddim_steps=count)
        changed = replace(models, config=replace(models.config, simulator=simulator))
        replay = make_replay(changed, chunks)
        frames = np.asarray(replay(params, keys, starts, actions).frames).reshape(truth.shape)
        began = time.perf_counter()
        jax.block_until_ready(replay(params, keys, starts, actions))
        seconds = time.perf_counter() - began
        rows.append(
            {
                "steps": count,
                **quality_of(frames),
                "seconds": seconds,
                "frames_per_second": valid.size / models.config.simulator.frame_stride / seconds,
                "trained": count == models.config.simulator.ddim_steps or not simulator.sampled_steps_only,
            }
        )
    return rows
