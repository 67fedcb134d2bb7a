# SPDX-License-Identifier: Apache-2.0
"""Fits the video-diffusion simulator to demonstrations and exploration: autoencoder, arm, first pictures, denoiser.

python experiments/train_simulator.py --workdir=runs/tabletop        (after collect.py --what=exploration)

What exploration is for, on the tabletop, in dB of PSNR above copy-last-frame over 24 frames of held-out episodes (the
second row with --set=collect.train_on_exploration=false):

    trained on                        successes  failures
    demonstrations and exploration       6.6        5.0
    demonstrations only                  5.0        2.6

In LIBERO (libero_cpu, libero_object, 50 held-out episodes; an earlier recipe) it was worth nothing over 64 frames; see
the README:

    demonstrations and exploration       5.7        5.7
    demonstrations only                  6.0        5.8
"""

from common import run_script, run_stages


def main() -> None:
    """Runs the stage from its last checkpoint."""
    run_stages("train_simulator")


if __name__ == "__main__":
    run_script(main)
