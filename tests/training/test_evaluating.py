# SPDX-License-Identifier: Apache-2.0
"""Who ends an episode: in a world where the task is done from sum = goal to goal + 2 and then no more."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.envs.test_runner import CountingWorld, K, one_each_step
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.training import evaluating
from worldenv_jax.types import EpisodeSpec

SPECS = [EpisodeSpec(task, seed) for seed in range(3) for task in (1, 4, 6, 7)]  # 7 is never done


def act(*arguments):
    return np.clip(one_each_step(*arguments), -1, 1)


def models(max_frames=64, threshold=0.5):
    return SimpleNamespace(
        config=SimpleNamespace(
            reflector=SimpleNamespace(max_frames=max_frames),
            policy=SimpleNamespace(chunk=K),
            rollout=SimpleNamespace(threshold=threshold),
        )
    )


def play(termination, **settings):
    player = evaluating.termination_player(CountingWorld(5), act, termination, models(**settings), None)
    outcomes = dict(player(SPECS))
    return [(outcomes[i].success, outcomes[i].steps) for i in range(len(SPECS))]


def test_at_the_limit_the_last_state_counts():
    # The sum after step n is n; the limit is 10, where no task 1, 4 or 6 is done any more (6 ends at 8).
    assert play("limit") == [(False, 10)] * len(SPECS)


@pytest.mark.parametrize("spoken_at", [3, 6, 10, 11])
def test_the_reflector_stops_at_the_first_frame_above_the_threshold(monkeypatch, spoken_at):
    def make_judge(models, batch):
        def judge(params, episodes, steps):
            shown = np.stack([episode.images[1:, 0, 0, 0, 0] for episode in episodes])  # the sum
            padded = np.pad(shown, ((0, 0), (0, -shown.shape[1] % K)), constant_values=99)  # void: past the limit
            return (padded >= spoken_at) * 0.6, None

        return judge

    monkeypatch.setattr(evaluating, "make_judge", make_judge)
    stop = min(spoken_at, 10)
    expected = {task: (task <= stop < task + 3, stop) for task in (1, 4, 6)} | {7: (False, stop)}
    assert play("reflector") == [expected[spec.task] for spec in SPECS]


def test_a_reflector_that_cannot_read_a_whole_episode_is_refused():
    with pytest.raises(WorldEnvError, match="10 steps, the reflector can read 8"):
        play("reflector", max_frames=12)


def result(successes, rules="a", starts="shifted"):
    rows = [{"task": 0, "seed": seed, "success": success} for seed, success in enumerate(successes)]
    return {"protocol_hash": rules, "starts": starts, "episodes": rows}


def test_only_episodes_that_both_completed_are_compared():
    before, after = result([True, None, False, False]), result([False, True, True, None])
    paired = evaluating.compare(before, after)
    assert (paired["gained"], paired["lost"], paired["same"]) == (1, 1, 0)


@pytest.mark.parametrize(
    "other", [result([True] * 2, rules="b"), result([True] * 2, starts="official"), result([True])]
)
def test_results_of_other_episodes_are_not_compared(other):
    with pytest.raises(WorldEnvError, match="cannot be compared"):
        evaluating.compare(result([True] * 2), other)


def test_nothing_to_compare_is_said():
    with pytest.raises(WorldEnvError, match="nothing to compare"):
        evaluating.compare(result([None]), result([True]))
