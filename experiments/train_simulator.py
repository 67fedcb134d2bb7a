# SPDX-License-Identifier: Apache-2.0
"""Fits the video-diffusion simulator to demonstrations and exploration: autoencoder, then denoiser.

python experiments/train_simulator.py --workdir=runs/tabletop        (after collect.py --what=exploration)
"""

from common import run_script, run_stages


def main() -> None:
    """Runs the stage from its last checkpoint."""
    run_stages("train_simulator")


if __name__ == "__main__":
    run_script(main)
