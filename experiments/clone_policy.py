# SPDX-License-Identifier: Apache-2.0
"""Clones a policy from the demonstrations (L1), then trains its Laplace scale head (negative log-likelihood).

python experiments/clone_policy.py --workdir=runs/tabletop        (after collect.py --what=demonstrations)
"""

from common import run_script, run_stages


def main() -> None:
    """Runs the stage from its last checkpoint."""
    run_stages("clone_policy")


if __name__ == "__main__":
    run_script(main)
