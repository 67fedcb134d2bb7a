# SPDX-License-Identifier: Apache-2.0
"""Windows and the stateless sampler, on episodes whose numbers say where they come from."""

import numpy as np
import pytest
from sample_episodes import sample_episode

from worldenv_jax.data.windows import BatchSampler, PolicyWindows, ReflectorWindows, SimulatorWindows

RNG = np.random.default_rng(0)


def counting_episode(number: int, steps: int, success_at: int | None = None, **fields):
    """Frame t shows the value 10 * number + t; action t is t + 1 in every dimension."""
    values = (10 * number + np.arange(steps + 1)).astype(np.uint8)
    images = np.broadcast_to(values[:, None, None, None, None], (steps + 1, 2, 6, 8, 3))
    actions = np.repeat(np.arange(1, steps + 1, dtype=np.float32)[:, None], 7, axis=1)
    proprio = np.repeat(values[:, None], 8, axis=1).astype(np.float32)
    return sample_episode(number, steps, success_at, images=images, actions=actions, proprio=proprio, **fields)


def values(images):
    """The value that each frame shows."""
    return images[..., 0, 0, 0, 0]


def test_policy_windows_end_before_the_episode():
    windows = PolicyWindows([counting_episode(0, 3), counting_episode(1, 5), counting_episode(2, 1)], chunk=3)
    assert len(windows) == 1 + 3
    first_frames = [windows.window(i, RNG)["images"][0, 0, 0, 0] for i in range(4)]
    assert first_frames == [0, 10, 11, 12]
    last = windows.window(3, RNG)
    np.testing.assert_array_equal(last["actions"][:, 0], [3, 4, 5])
    assert last["proprio"][0] == 12 and last["instruction"] == "pick up the red block" and last["task"] == 3


def test_padded_policy_windows():
    """Past the end the hand rests and the gripper is held."""
    windows = PolicyWindows([counting_episode(0, 2)], chunk=4, pad=True)
    assert len(windows) == 2
    np.testing.assert_array_equal(windows.window(1, RNG)["actions"][:, 0], [2, 0, 0, 0])
    np.testing.assert_array_equal(windows.window(1, RNG)["actions"][:, 6], [2, 2, 2, 2])


def test_no_window_fits():
    with pytest.raises(ValueError, match="1 episodes, none with 9 steps"):
        PolicyWindows([counting_episode(0, 3)], chunk=9)


