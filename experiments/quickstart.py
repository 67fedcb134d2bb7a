# SPDX-License-Identifier: Apache-2.0
"""The whole loop: from demonstrations to a policy that is better in the true world, and a report of it.

    python experiments/quickstart.py                      shipped models; gate, post-training, evaluations run live
    python experiments/quickstart.py --from_scratch       every stage, demonstrations and training included
    python experiments/quickstart.py --seeds=3 --variants=full,binary_judge      a table over seeds and ablations

Where the gate refuses, the command ends with its figures; in a table over runs the cloned policy is the result. Stop
it at any time: the same command goes on where it was.
"""

from pathlib import Path

import jax
from absl import flags
from common import FLAGS, config_from_flags, run_script
from several_runs import each_run

from worldenv_jax import files
from worldenv_jax.configs import ExperimentConfig
from worldenv_jax.evaluation.gate import GateRefused
from worldenv_jax.evaluation.summary import aggregate, aggregate_table, paired_text
from worldenv_jax.overrides import diff_configs, to_dict
from worldenv_jax.training import pipeline
from worldenv_jax.training.evaluating import compare

flags.DEFINE_bool("from_scratch", False, "Train everything instead of using the shipped models.")


def run_once(config: ExperimentConfig, folder: Path) -> dict:
    """One seed of one variant, from wherever it was; returns its summary.

    Raises:
      GateRefused: the gate did, and `--ignore_gate` is off.
    """
    run = pipeline.Run(config, folder)
    try:
        pipeline.start(run)
        if FLAGS.from_scratch:
            names = pipeline.stages_of(run.config)
        else:
            names = pipeline.stages_after_pretrained(run)
        for name in names:
            result = pipeline.STAGES[name](run)
            jax.clear_caches()  # no stage needs the programs of another in memory
            if name == "gate" and not FLAGS.ignore_gate:
                result.check()
        return files.read_json(folder / "summary.json")
    finally:
        run.close()


def summary_of(config: ExperimentConfig, folder: Path) -> dict:
    """What `run_once` leaves, or found left; where the gate refuses, the cloned policy as it was."""
    finished = finished_summary(config, folder)
    if finished is not None:
        return finished
    try:
        return run_once(config, folder)
    except GateRefused as refusal:
        print(f"{folder}: {refusal}", flush=True)
    run = pipeline.Run(config, folder)
    try:
        before = pipeline.evaluate(run, "before")
    finally:
        run.close()
    rates = {"success_before": before["success"], "success_after": before["success"]}
    names = {"variant": config.variant, "seed": config.seed, "protocol_hash": before["protocol_hash"]}
    return {**names, **rates, "refused": True}


def finished_summary(config: ExperimentConfig, folder: Path) -> dict | None:
    """What a finished run of this config has left in the folder, or None."""
    if not (folder / "summary.json").exists():
        return None
    summary = files.read_json(folder / "summary.json")
    return summary if not diff_configs(summary["config"], to_dict(config)) else None


def against_full(root: Path) -> list[str]:
    """A line per ablated run: its last policy beside that of the full loop of the same seed, on the same episodes."""
    lines = []
    for variant in FLAGS.variants:
        for seed in range(FLAGS.seeds):
            full, own = (root / f"{name}_seed{seed}" / "evaluation" / "after.json" for name in ("full", variant))
            if variant != "full" and full.exists() and own.exists():
                comparison = compare(files.read_json(full), files.read_json(own))
                lines.append(f"{variant} against full, seed {seed}: {paired_text(comparison)}")
    return lines


def main() -> None:
    """Every seed of every variant; with more than one run, a table over all and the ablations beside the full loop."""
    root = Path(FLAGS.workdir or "runs/quickstart")
    if FLAGS.seeds == 1 and FLAGS.variants == ["full"]:
        run_once(config_from_flags(), root)
        return
    runs = [(root / name, config) for name, config in each_run(config_from_flags())]
    rows = aggregate([summary_of(config, folder) for folder, config in runs])
    files.write_json(root / "aggregate.json", rows)
    print(aggregate_table(rows), *against_full(root), sep="\n")


if __name__ == "__main__":
    run_script(main)
