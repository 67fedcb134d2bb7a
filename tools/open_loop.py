# SPDX-License-Identifier: Apache-2.0
"""How good the simulator's frames are, camera by camera, its hand and its grasps, on a run's held-out episodes.

    python tools/open_loop.py --config=libero_cpu --workdir=runs/libero_cpu --episodes=50 --chunks=8 --strips=strips

Episodes are replayed open loop from their first frames over the rollout's horizon, or --chunks. Prints a table (PSNR in
dB of simulator / copy-last-frame), how far the hand is off, whether imagination knows which grasps hold, and all of it
as one JSON line; --strips draws the first --pictures successes and failures.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from worldenv_jax.configs import get_config  # noqa: E402
from worldenv_jax.errors import run_main  # noqa: E402
from worldenv_jax.evaluation.strips import Strip, draw_strip, merge_views, save_image  # noqa: E402
from worldenv_jax.evaluation.summary import align_columns  # noqa: E402
from worldenv_jax.mesh import use_every_core  # noqa: E402
from worldenv_jax.overrides import apply_overrides  # noqa: E402
from worldenv_jax.training.open_loop import OpenLoop, hand_quality, quality_by_camera, replay_open_loop  # noqa: E402
from worldenv_jax.training.pipeline import Run, in_memory  # noqa: E402

STRETCH = 16  # steps per column


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="tabletop")
    parser.add_argument("--set", action="append", default=[], help="override, as in the experiments")
    parser.add_argument("--workdir", required=True, help="a run with a trained simulator")
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--chunks", type=int, help="T; by default the rollout's")
    parser.add_argument("--strips", help="folder for pictures")
    parser.add_argument("--pictures", type=int, default=3, help="of each outcome")
    arguments = parser.parse_args()
    config = apply_overrides(get_config(arguments.config), arguments.set)
    if config.mesh.data == 0:
        use_every_core()
    run = Run(config, arguments.workdir)
    try:
        params, episodes, models = run.params("simulator"), run.exploration[1], run.models
        chosen = in_memory(episodes[:: max(1, len(episodes) // arguments.episodes)][: arguments.episodes])
        rollout = replace(models.config.rollout, num_chunks=arguments.chunks or models.config.rollout.num_chunks)
        models = replace(models, config=replace(models.config, rollout=rollout))
        replayed = replay_open_loop(models, params, chosen)
    finally:
        run.close()
    rows = quality_by_camera(replayed, STRETCH)
    stretches = [f"{i + 1}-{i + STRETCH}" for i in range(0, replayed.truth.shape[1], STRETCH)]
    print(align_columns([_cells(row) for row in rows], header=("outcome", "camera", "episodes", "mean", *stretches)))
    hand = hand_quality(replayed, STRETCH)
    print("hand, cm after each stretch: " + ", ".join(_number(metres, 100.0) for metres in hand["position"]))
    print("fingers, mm: " + ", ".join(_number(metres, 1000.0) for metres in hand["fingers"]))
    held, known = _number(hand["held"], 100.0), _number(hand["grasp_auroc"], digits=2)
    print(f"{hand['grasps']} grasps, {held} % hold, AUROC of the imagined opening {known}")
    print(json.dumps({"episodes": len(chosen), "rows": rows, "hand": hand}))
    if arguments.strips:
        draw(replayed, Path(arguments.strips), arguments.pictures)


def _number(value: float | None, factor: float = 1.0, digits: int = 1) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"


def _cells(row: dict) -> tuple[str, ...]:
    model, copy = row["simulator"], row["copy_last_frame"]
    pairs = [(model["psnr"], copy["psnr"]), *zip(model["psnr_by_stretch"], copy["psnr_by_stretch"])]
    camera = "all" if row["camera"] is None else str(row["camera"])
    return row["outcome"], camera, str(row["episodes"]), *(f"{_number(a)} / {_number(b)}" for a, b in pairs)


def draw(replayed: OpenLoop, folder: Path, pictures: int) -> None:
    """Writes <outcome>_<number>.png: true and imagined frames, all cameras side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = lambda frames: merge_views(np.concatenate([replayed.context[:, None], frames], axis=1))
    imagined, truth, ends = whole(replayed.imagined), whole(replayed.truth), 1 + replayed.valid.sum(1)
    for outcome, chosen in (("success", replayed.succeeded), ("failure", ~replayed.succeeded)):
        for number in np.flatnonzero(chosen)[:pictures]:
            strip = Strip(imagined[number, : ends[number]], truth[number, : ends[number]])
            save_image(folder / f"{outcome}_{number}.png", draw_strip(strip, columns=9))


if __name__ == "__main__":
    run_main(main)
