# SPDX-License-Identifier: Apache-2.0
"""Clones a policy from the demonstrations (L1), then trains its Laplace scale head (negative log-likelihood).

    python experiments/clone_policy.py --workdir=runs/tabletop        (after collect.py --what=demonstrations)
    python experiments/clone_policy.py --config=libero_cpu --workdir=runs/libero_cpu

The second line, on five demonstrations per task of libero_object (seed 0, 1.4 M parameters, 50 minutes on four shared
cores), gave 57.0 % [47.2, 66.3] success on the official test starts and 26.0 % [18.4, 35.4] on shifted ones, 100
episodes each (`evaluate.py --policy=before --starts=official,shifted`, protocol db8f1d3ad126). With
`pretrained.policy` it starts from a published OpenVLA-OFT checkpoint instead (`training/pretrained.py`).
"""

from common import run_script, run_stages


def main() -> None:
    """Runs the stage from its last checkpoint."""
    run_stages("clone_policy")


if __name__ == "__main__":
    run_script(main)
