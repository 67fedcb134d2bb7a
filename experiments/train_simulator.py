# SPDX-License-Identifier: Apache-2.0
"""Fits the video-diffusion simulator to demonstrations and exploration: autoencoder, arm, first pictures, denoiser.

python experiments/train_simulator.py --workdir=runs/tabletop        (after collect.py --what=exploration)

What exploration is for, on the tabletop, in dB of PSNR above copy-last-frame over 24 frames of held-out episodes (the
second row with --set=collect.train_on_exploration=false):

    trained on                        successes  failures
    demonstrations and exploration       6.6        5.0
    demonstrations only                  5.0        2.6

In LIBERO (libero_cpu with --set=simulator.frame_stride=1 --set=collect.tries_per_start=1, an arm that predicted the
fingers' opening alone, libero_object, 50 held-out episodes) whether imagination knows which grasps hold (AUROC of the
imagined opening of the fingers), how far each finger is off after 64 steps, and the PSNR of failures, in dB, at steps
1 to 64 and 65 to 128; the README has intervals:

    trained on                        grasps  fingers  1 to 64  65 to 128
    demonstrations and exploration     0.77    7 mm     22.8      20.3
    demonstrations only                0.47   14 mm     22.7      18.9
"""

from common import run_script, run_stages


def main() -> None:
    """Runs the stage from its last checkpoint."""
    run_stages("train_simulator")


if __name__ == "__main__":
    run_script(main)
