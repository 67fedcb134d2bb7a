# SPDX-License-Identifier: Apache-2.0
"""Measures policies in the true world on test starts: success with interval, per task, and the protocol's hash.

    python experiments/evaluate.py --config=tabletop --workdir=runs/tabletop --policy=after
    python experiments/evaluate.py --config=libero_debug --policy=after,before,replay,expert --starts=official,shifted

Beside a policy stand, on the same starts, other policies, `replay` (one demonstration per task repeated blindly) and
`expert` (the scripted one); the first is compared with each of the others episode by episode. Episodes that could not
be run are errors, neither successes nor failures; where a whole task could not be run the exit code is 1.

--termination says who ends an episode: the true predicate (as usual), nobody before the step limit, or the reflector
(the success that counts is then the true predicate at the step where R > eta).
"""

from absl import flags
from common import FLAGS, config_from_flags, policies_from_flags, run_script, workdir_from_flags

from worldenv_jax.evaluation.summary import align_columns, paired_text, rate_text
from worldenv_jax.training import evaluating, pipeline

flags.DEFINE_list("starts", [], "official, shifted or both; by default those of the config.")
flags.DEFINE_enum("termination", "predicate", list(evaluating.TERMINATIONS), "Who ends an episode.")


def main() -> int:
    """Runs what has no result yet, prints one table per kind of starts; exit code 1 where a task has no result."""
    policies = policies_from_flags(*pipeline.REFERENCES)
    run = pipeline.Run(config_from_flags(), workdir_from_flags())
    try:
        pipeline.start(run)
        tables = []
        for starts in FLAGS.starts or [run.config.environment.starts]:
            tables.append({name: pipeline.evaluate(run, name, starts, FLAGS.termination) for name in policies})
            print_table(run.environment.instructions, tables[-1])
        if run.environment.restarts:
            print(f"{run.environment.restarts} worker processes died; their episodes were repeated")
        return int(any(not rate["episodes"] for table in tables for r in table.values() for rate in r["per_task"]))
    finally:
        run.close()


def print_table(instructions: tuple[str, ...], results: dict[str, dict]) -> None:
    """One row per task, one column per policy; errors and paired differences below."""
    (first, result), *others = results.items()
    rows = [
        (instructions[task], *(rate_text(r["per_task"][task]) for r in results.values()))
        for task in range(len(result["per_task"]))
    ]
    rows.append(("all tasks", *(rate_text(r["success"]) for r in results.values())))
    print(align_columns(rows, header=("task; success, 95 % interval", *results)))
    for name, measured in results.items():
        for task, rate in enumerate(measured["per_task"]):
            if rate["errors"]:
                texts = [row["error"] for row in measured["episodes"] if row["task"] == task and row["error"]]
                count = f"{rate['errors']} of {rate['errors'] + rate['episodes']}"
                last = texts[0].strip().splitlines()[-1]
                print(f"{name}, {instructions[task]!r}: {count} episodes could not be run, the first: {last}")
    for name, measured in others:
        print(f"{first} against {name}: {paired_text(evaluating.compare(measured, result))}")
    ended = f"{result['starts']} starts, ended by {result['termination']}, protocol {result['protocol_hash']}"
    print(f"{len(result['episodes'])} episodes each, {ended}")


if __name__ == "__main__":
    run_script(main)
