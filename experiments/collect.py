# SPDX-License-Identifier: Apache-2.0
"""Collects episodes in the true world: expert demonstrations, the cloned policy's own, or mere starts.

    python experiments/collect.py --what=demonstrations
    python experiments/collect.py --what=exploration          (after clone_policy.py)
    python experiments/collect.py --what=starts               (first frames only, where collect.starts_per_task is set)
    python experiments/collect.py --config=libero_small --suites=libero_object,libero_spatial,libero_goal,libero_10

With --suites each suite has a workdir of its own, WORKDIR/<suite>, and a table says what is in them.
"""

from dataclasses import replace

import numpy as np
from absl import flags
from common import FLAGS, config_from_flags, run_script, run_stages, workdir_from_flags

from worldenv_jax.errors import WorldEnvError
from worldenv_jax.evaluation.summary import align_columns
from worldenv_jax.training import pipeline

WHAT = {
    "demonstrations": "the expert acts",
    "exploration": "the policy acts",
    "starts": "nobody acts, only first frames are taken",
}
flags.DEFINE_enum("what", "demonstrations", list(WHAT), "; ".join(f"{name}: {text}" for name, text in WHAT.items()))
flags.DEFINE_list("suites", [], "LIBERO suites, one after the other; by default the one of the config.")


def main() -> None:
    """Runs the stage; a stopped collection goes on where it was."""
    if not FLAGS.suites:
        run_stages(f"collect_{FLAGS.what}")
        return
    rows, config = [], config_from_flags()
    if (name := config.environment.name) != "libero":
        raise WorldEnvError(f"--suites are LIBERO's, the world is {name}: choose another --config")
    for suite in FLAGS.suites:
        config = replace(config, environment=replace(config.environment, suite=suite))
        run = pipeline.Run(config, workdir_from_flags() / suite)
        try:
            pipeline.start(run)
            pipeline.STAGES[f"collect_{FLAGS.what}"](run)
            rows.append((suite, *describe(run)))
        finally:
            run.close()
    print(align_columns(rows, header=("suite", FLAGS.what, "successful", "tasks", "mean steps", "seconds", "MB")))


def describe(run: pipeline.Run) -> tuple[str, ...]:
    """The cells of a suite's row."""
    episodes = run.workdir.episodes(FLAGS.what)
    data = (run.workdir / "data" / FLAGS.what).rglob("*")
    size = sum(path.stat().st_size for path in data if path.is_file())
    return (
        str(len(episodes)),
        str(sum(episode.succeeded for episode in episodes)),
        str(len({episode.task for episode in episodes})),
        f"{np.mean([episode.num_steps for episode in episodes]):.0f}",
        f"{run.workdir.seconds[f'collect_{FLAGS.what}']:.0f}",
        f"{size / 1e6:.0f}",
    )


if __name__ == "__main__":
    run_script(main)
