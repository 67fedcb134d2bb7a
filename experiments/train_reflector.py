# SPDX-License-Identifier: Apache-2.0
"""Fits the reflector: is the task done at this frame? On true frames and on the simulator's replays of them.

python experiments/train_reflector.py --config=tabletop --workdir=runs/tabletop          (after train_simulator.py)
"""

from common import run_script, run_stages


def main() -> None:
    """Runs the stage from its last checkpoint."""
    run_stages("train_reflector")


if __name__ == "__main__":
    run_script(main)
