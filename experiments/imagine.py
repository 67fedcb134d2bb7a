# SPDX-License-Identifier: Apache-2.0
"""Imagines trajectories of a policy and saves them: a video each, and an RLDS folder that every loader here can open.

python experiments/imagine.py --config=tabletop --workdir=runs/tabletop --policy=before --count=8
"""

from absl import flags
from common import FLAGS, config_from_flags, policies_from_flags, run_script, workdir_from_flags

from worldenv_jax.errors import WorldEnvError
from worldenv_jax.training import imagination, pipeline

flags.DEFINE_integer("count", 8, "Trajectories, from first frames of held-out episodes.", lower_bound=1)


def main() -> None:
    """One rollout of the whole batch."""
    policy, *more = policies_from_flags()
    if more:
        raise WorldEnvError(f"--policy={','.join(FLAGS.policy)}: one policy imagines at a time")
    run = pipeline.Run(config_from_flags(), workdir_from_flags())
    try:
        models, world, params = run.models, run.world, run.params(pipeline.POLICIES[policy])
        episodes = run.test_episodes[: FLAGS.count]
        models.starts(episodes)  # refuses what cannot be imagined from, before anything is written
        pipeline.start(run)
        folder = imagination.save_imagined(models.config, run.workdir, models, world, params, episodes)
        print(f"{len(episodes)} imagined trajectories: {folder}, videos in {run.workdir / 'pictures'}")
    finally:
        run.close()


if __name__ == "__main__":
    run_script(main)
