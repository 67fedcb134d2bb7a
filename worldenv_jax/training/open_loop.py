# SPDX-License-Identifier: Apache-2.0
"""Held-out episodes replayed open loop by the simulator alone, and how good the frames are, camera by camera."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from worldenv_jax.data.episodes import Episode
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.evaluation.video_quality import open_loop_quality
from worldenv_jax.training.models import Models
from worldenv_jax.training.reflector_training import horizon, make_replay, pad_steps, recorded_chunks
from worldenv_jax.types import Params


class OpenLoop(NamedTuple):
    """E episodes over N steps."""

    context: np.ndarray  # uint8 [E, V, H, W, 3], the only frames that were given
    truth: np.ndarray  # uint8 [E, N, V, H, W, 3]
    imagined: np.ndarray  # uint8 [E, N, V, H, W, 3]
    valid: np.ndarray  # bool [E, N], False after the end of an episode
    succeeded: np.ndarray  # bool [E]


def replay_open_loop(models: Models, params: Params, episodes: Sequence[Episode]) -> OpenLoop:
    """Imagines what the recorded actions do, from the first frames, over the rollout's horizon, as one batch.

    Args:
      models: whose simulator.
      params: the simulator's parameters.
      episodes: held-out ones, with decoded images.

    Raises:
      WorldEnvError: no episodes, or ones that the simulator cannot replay.
    """
    if not episodes:
        raise WorldEnvError("open loop: there are no held-out episodes to replay")
    chunks = models.config.rollout.num_chunks
    truth, valid = pad_steps([np.asarray(episode.images[1:]) for episode in episodes], horizon(models.config))
    starts, actions = models.starts(episodes), recorded_chunks(models, episodes, chunks)
    keys = jax.random.split(jax.random.key(0), len(episodes))
    frames = np.asarray(make_replay(models, chunks)(params, keys, starts, actions).frames).reshape(truth.shape)
    succeeded = np.array([episode.succeeded for episode in episodes])
    return OpenLoop(np.asarray(starts.images), truth, frames, valid, succeeded)


def quality_by_camera(replayed: OpenLoop, stretch: int = 16) -> list[dict[str, Any]]:
    """PSNR and SSIM beside copy-last-frame.

    Returns: a row per outcome and camera, and one over all cameras ("camera": None): "outcome", "episodes", and for
    "simulator" and "copy_last_frame" {"psnr" (dB), "ssim", "psnr_by_stretch": means over `stretch` steps each}; None
    where there is no valid step.
    """
    views = replayed.truth.shape[2]
    rows = []
    for camera in (None, *range(views)):
        seen = slice(None) if camera is None else slice(camera, camera + 1)
        figures = open_loop_quality(
            replayed.context[:, seen],
            replayed.truth[:, :, seen],
            replayed.valid,
            replayed.succeeded,
            {"simulator": replayed.imagined[:, :, seen]},
        )
        for outcome, scores in figures.items():
            weights = replayed.valid[replayed.succeeded == (outcome == "success")].sum(0)
            row = {"outcome": outcome, "camera": camera, "episodes": scores["simulator"]["episodes"]}
            for name, score in scores.items():
                by_stretch = _by_stretch(score["psnr_per_step"], weights, stretch)
                row[name] = {"psnr": score["psnr"], "ssim": score["ssim"], "psnr_by_stretch": by_stretch}
            rows.append(row)
    return rows


def _by_stretch(per_step: Sequence[float | None], weights: np.ndarray, stretch: int) -> list[float | None]:
    values = np.array([np.nan if value is None else value for value in per_step])
    means = []
    for start in range(0, len(values), stretch):
        weight, value = weights[start : start + stretch], values[start : start + stretch]
        means.append(float((weight * np.nan_to_num(value)).sum() / weight.sum()) if weight.any() else None)
    return means
