# SPDX-License-Identifier: Apache-2.0
"""Post-trains the policy in imagination with LOOP-PPO, once the gate has let the learned world pass.

    python experiments/post_train.py --config=tabletop --workdir=runs/tabletop          (after train_reflector.py)

The gate measures simulator and reflector on held-out episodes first. Where they are not good enough to teach, the
script refuses with the figures; --ignore_gate goes on nevertheless.
"""

from absl import flags
from common import FLAGS, config_from_flags, run_script, workdir_from_flags

from worldenv_jax.training import pipeline

flags.DEFINE_enum("world", "learned", ["learned", "true"], "true: the upper bound, RL in the true world itself.")


def main() -> None:
    """Gate, then iterations from the last checkpoint."""
    run = pipeline.Run(config_from_flags(), workdir_from_flags())
    try:
        pipeline.start(run)
        if FLAGS.world == "true":
            pipeline.post_train_true(run)
            return
        result = pipeline.gate(run)
        if not FLAGS.ignore_gate:
            result.check()
        pipeline.post_train(run)
    finally:
        run.close()


if __name__ == "__main__":
    run_script(main)
