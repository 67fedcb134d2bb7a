# SPDX-License-Identifier: Apache-2.0
"""Replays recorded episodes open loop in the true world: do the same actions from the same start do the same?

    python experiments/replay.py --config=libero_small --recordings=demonstrations

An episode agrees when it succeeds as its recording did, at the same step. Actions, gripper, rotations, starts and their
order of time have passed through the data folder and back, so a mistake in any of these conventions shows here. Exit
code 1 below 98 %.
"""

from absl import flags
from common import FLAGS, config_from_flags, run_script, workdir_from_flags

from worldenv_jax.envs.protocol import wilson_interval
from worldenv_jax.training import evaluating, pipeline

flags.DEFINE_enum("recordings", "demonstrations", ["demonstrations", "exploration"], "Which recordings.")
REQUIRED = 0.98


def main() -> int:
    """One line per episode that does not agree, then the rate; exit code 1 where it is below `REQUIRED`."""
    run = pipeline.Run(config_from_flags(), workdir_from_flags())
    try:
        episodes, same = list(run.workdir.episodes(FLAGS.recordings)), 0
        for episode, outcome in evaluating.replay_outcomes(run.environment, episodes):
            step = outcome.steps if outcome.success and outcome.steps <= episode.num_steps else None
            same += not outcome.error and step == episode.first_success
            if outcome.error or step != episode.first_success:
                words = outcome.error or _words(step)
                print(f"task {episode.task}, start {episode.seed}: {_words(episode.first_success)}, replayed: {words}")
        low, high = wilson_interval(same, len(episodes))
        print(
            f"{same} of {len(episodes)} recorded {FLAGS.recordings} replay to their recorded success at the same step: "
            f"{same / len(episodes):.1%} [{low:.1%}, {high:.1%}]"
        )
        return int(same < REQUIRED * len(episodes))
    finally:
        run.close()


def _words(step: int | None) -> str:
    return "failure" if step is None else f"success after {step} steps"


if __name__ == "__main__":
    run_script(main)
