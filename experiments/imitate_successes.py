# SPDX-License-Identifier: Apache-2.0
"""Clones a policy anew from the demonstrations and its own successes in exploration (self-imitation).

    python experiments/imitate_successes.py --workdir=runs/mine        (after collect.py --what=exploration)
    python experiments/evaluate.py --workdir=runs/mine --policy=self_imitated,before

Not part of World-Env: it takes no step in the true world beyond the exploration that the simulator learns from, so it
is what post-training in imagination has to beat. `--set=post_training.start_from=self_imitated`, for all commands of a
run, lets post-training go on from it. Figures: README, Results so far and Real LIBERO.
"""

from common import run_script, run_stages


def main() -> None:
    """Runs the stage from its last checkpoint."""
    run_stages("imitate_successes")


if __name__ == "__main__":
    run_script(main)
