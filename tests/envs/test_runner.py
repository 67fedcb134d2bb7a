# SPDX-License-Identifier: Apache-2.0
"""Episodes and mere starts of a counting world: success times, recording, independence of the slots, errors apart."""

import numpy as np
import pytest

from worldenv_jax.data.episodes import validate_episode
from worldenv_jax.envs.base import EpisodeError, Frames, StartsAtOnce, split_slots
from worldenv_jax.envs.runner import record_starts, run_episodes
from worldenv_jax.types import Camera, EpisodeSpec

K = 4


class CountingWorld(StartsAtOnce):
    """Each action adds its first number; the task is done while the sum is in [task, task + 3)."""

    name = "counting"
    instructions = ("zero", "one", "two", "three", "four", "five", "six", "never")
    max_steps = 10
    image_size = 2
    num_views = 1
    protocol: dict = {}

    def __init__(self, num_slots):
        self.num_slots = num_slots
        self.sum, self.goal = np.zeros(num_slots), np.zeros(num_slots)

    def reset(self, slots, specs):
        self.sum[slots] = 0.0
        self.goal[slots] = [100 if spec.task == 7 else spec.task for spec in specs]
        return self._frames(slots, self.sum[slots][:, None], np.zeros((len(slots), 1), bool), every_frame=True)

    def step(self, slots, actions, every_frame):
        total = self.sum[slots][:, None] + np.cumsum(actions[..., 0], axis=1)
        self.sum[slots] = total[:, -1]
        goal = self.goal[slots][:, None]
        return self._frames(slots, total, (total >= goal) & (total < goal + 3), every_frame)

    def start_state(self, slot):
        return {"goal": self.goal[slot]}

    def photographs(self, slot):
        return np.full((1, 4, 4, 3), self.goal[slot], np.uint8)

    def _frames(self, slots, total, success, every_frame):
        shown = total if every_frame else total[:, -1:]
        images = np.broadcast_to(shown[..., None, None, None, None], (*shown.shape, 1, 2, 2, 3)).astype(np.uint8)
        proprio = np.zeros((*shown.shape, 8), np.float32)
        camera = Camera(np.ones((*shown.shape, 1, 3, 3), np.float32), np.ones((*shown.shape, 1, 4, 4), np.float32))
        return Frames(images, proprio, success, camera)


def one_each_step(images, proprio, specs, chunks):
    """Adds 1 per step (an action of 2 is clipped to 1)."""
    return np.tile(np.array([2.0, 0, 0, 0, 0, 0, 1], np.float32), (len(specs), K, 1))


SPECS = [EpisodeSpec(task, 0) for task in (1, 6, 7, 4)]


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_outcomes_do_not_depend_on_the_slots(slots):
    def act(*arguments):
        return np.clip(one_each_step(*arguments), -1, 1)

    outcomes = dict(run_episodes(CountingWorld(slots), act, SPECS))
    # The sum after step n is n: task g succeeds at step g; "never" fails at the limit of 10.
    assert [outcomes[i].steps for i in range(4)] == [1, 6, 10, 4]
    assert [outcomes[i].success for i in range(4)] == [True, True, False, True]
    assert all(outcome.episode is None for outcome in outcomes.values())


