# SPDX-License-Identifier: Apache-2.0
"""Measures a policy in the true world on test starts: success with interval, per task, and the protocol's hash.

python experiments/evaluate.py --config=tabletop --workdir=runs/tabletop --policy=after
"""

from common import FLAGS, POLICIES, config_from_flags, run_script, workdir_from_flags

from worldenv_jax.evaluation.summary import align_columns, rate_text
from worldenv_jax.training import evaluating, pipeline


def main() -> None:
    """Runs the episodes that have no result yet and prints the table."""
    run = pipeline.Run(config_from_flags(), workdir_from_flags())
    try:
        pipeline.start(run)
        params = run.params(POLICIES[FLAGS.policy])
        result = evaluating.evaluate_policy(run.config, run.workdir, run.environment, run.models, params, FLAGS.policy)
        rows = [(name, rate_text(rate)) for name, rate in zip(run.environment.instructions, result["per_task"])]
        rows.append(("all tasks", rate_text(result["success"])))
        print(align_columns(rows, header=("task", "success, 95 % interval")))
        print(
            f"{result['success']['episodes']} episodes, {result['starts']} starts, protocol {result['protocol_hash']}"
        )
    finally:
        run.close()


if __name__ == "__main__":
    run_script(main)
