# SPDX-License-Identifier: Apache-2.0
"""Held-out episodes replayed open loop by the simulator alone: its frames by camera, its hand, its grasps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from worldenv_jax.data.episodes import Episode
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.evaluation.reflector_quality import auroc
from worldenv_jax.evaluation.video_quality import open_loop_quality
from worldenv_jax.simulator import proprioception_error
from worldenv_jax.simulator.proprioception import finger_opening
from worldenv_jax.training.models import Models
from worldenv_jax.training.reflector_training import horizon, pad_steps, replay_episodes
from worldenv_jax.types import Params

GRASP_STEPS = 12  # after the command to close the fingers have stopped
HELD = 0.008  # metres between fingers that hold something


class OpenLoop(NamedTuple):
    """E episodes over N steps."""

    context: np.ndarray  # uint8 [E, V, H, W, 3], the only frames that were given
    truth: np.ndarray  # uint8 [E, N, V, H, W, 3]
    imagined: np.ndarray  # uint8 [E, N, V, H, W, 3]
    valid: np.ndarray  # bool [E, N], False after the end of an episode
    succeeded: np.ndarray  # bool [E]
    true_proprio: np.ndarray  # float32 [E, N, 8], after each step
    imagined_proprio: np.ndarray  # float32 [E, N, 8]
    closing: np.ndarray  # bool [E, N], the hand is told to close
    frame_stride: int = 1  # only every so many-th imagined frame was generated, the others repeat it


def replay_open_loop(models: Models, params: Params, episodes: Sequence[Episode]) -> OpenLoop:
    """Imagines what the recorded actions do, from the first frames, over the rollout's horizon.

    Args:
      models: whose simulator.
      params: the simulator's parameters.
      episodes: held-out ones, with decoded images.

    Raises:
      WorldEnvError: no episodes, or ones that the simulator cannot replay.
    """
    if not episodes:
        raise WorldEnvError("open loop: there are no held-out episodes to replay")
    steps = horizon(models.config)
    truth, valid = pad_steps([np.asarray(episode.images[1:]) for episode in episodes], steps)
    proprio, _ = pad_steps([np.asarray(episode.proprio[1:]) for episode in episodes], steps)
    closing, _ = pad_steps([np.asarray(episode.actions)[:, 6] > 0 for episode in episodes], steps)
    replayed = replay_episodes(models, params, episodes, jax.random.key(0), models.config.rollout.num_chunks)
    return OpenLoop(
        context=np.stack([episode.images[0] for episode in episodes]),
        truth=truth,
        imagined=pad_steps([episode.images[1:] for episode in replayed], steps)[0],
        valid=valid,
        succeeded=np.array([episode.succeeded for episode in episodes]),
        true_proprio=proprio,
        imagined_proprio=pad_steps([episode.proprio[1:] for episode in replayed], steps)[0],
        closing=closing,
        frame_stride=models.config.simulator.frame_stride,
    )


def quality_by_camera(replayed: OpenLoop, stretch: int = 16) -> list[dict[str, Any]]:
    """PSNR and SSIM beside copy-last-frame, of the steps whose frames were generated.

    Returns: a row per outcome and camera, and one over all cameras ("camera": None): "outcome", "episodes", and for
    "simulator" and "copy_last_frame" {"psnr" (dB), "ssim", "psnr_by_stretch": means over `stretch` steps each}; None
    where there is no valid step.
    """
    views = replayed.truth.shape[2]
    generated = np.arange(1, replayed.valid.shape[1] + 1) % replayed.frame_stride == 0
    valid = replayed.valid & generated
    rows = []
    for camera in (None, *range(views)):
        seen = slice(None) if camera is None else slice(camera, camera + 1)
        figures = open_loop_quality(
            replayed.context[:, seen],
            replayed.truth[:, :, seen],
            valid,
            replayed.succeeded,
            {"simulator": replayed.imagined[:, :, seen]},
        )
        for outcome, scores in figures.items():
            weights = valid[replayed.succeeded == (outcome == "success")].sum(0)
            row = {"outcome": outcome, "camera": camera, "episodes": scores["simulator"]["episodes"]}
            for name, score in scores.items():
                by_stretch = _by_stretch(score["psnr_per_step"], weights, stretch)
                row[name] = {"psnr": score["psnr"], "ssim": score["ssim"], "psnr_by_stretch": by_stretch}
            rows.append(row)
    return rows


def hand_quality(replayed: OpenLoop, stretch: int = 16) -> dict[str, Any]:
    """How far the imagined hand is off at the end of every stretch, and whether imagination knows which grasps hold.

    Returns: "position" (m), "rotation" (rad) and "fingers" (m), lists of means over episodes, None where there is no
      such step; and of every episode's first closing of the hand that lasts `GRASP_STEPS`: "grasps", their number,
      "held", the share that hold something, and "grasp_auroc", of the imagined opening of the fingers as a score of
      the true one being more than `HELD` (0.5: imagination does not know; None where all hold or none).
    """
    known = lambda value: None if np.isnan(value) else float(value)
    errors = proprioception_error(replayed.imagined_proprio, replayed.true_proprio, replayed.valid)
    at_ends = {name: error[stretch - 1 :: stretch] for name, error in errors.items()}
    rows = [(row, step) for row in range(len(replayed.valid)) for step in _first_grasp(replayed, row)]
    score, held = (
        np.array([float(finger_opening(proprio[at])) for at in rows])
        for proprio in (replayed.imagined_proprio, replayed.true_proprio)
    )
    return {
        **{name: [known(value) for value in values] for name, values in at_ends.items()},
        "grasps": len(rows),
        "held": float((held > HELD).mean()) if rows else None,
        "grasp_auroc": known(auroc(score, held > HELD)),
    }


def _first_grasp(replayed: OpenLoop, row: int) -> list[int]:
    """The step at which the fingers of the first closing have stopped, if the episode and the command last so long."""
    closing = replayed.closing[row]
    begins = np.flatnonzero(closing[1:] & ~closing[:-1])[:1] + 1
    stops = begins + GRASP_STEPS
    return [s for s in stops if s < len(closing) and replayed.valid[row, s] and closing[s - GRASP_STEPS : s].all()]


def _by_stretch(per_step: Sequence[float | None], weights: np.ndarray, stretch: int) -> list[float | None]:
    values = np.array([np.nan if value is None else value for value in per_step])
    means = []
    for start in range(0, len(values), stretch):
        weight, value = weights[start : start + stretch], values[start : start + stretch]
        means.append(float((weight * np.nan_to_num(value)).sum() / weight.sum()) if weight.any() else None)
    return means