def test_recorded_episodes():
    act = lambda *arguments: np.clip(one_each_step(*arguments), -1, 1)
    outcomes = dict(run_episodes(CountingWorld(2), act, SPECS, record=True, actor="policy", noise=1.5, after_success=3))
    first, _, never, last = (outcomes[i].episode for i in range(4))
    assert first.num_steps == 4 and never.num_steps == 10 and last.num_steps == 7  # success + 3, or the limit
    np.testing.assert_array_equal(first.images[:, 0, 0, 0, 0], [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(first.success, [False, True, True, True, False])
    assert first.noise == 1.5 and first.actor == "policy" and first.instruction == "one"
    assert never.environment == {"goal": 100} and (never.photographs == 100).all() and (last.photographs == 4).all()
    np.testing.assert_array_equal(never.actions[:, 0], 1.0)


@pytest.mark.parametrize("slots,changes", [(1, 4), (2, 4), (4, 4), (3, 6)])
def test_slots_stay_with_their_task(slots, changes):
    """Four tasks, interleaved, of equal length: each is taken up once, or shared at the end (four over three slots)."""
    world, last, taken_up = CountingWorld(slots), {}, []
    reset = world.reset

    def counting_reset(slots, specs):
        taken_up.extend(spec.task for slot, spec in zip(slots, specs) if last.get(slot) != spec.task)
        last.update(zip(slots, (spec.task for spec in specs)))
        return reset(slots, specs)

    world.reset, world.max_steps = counting_reset, K
    specs = [EpisodeSpec(task, seed) for seed in range(6) for task in (6, 7, 5, 4)]
    outcomes = dict(run_episodes(world, lambda *a: np.zeros((len(a[2]), K, 7)), specs))
    assert sorted(outcomes) == list(range(24)) and all(outcomes[i].spec == spec for i, spec in enumerate(specs))
    assert len(taken_up) <= changes and set(taken_up) == {4, 5, 6, 7}


def test_a_limit_may_be_given():
    act = lambda *a: np.clip(one_each_step(*a), -1, 1)
    for limit, expected in ((6, (True, 6)), (5, (False, 5)), (None, (True, 6))):
        outcome = dict(run_episodes(CountingWorld(1), act, [EpisodeSpec(6, 0)], max_steps=limit))[0]
        assert (outcome.success, outcome.steps) == expected


def test_success_past_the_limit_is_void():
    world = CountingWorld(1)
    world.max_steps = 5  # the second chunk reaches step 8, past the limit
    outcome = dict(run_episodes(world, lambda *a: np.clip(one_each_step(*a), -1, 1), [EpisodeSpec(6, 0)]))[0]
    assert not outcome.success and outcome.steps == 5


class CrashingWorld(CountingWorld):
    """Task 6 crashes at its reset, task 5 at its second chunk; the other slots of the same call go on."""

    def reset(self, slots, specs):
        frames = super().reset(slots, specs)
        return self._without(slots, frames, [spec.task == 6 for spec in specs], "no scene")

    def step(self, slots, actions, every_frame):
        second = self.sum[slots] == K  # one chunk of ones has been added
        frames = super().step(slots, actions, every_frame)
        return self._without(slots, frames, (self.goal[slots] == 5) & second, "lost contact")

    def _without(self, slots, frames, crashed, text):
        failed = {slot: text for slot, wrong in zip(slots, crashed) if wrong}
        if failed:
            done = {slot: part for slot, part in split_slots(slots, frames).items() if slot not in failed}
            raise EpisodeError(failed, done)
        return frames


@pytest.mark.parametrize("slots", [1, 2, 8])
@pytest.mark.parametrize("record", [False, True])
def test_a_crashing_task_is_an_error_and_disturbs_no_other(slots, record):
    act = lambda *arguments: np.clip(one_each_step(*arguments), -1, 1)
    specs = [EpisodeSpec(task, seed) for seed in range(2) for task in (1, 6, 7, 5, 3)]
    outcomes = dict(run_episodes(CrashingWorld(slots), act, specs, record=record))
    expected = {1: (True, 1, None), 6: (None, None, "no scene"), 7: (False, 10, None), 3: (True, 3, None)}
    expected[5] = (None, None, "lost contact")
    assert sorted(outcomes) == list(range(10))
    for position, spec in enumerate(specs):
        outcome = outcomes[position]
        assert outcome.spec == spec
        assert (outcome.success, outcome.steps, outcome.error) == expected[spec.task]
        assert (outcome.episode is None) == (not record or spec.task in (5, 6))


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_starts_are_first_frames_of_episodes(slots):
    """No step is taken in them, and what follows in `run_episodes` begins with the same frame."""
    world = CrashingWorld(slots)
    steps = []
    world.step = lambda *arguments: steps.append(arguments)
    specs = [EpisodeSpec(task, seed) for seed in range(2) for task in (1, 6, 7, 5, 3)]
    outcomes = dict(record_starts(world, specs))
    assert sorted(outcomes) == list(range(10)) and not steps
    act = lambda *arguments: np.clip(one_each_step(*arguments), -1, 1)
    whole = dict(run_episodes(CrashingWorld(slots), act, specs, record=True))
    for position, spec in enumerate(specs):
        outcome = outcomes[position]
        if spec.task == 6:
            assert outcome == (spec, None, None, None, None, "no scene")
            continue
        start = outcome.episode
        validate_episode(start)
        assert (start.spec, start.num_steps, start.actor, start.succeeded) == (spec, 0, "nobody", False)
        if (other := whole[position].episode) is not None:
            for name in ("images", "proprio", "intrinsics", "camera_pose"):
                np.testing.assert_array_equal(getattr(start, name), getattr(other, name)[:1])
            np.testing.assert_array_equal(start.photographs, other.photographs)
            assert start.environment == other.environment and start.instruction == other.instruction
