# SPDX-License-Identifier: Apache-2.0
"""The claim, measured: a policy cloned from a few demonstrations gets better without a step in the real environment.

    python experiments/claim.py --config=libero_cpu --suite=libero_object --demos=5 --seeds=3 --workdir=runs/claim

Every seed: demonstrations, cloning, exploration (`collect.exploration_per_task` episodes), simulator, reflector, gate,
post-training in imagination; with --upper_bound also the same number of updates in the true simulator; where
post-training starts from self-imitation, that too. The policies are evaluated on the same test starts of every kind
that the world has. Where the gate refuses, the policy that post-training would have started from is kept and counted as
the result. Stop it at any time: the same command goes on where it was.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from absl import flags
from common import FLAGS, config_from_flags, run_script
from several_runs import each_run

from worldenv_jax import files
from worldenv_jax.configs import ExperimentConfig
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.evaluation.summary import aggregate, aggregate_table, paired_text
from worldenv_jax.training import pipeline
from worldenv_jax.training.evaluating import compare

flags.DEFINE_string("suite", None, "LIBERO suite; by default the config's.")
flags.DEFINE_integer("demos", None, "Demonstrations per task; by default the config's.", lower_bound=1)
flags.DEFINE_bool("upper_bound", True, "Post-train in the true simulator, too (variant full).")

LEARNED_WORLD = (
    "collect_demonstrations",
    "clone_policy",
    "collect_exploration",
    "collect_starts",
    "imitate_successes",
    "train_simulator",
    "train_reflector",
)
RESULTS = {
    "self_imitated": "imitating its own successes",
    "after": "in imagination",
    "after_true": "in the true world",
}


def configured() -> ExperimentConfig:
    """The preset with the flags' suite and demonstrations."""
    config = config_from_flags()
    if FLAGS.suite:
        if config.environment.name != "libero":
            raise WorldEnvError(f"--suite is LIBERO's, the world is {config.environment.name}: choose another --config")
        config = replace(config, environment=replace(config.environment, suite=FLAGS.suite))
    if FLAGS.demos:
        config = replace(config, collect=replace(config.collect, demonstrations_per_task=FLAGS.demos))
    return config


def run_once(config: ExperimentConfig, folder: Path) -> dict[str, Any]:
    """One seed of one variant, from wherever it was.

    Returns {"gate_passed", "results": {kind of starts: {policy: result of `pipeline.evaluate`}}}.
    """
    run = pipeline.Run(config, folder)
    try:
        pipeline.start(run)
        stages = [name for name in pipeline.stages_of(config) if name in LEARNED_WORLD]
        for name in stages:
            pipeline.STAGES[name](run)
            jax.clear_caches()  # no stage needs the programs of another in memory
        passed = pipeline.gate(run).passed or FLAGS.ignore_gate
        policies = ["before"]
        if config.post_training.start_from == "self_imitated":
            policies.append("self_imitated")
        if passed:
            pipeline.post_train(run)
            pipeline.measure_agreement(run)
            policies.append("after")
        if FLAGS.upper_bound and config.variant == "full":
            pipeline.post_train_true(run)
            policies.append("after_true")
        kinds = run.environment.protocol["start_kinds"]
        results = {kind: {policy: pipeline.evaluate(run, policy, kind) for policy in policies} for kind in kinds}
        if passed:
            pipeline.report(run)
        for row in results.values():
            row.setdefault("after", row["self_imitated" if "self_imitated" in row else "before"])
        return {"gate_passed": passed, "results": results}
    finally:
        run.close()


def rows_of(config: ExperimentConfig, outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """One summary for `aggregate` per kind of starts and result."""
    return [
        {
            "variant": f"{config.variant}, {RESULTS[policy]}, {kind} starts",
            "seed": config.seed,
            "success_before": row["before"]["success"],
            "success_after": row[policy]["success"],
            "protocol_hash": row["before"]["protocol_hash"],
            "refused": policy == "after" and not outcome["gate_passed"],
        }
        for policy in RESULTS
        for kind, row in outcome["results"].items()
        if policy in row
    ]


def main() -> None:
    """All runs, what each changed on the same starts, and the table over seeds; claim.json has everything."""
    root, runs, rows = Path(FLAGS.workdir or "runs/claim"), [], []
    for name, config in each_run(configured()):
        outcome = run_once(config, root / name)
        rows += rows_of(config, outcome)
        paired = {
            f"{RESULTS[policy]}, {kind} starts": compare(row["before"], row[policy])
            for kind, row in outcome["results"].items()
            for policy in RESULTS
            if policy in row
        }
        for what, comparison in paired.items():
            print(f"{name}, {what}: {paired_text(comparison)}")
        runs.append({"run": name, "gate_passed": outcome["gate_passed"], "paired": paired})
    table = aggregate(rows)
    files.write_json(root / "claim.json", {"runs": runs, "table": table})
    print(aggregate_table(table))


if __name__ == "__main__":
    run_script(main)
