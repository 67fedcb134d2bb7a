# SPDX-License-Identifier: Apache-2.0
"""Clones a policy from the demonstrations (L1), then trains its Laplace scale head (negative log-likelihood).

    python experiments/clone_policy.py --workdir=runs/tabletop        (after collect.py --what=demonstrations)
    python experiments/clone_policy.py --config=libero_cpu --workdir=runs/libero_cpu

The second line, on five demonstrations per task of libero_object (seed 0, 1.6 M parameters, 17 minutes on four shared
cores), gave 82.0 % [73.3, 88.3] success on the official test starts and 45.0 % [35.6, 54.8] on shifted ones, 100
episodes each (`evaluate.py --policy=before --starts=official,shifted`, protocol db8f1d3ad126; twenty visual files of
our LIBERO assets are stand-ins). With `pretrained.policy` it starts from a published OpenVLA-OFT checkpoint instead
(`training/pretrained.py`).
"""

from common import run_script, run_stages


def main() -> None:
    """Runs the stage from its last checkpoint."""
    run_stages("clone_policy")


if __name__ == "__main__":
    run_script(main)