def first_middle_last(step):
    return np.array([0, step // 2, step])


def test_simulator_window():
    windows = SimulatorWindows([counting_episode(0, 6)], first_middle_last, chunk=2)
    assert len(windows) == 5  # t = 0 .. 4
    window = windows.window(4, RNG)
    np.testing.assert_array_equal(values(window["frames"]), [0, 2, 4, 5, 6])
    np.testing.assert_array_equal(window["proprio"][:, 0], [0, 2, 4, 5, 6])
    np.testing.assert_array_equal(window["actions"][:, 0], [5, 6])  # action t leads to frame t + 1
    assert window["previous_proprio"][0] == 3 and windows.window(0, RNG)["previous_proprio"][0] == 0
    assert window["previous_action"][0] == 4 and not windows.window(0, RNG)["previous_action"].any()
    assert window["time"] == 4 and window["mask"].all()
    np.testing.assert_array_equal(window["pose"][3], counting_episode(0, 6).camera_pose[5])


def test_simulator_window_of_a_short_episode():
    windows = SimulatorWindows([counting_episode(0, 1)], first_middle_last, chunk=3)
    assert len(windows) == 1
    window = windows.window(0, RNG)
    np.testing.assert_array_equal(values(window["frames"]), [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(window["mask"], [True, True, True, True, False, False])
    np.testing.assert_array_equal(window["actions"][:, 0], [1, 0, 0])


def test_memory_of_the_simulator_fits():
    """The simulator's own memory: its indices end with the current step."""
    from worldenv_jax.simulator.memory import history_steps

    windows = SimulatorWindows([counting_episode(0, 9)], lambda t: history_steps(t, 4), chunk=2)
    # Slots 0..10 hold frames 0 0 0 0 1 2 ... 7; slots 0, 11 // 3, 22 // 3 and the last.
    np.testing.assert_array_equal(values(windows.window(7, RNG)["frames"]), [0, 0, 4, 7, 8, 9])


def test_streaming_reflector_window():
    windows = ReflectorWindows([counting_episode(0, 3, success_at=2)], length=5, negatives=0.0)
    window = windows.window(0, RNG)
    np.testing.assert_array_equal(values(window["frames"]), [0, 1, 2, 3, 0])
    np.testing.assert_array_equal(window["frame_index"], [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(window["frame_mask"], [True] * 4 + [False])
    np.testing.assert_array_equal(window["labels"], [0, 0, 1, 1, 0])
    with pytest.raises(ValueError, match="'sometimes'"):
        ReflectorWindows([counting_episode(0, 5)], length=5, mode="sometimes")


def test_streaming_windows_of_a_longer_episode():
    """Frames 0 .. 9 into five places: some frame t and the one before it, and three of those earlier, each as often."""
    windows = ReflectorWindows([counting_episode(0, 9, success_at=8)], length=5, negatives=0.0)
    rng, earlier = np.random.default_rng(0), []
    for _ in range(2000):
        window = windows.window(0, rng)
        shown, mask = values(window["frames"]).astype(int), window["frame_mask"]
        shown = shown[mask]
        np.testing.assert_array_equal(window["frame_index"][mask], shown)
        np.testing.assert_array_equal(window["labels"], np.pad(shown >= 8, (0, 5 - len(shown))))
        assert (np.diff(shown) > 0).all() and len(shown) == min(5, shown[-1] + 1)
        assert len(shown) < 2 or shown[-2] == shown[-1] - 1
        if shown[-1] == 9:
            earlier.append(np.isin(np.arange(8), shown))
    np.testing.assert_allclose(np.mean(earlier, axis=0), 3 / 8, atol=0.06)


def test_where_a_streaming_window_is_dense_does_not_tell_the_outcome():
    """With the dense frames always last, those of failures lie at the step limit and a judge only has to count."""
    episodes = [counting_episode(0, 9, success_at=8), counting_episode(0, 19)]
    windows = ReflectorWindows(episodes, length=4, negatives=0.0)
    rng = np.random.default_rng(0)
    ends = np.array([[w["frame_index"][w["frame_mask"]][-1] for w in (windows.window(i, rng) for i in (0, 1))]
                     for _ in range(1000)])  # fmt: skip
    assert set(ends[:, 0]) == set(range(10)) and set(ends[:, 1]) == set(range(20))
    assert np.mean(ends[:, 0] >= 8) == pytest.approx(0.6, abs=0.06)
    assert np.mean(ends[:, 1] < 10) == pytest.approx(0.5, abs=0.06)


def test_uniform_reflector_windows():
    """Half of the ends lie after the success (frame 8 of 0 .. 9), the others anywhere: 1/2 + 1/2 * 2/10 in all."""
    windows = ReflectorWindows([counting_episode(0, 9, success_at=8)], length=4, mode="uniform", negatives=0.0)
    rng, ends = np.random.default_rng(0), []
    for _ in range(500):
        window = windows.window(0, rng)
        shown = values(window["frames"])[window["frame_mask"]]
        ends.append(shown[-1])
        assert shown[0] == 0 and (np.diff(shown.astype(int)) > 0).all()
        np.testing.assert_array_equal(window["labels"][window["frame_mask"]], shown >= 8)
    assert set(ends) == set(range(10))
    assert np.mean(np.array(ends) >= 8) == pytest.approx(0.6, abs=0.06)
    newest = ReflectorWindows([counting_episode(0, 9, success_at=8)], length=1, mode="uniform", negatives=0.0)
    for seed in range(20):  # one frame is the last of what would have been several
        of_four, of_one = (part.window(0, np.random.default_rng(seed)) for part in (windows, newest))
        assert values(of_one["frames"]) == values(of_four["frames"])[of_four["frame_mask"]][-1]


def test_negatives_are_successes_under_another_instruction():
    episodes = [
        counting_episode(0, 3, success_at=2, instruction="a"),
        counting_episode(1, 3, instruction="b"),
    ]
    windows = ReflectorWindows(episodes, length=4, negatives=0.5)
    rng = np.random.default_rng(0)
    solved = [windows.window(0, rng) for _ in range(400)]
    wrong = [window for window in solved if window["instruction"] == "b"]
    assert len(wrong) / len(solved) == pytest.approx(0.5, abs=0.08)
    assert all(not window["labels"].any() for window in wrong)
    assert all(window["instruction"] == "b" for window in (windows.window(1, rng) for _ in range(50)))


def test_batches_depend_on_seed_and_step_only():
    episodes = [counting_episode(i, 5, success_at=3 if i % 3 else None) for i in range(7)]
    sampler = BatchSampler(SimulatorWindows(episodes, first_middle_last, 2), batch_size=6, seed=1)
    batches = [sampler.batch(step) for step in range(5)]
    again = BatchSampler(SimulatorWindows(episodes, first_middle_last, 2), batch_size=6, seed=1).batch(4)
    np.testing.assert_equal(again, batches[4])
    other = BatchSampler(sampler.windows, batch_size=6, seed=2).batch(4)
    assert not np.array_equal(other["frames"], again["frames"])
    assert batches[0]["frames"].shape == (6, 5, 2, 6, 8, 3)
    halves = [sampler.batch(4, slice(0, 3)), sampler.batch(4, slice(3, 6))]
    np.testing.assert_array_equal(np.concatenate([half["frames"] for half in halves]), again["frames"])


def test_every_window_once_per_pass():
    windows = PolicyWindows([counting_episode(0, 6), counting_episode(1, 6)], chunk=2)
    sampler = BatchSampler(windows, batch_size=5, seed=0)
    shown = np.concatenate([sampler.batch(step)["images"][:, 0, 0, 0, 0] for step in range(4)])
    assert sorted(shown[:10]) == sorted(shown[10:]) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert list(shown[:10]) != list(shown[10:])


def test_success_and_failure_are_balanced():
    episodes = [counting_episode(i, 4, success_at=3 if i == 0 else None) for i in range(9)]
    sampler = BatchSampler(ReflectorWindows(episodes, length=5, negatives=0.0), batch_size=8, seed=0)
    batch = sampler.batch(3)
    assert batch["labels"].any(axis=1).sum() == 4
    assert batch["instruction"] == ["pick up the red block"] * 8
