# SPDX-License-Identifier: Apache-2.0
"""Quality and time of the simulator over the number of denoising steps, on a finished run's held-out episodes.

    python tools/sampling_cost.py --config=tabletop --workdir=runs/quickstart --episodes=8
    python tools/sampling_cost.py --config=libero_cpu --workdir=runs/libero_cpu --episodes=50 --chunks=8 --steps 1

Episodes are replayed open loop from their first frames over the rollout's horizon, or --chunks. Prints a table and one
JSON line; 0 steps is the first frame repeated.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from worldenv_jax.configs import get_config  # noqa: E402
from worldenv_jax.errors import run_main  # noqa: E402
from worldenv_jax.evaluation.summary import align_columns  # noqa: E402
from worldenv_jax.overrides import apply_overrides  # noqa: E402
from worldenv_jax.training.pipeline import Run, in_memory  # noqa: E402
from worldenv_jax.training.sampling_cost import STEPS, sampling_cost  # noqa: E402

HEADER = ("steps", "PSNR, dB", "success", "failure", "seconds", "frames/s", "trained for")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="tabletop")
    parser.add_argument("--set", action="append", default=[], help="override, as in the experiments")
    parser.add_argument("--workdir", required=True, help="a run with a trained simulator")
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--chunks", type=int, help="T; by default the rollout's")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    arguments = parser.parse_args()
    run = Run(apply_overrides(get_config(arguments.config), arguments.set), arguments.workdir)
    try:
        params, episodes, models = run.params("simulator"), run.exploration[1], run.models
        chosen = in_memory(episodes[:: max(1, len(episodes) // arguments.episodes)][: arguments.episodes])
        rollout = replace(models.config.rollout, num_chunks=arguments.chunks or models.config.rollout.num_chunks)
        models = replace(models, config=replace(models.config, rollout=rollout))
        rows = sampling_cost(models, params, chosen, arguments.steps)
    finally:
        run.close()
    number = lambda value: "-" if value is None else f"{value:.2f}"
    cells = [
        (
            str(row["steps"]),
            *(number(row[name]) for name in ("psnr", "psnr_success", "psnr_failure", "seconds", "frames_per_second")),
            "yes" if row["trained"] else "no",
        )
        for row in rows
    ]
    print(align_columns(cells, header=HEADER))
    print(json.dumps({"episodes": len(chosen), "rows": rows}))


if __name__ == "__main__":
    run_main(main)
