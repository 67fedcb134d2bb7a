# SPDX-License-Identifier: Apache-2.0
"""LIBERO's HDF5 files, written here by hand in both orders of observation and action."""

import json

import numpy as np
import pytest

from worldenv_jax.data.episodes import episodes_equal
from worldenv_jax.data.errors import DataError
from worldenv_jax.data.hdf5 import read_demonstrations
from worldenv_jax.data.rlds import open_episodes, write_episodes

h5py = pytest.importorskip("h5py")
STEPS = 4


def write_demo(group, after: bool):
    """Five moments 0..4 with joints, pose and pixels equal to the moment's number; action i leads to i + 1."""
    seen = np.arange(STEPS) + after
    observation = group.create_group("obs")
    for view, offset in (("agentview_rgb", 0), ("eye_in_hand_rgb", 100)):
        images = np.zeros((STEPS, 3, 2, 3), np.uint8)
        images[:, 0, 0, 0] = seen + offset  # the corner that a turn by 180 degrees moves to the end
        observation[view] = images
    observation["ee_states"] = np.repeat(seen[:, None], 6, axis=1).astype(np.float64)
    observation["gripper_states"] = np.repeat(-seen[:, None], 2, axis=1).astype(np.float64)
    observation["joint_states"] = np.repeat(seen[:, None], 7, axis=1) + 1e-4
    group["states"] = np.repeat(np.arange(STEPS, dtype=np.float64)[:, None], 20, axis=1)
    group["actions"] = np.repeat(np.arange(STEPS, dtype=np.float64)[:, None], 7, axis=1) / 10
    group["dones"] = np.array([0, 0, 0, 1], np.uint8)


def write_file(path, after: bool, attributes: bool = True):
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if attributes:
            data.attrs["problem_info"] = json.dumps({"language_instruction": "Pick the milk "})
        for name in ("demo_10", "demo_2"):
            write_demo(data.create_group(name), after)
    return path


def test_observations_after_the_action(tmp_path):
    """Frames 1..4 are known, so actions 1..3 have a frame on both sides."""
    episodes = list(read_demonstrations(write_file(tmp_path / "x.hdf5", after=True), task=5))
    assert len(episodes) == 2
    episode = episodes[0]
    np.testing.assert_array_equal(episode.images[:, 0, -1, -1, 0], [1, 2, 3, 4])
    np.testing.assert_array_equal(episode.images[:, 1, -1, -1, 0], [101, 102, 103, 104])
    np.testing.assert_array_equal(episode.proprio[:, 0], [1, 2, 3, 4])
    np.testing.assert_array_equal(episode.proprio[:, 7], [-1, -2, -3, -4])
    np.testing.assert_allclose(episode.actions[:, 0], [0.1, 0.2, 0.3])
    np.testing.assert_array_equal(episode.success, [False, False, False, True])
    assert (episode.instruction, episode.task, episode.actor) == ("pick the milk", 5, "human")


def test_observations_before_the_action(tmp_path):
    path = write_file(tmp_path / "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5", after=False, attributes=False)
    episode = next(read_demonstrations(path))
    np.testing.assert_array_equal(episode.images[:, 0, -1, -1, 0], [0, 1, 2, 3, 3])
    np.testing.assert_allclose(episode.actions[:, 0], [0, 0.1, 0.2, 0.3])
    np.testing.assert_array_equal(episode.success, [False, False, False, False, True])
    assert episode.instruction == "turn on the stove"


def test_to_rlds_and_back_is_identical(tmp_path):
    episodes = list(read_demonstrations(write_file(tmp_path / "x.hdf5", after=True)))
    again = open_episodes(write_episodes(tmp_path / "rlds", episodes))
    assert [episodes_equal(a, b) for a, b in zip(episodes, again)] == [True, True]


def test_damaged_demonstration_is_named(tmp_path):
    path = write_file(tmp_path / "x.hdf5", after=True)
    with h5py.File(path, "a") as file:
        del file["data/demo_10/obs/ee_states"]
    reader = read_demonstrations(path)
    assert next(reader).num_steps == 3
    with pytest.raises(DataError, match="x.hdf5: demo_10: .*ee_states"):
        next(reader)


def test_other_files(tmp_path):
    (tmp_path / "x.hdf5").write_bytes(b"no")
    with pytest.raises(DataError, match="not a LIBERO HDF5 file"):
        next(read_demonstrations(tmp_path / "x.hdf5"))
