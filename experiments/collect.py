# SPDX-License-Identifier: Apache-2.0
"""Collects episodes in the true world: expert demonstrations, or the cloned policy's own successes and failures.

python experiments/collect.py --what=demonstrations
python experiments/collect.py --what=exploration          (after clone_policy.py)
"""

from absl import flags
from common import FLAGS, run_script, run_stages

flags.DEFINE_enum("what", "demonstrations", ["demonstrations", "exploration"], "Who acts: the expert, or the policy.")


def main() -> None:
    """Runs the stage; a stopped collection goes on where it was."""
    run_stages(f"collect_{FLAGS.what}")


if __name__ == "__main__":
    run_script(main)
