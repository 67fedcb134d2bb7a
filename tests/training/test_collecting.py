# SPDX-License-Identifier: Apache-2.0
"""Which episodes exploration consists of, and which of them are held out; starts without episodes."""

from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from worldenv_jax.configs import get_config
from worldenv_jax.data.episodes import Episode
from worldenv_jax.policy import init_policy
from worldenv_jax.training import collecting, pipeline
from worldenv_jax.training.acting import LET_GO
from worldenv_jax.training.collecting import (
    EXPLORATION_SEED,
    exploration_specs,
    retried_specs,
    split_exploration,
    training_specs,
)
from worldenv_jax.training.pipeline import one_per_start

LIBERO = get_config("libero_cpu")  # 20 episodes per task, a quarter of them held out


def _episodes(specs):
    nothing = np.zeros(0)
    return [
        Episode(*[nothing] * 6, "", spec.task, spec.seed, spec.split, spec.starts, "policy", sample=spec.sample)
        for spec in specs
    ]


@pytest.mark.parametrize(("tries", "starts"), [(1, 15), (3, 5), (5, 3), (4, 4)])
def test_only_training_exploration_shares_starts(tries, starts):
    config = replace(LIBERO, collect=replace(LIBERO.collect, tries_per_start=tries))
    specs = exploration_specs(config)
    assert len(set(specs)) == len(specs) == 200
    training, held_out = split_exploration(_episodes(specs), config.collect.held_out_fraction)
    assert Counter(e.task for e in training) == dict.fromkeys(range(10), 15)
    assert [(e.task, e.seed, e.sample) for e in held_out] == [
        (task, EXPLORATION_SEED + number, 0) for task in range(10) for number in range(15, 20)
    ]
    chosen = one_per_start(training)
    assert Counter(e.task for e in chosen) == dict.fromkeys(range(10), starts)
    assert not {(e.task, e.seed) for e in training} & {(e.task, e.seed) for e in held_out}
    assert {e.sample for e in chosen} == {0}
    if tries == 1:
        assert [e.spec for e in chosen] == [e.spec for e in training]


def test_a_start_is_never_on_both_sides():
    """Two held-out episodes could not be run: the last tries of a training start must not take their place."""
    config = replace(LIBERO, collect=replace(LIBERO.collect, tries_per_start=3))
    present = [spec for spec in exploration_specs(config) if spec.seed < EXPLORATION_SEED + 17]
    training, held_out = split_exploration(_episodes(present), config.collect.held_out_fraction)
    assert len(training) + len(held_out) == 170
    assert not {(e.task, e.seed) for e in training} & {(e.task, e.seed) for e in held_out}


def test_a_seed_has_starts_of_its_own():
    first, second = (exploration_specs(replace(LIBERO, seed=seed)) for seed in (0, 1))
    assert not set(first) & set(second)
    assert np.array_equal([s.seed for s in second], [s.seed + EXPLORATION_SEED for s in first])


def test_held_out_exploration_is_the_policys_own():
    """Where hands try again, that is the training part, whose starts may be shared."""
    specs = exploration_specs(LIBERO)
    training, held_out = split_exploration(_episodes(specs), LIBERO.collect.held_out_fraction)
    assert {e.spec for e in held_out} == set(specs) - set(training_specs(LIBERO))
    assert {e.spec for e in training} == set(training_specs(LIBERO))


def test_mere_starts_are_nobody_elses_and_are_begun_at(tmp_path, monkeypatch):
    """Stopped after a part of them, the collection goes on; the next seed has others."""
    config = get_config("debug")
    config = replace(config, collect=replace(config.collect, starts_per_task=3))
    run, asked = pipeline.Run(config, tmp_path), []
    record = collecting.record_starts

    def stopping(environment, specs):
        if asked:
            raise KeyboardInterrupt
        asked.append(specs)
        return record(environment, specs)

    try:
        pipeline.start(run)
        monkeypatch.setattr(collecting, "PART", 4)
        monkeypatch.setattr(collecting, "record_starts", stopping)
        with pytest.raises(KeyboardInterrupt):
            pipeline.collect_starts(run)
        kept = [e.spec for e in run.workdir.episodes("starts")]
        assert sorted(kept) == sorted(asked[0]) and len(kept) == 4
        monkeypatch.setattr(collecting, "record_starts", record)
        pipeline.collect_starts(run)
        starts = list(run.workdir.episodes("starts"))
        others = exploration_specs(config) + exploration_specs(replace(config, seed=1))
        run.__dict__["exploration"] = _episodes(training_specs(config)), []
        begun = [e.spec for e in run.training_starts]
    finally:
        run.close()
    specs = {e.spec for e in starts}
    assert len(starts) == len(specs) == 6 and {(e.num_steps, e.actor) for e in starts} == {(0, "nobody")}
    assert not specs & set(others) and {(s.split, s.starts) for s in specs} == {("train", "shifted")}
    assert set(begun) == specs | set(training_specs(config)) and len(begun) == len(set(begun))


def test_hands_try_again_in_a_share_of_every_tasks_episodes():
    """Every second, every third or all of the 15 training episodes of a task."""
    training = training_specs(LIBERO)
    for share, numbers in ((0.0, []), (0.5, range(1, 15, 2)), (1 / 3, range(2, 15, 3)), (1.0, range(15))):
        config = replace(LIBERO, collect=replace(LIBERO.collect, try_again=share))
        tasks = LIBERO.environment.tasks
        assert retried_specs(config) == {training[n * tasks + task] for n in numbers for task in range(tasks)}


def test_hands_try_again_in_training_episodes_only(tmp_path, monkeypatch):
    """Were every hand empty, all training episodes would let go at the second chunk, and no held-out one ever."""
    config = get_config("debug")
    run = pipeline.Run(replace(config, collect=replace(config.collect, try_again=1.0)), tmp_path)
    monkeypatch.setattr(collecting, "is_empty", lambda kinematics, proprio: np.ones(len(proprio), bool))
    try:
        pipeline.start(run)
        pipeline.STAGES["collect_demonstrations"](run)
        params = init_policy(run.models.config.policy, jax.random.key(0))
        collecting.collect_exploration(run.config, run.workdir, run.environment, run.models, params)
        training, held_out = run.exploration
        let_go = [(np.asarray(e.actions) == LET_GO).all(-1).tolist() for e in training + held_out]
    finally:
        run.close()
    chunk = config.policy.chunk
    assert len(training) == len(held_out) == 4
    for steps in let_go[:4]:
        assert not any(steps[:chunk]) and all(steps[chunk : 2 * chunk])
    assert not np.concatenate(let_go[4:]).any()
