# SPDX-License-Identifier: Apache-2.0
"""Whether what the imagined hand holds is recognisable, on a run's held-out episodes, replayed open loop.

    python tools/held_things.py --config=libero_cpu --workdir=runs/libero_cpu --sheet=held.png

Where the true hand carries something, the nearest true picture of a held thing in the training episodes says which task
it belongs to (`evaluation/held_things.py`): of true pictures, imagined ones and the first frame, by camera. Prints a
table and one JSON line; --sheet draws of every episode the frame nearest to step 64, the true one above.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from worldenv_jax.configs import get_config  # noqa: E402
from worldenv_jax.errors import WorldEnvError, run_main  # noqa: E402
from worldenv_jax.evaluation.held_things import (  # noqa: E402
    build_gallery,
    carrying_steps,
    recognise,
    squares_at_hand,
)
from worldenv_jax.evaluation.strips import merge_views, save_image  # noqa: E402
from worldenv_jax.evaluation.summary import align_columns  # noqa: E402
from worldenv_jax.mesh import use_every_core  # noqa: E402
from worldenv_jax.overrides import apply_overrides  # noqa: E402
from worldenv_jax.training.open_loop import replay_open_loop  # noqa: E402
from worldenv_jax.training.pipeline import Run, in_memory  # noqa: E402

SHORT = 80  # steps; by then most things are in the air, and few at their goal
NEAR = 64  # the sheet's step
COLUMNS = 6


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="libero_cpu")
    parser.add_argument("--set", action="append", default=[], help="override, as in the experiments")
    parser.add_argument("--workdir", required=True, help="a run with a trained simulator")
    parser.add_argument("--sheet", help="picture to draw")
    arguments = parser.parse_args()
    config = apply_overrides(get_config(arguments.config), arguments.set)
    if config.mesh.data == 0:
        use_every_core()
    run = Run(config, arguments.workdir)
    try:
        chunk, horizon = config.simulator.chunk, config.simulator.chunk * config.rollout.num_chunks
        training = in_memory(run.demonstrations) + in_memory(run.exploration[0])
        steps = lambda episode: _shown(carrying_steps(episode.proprio, episode.actions), chunk, horizon)
        episodes = [episode for episode in in_memory(run.exploration[1]) if len(steps(episode))]
        if not episodes:
            raise WorldEnvError("held things: in no held-out episode does the hand carry anything")
        replayed = replay_open_loop(run.models, run.params("simulator"), episodes)
    finally:
        run.close()
    imagined = np.concatenate([replayed.context[:, None], replayed.imagined], axis=1)
    chosen = [steps(episode) for episode in episodes]
    rows = []
    for view in range(config.simulator.views):
        gallery = build_gallery(training, view)
        for source in ("true", "imagined", "first frame"):
            right, when = [], []
            for row, (episode, own) in enumerate(zip(episodes, chosen)):
                frames = {"true": episode.images, "imagined": imagined[row]}.get(source)
                frames = np.repeat(episode.images[:1], 1 + horizon, axis=0) if frames is None else frames
                named = recognise(gallery, squares_at_hand(episode, frames, own, view))
                right += list(named == episode.task)
                when += list(own)
            early = np.array(when) <= SHORT
            rows.append(
                {
                    "camera": view,
                    "pictures": source,
                    "recognised": float(np.mean(right)),
                    "number": len(right),
                    f"recognised_to_{SHORT}": float(np.mean(np.array(right)[early])) if early.any() else None,
                    f"number_to_{SHORT}": int(early.sum()),
                }
            )
    print(align_columns([[str(value) for value in row.values()] for row in rows], header=tuple(rows[0])))
    print(json.dumps({"episodes": len(episodes), "rows": rows}))
    if arguments.sheet:
        frames = [[np.asarray(e.images), imagined[i]] for i, e in enumerate(episodes)]
        at = [own[np.abs(own - NEAR).argmin()] for own in chosen]
        save_image(arguments.sheet, draw_sheet([[x[t] for x in pair] for pair, t in zip(frames, at)]))


def _shown(steps: np.ndarray, chunk: int, horizon: int) -> np.ndarray:
    """Those that end a chunk, of which every simulator generates a frame, within the horizon."""
    return steps[(steps % chunk == 0) & (steps <= horizon)]


def draw_sheet(pairs: list[list[np.ndarray]]) -> np.ndarray:
    """True above imagined frames [V, H, W, 3], all cameras side by side, twice as large."""
    tiles = [np.concatenate([merge_views(np.asarray(frame)[None])[0] for frame in pair]) for pair in pairs]
    tiles = [np.pad(tile, ((0, 8), (0, 8), (0, 0)), constant_values=255) for tile in tiles]
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % COLUMNS)
    rows = [np.concatenate(tiles[i : i + COLUMNS], axis=1) for i in range(0, len(tiles), COLUMNS)]
    sheet = Image.fromarray(np.concatenate(rows))
    return np.asarray(sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST))


if __name__ == "__main__":
    run_main(main)
