# SPDX-License-Identifier: Apache-2.0
"""The figures of a run's reflector on held-out episodes, beside the bare vision-language model's and a clock's.

    python tools/judge_quality.py --config=libero_cpu --workdir=runs/libero_cpu

Prints a table and one JSON line. Plots over thresholds and of the calibration are in the run's report.html.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from worldenv_jax.configs import get_config  # noqa: E402
from worldenv_jax.errors import run_main  # noqa: E402
from worldenv_jax.evaluation.summary import align_columns  # noqa: E402
from worldenv_jax.mesh import use_every_core  # noqa: E402
from worldenv_jax.overrides import apply_overrides  # noqa: E402
from worldenv_jax.training.judge_quality import judge_quality  # noqa: E402
from worldenv_jax.training.pipeline import Run, in_memory  # noqa: E402

FIGURES = {
    "threshold": "η",
    "auroc": "AUROC",
    "average_precision": "precision",
    "false_positive_rate": "false positives",
    "false_negative_rate": "false negatives",
    "calibration_error": "calibration",
    "episode_auroc": "of episodes",
    "delay": "delay, frames",
    "detected": "detected",
    "premature": "premature",
    "false_alarms": "false alarms",
}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="tabletop")
    parser.add_argument("--set", action="append", default=[], help="override, as in the experiments")
    parser.add_argument("--workdir", required=True, help="a run with a trained simulator and reflector")
    arguments = parser.parse_args()
    config = apply_overrides(get_config(arguments.config), arguments.set)
    if config.mesh.data == 0:
        use_every_core()
    run = Run(config, arguments.workdir)
    try:
        params = run.params("simulator"), run.params("reflector")
        known = run.demonstrations + run.exploration[0]
        rows = judge_quality(run.models, *params, in_memory(run.test_episodes), known)
    finally:
        run.close()
    cells = [(row["judge"], row["frames_of"], *(f"{row[name]:.3g}" for name in FIGURES)) for row in rows]
    print(align_columns(cells, header=("judge", "frames", *FIGURES.values())))
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    run_main(main)
