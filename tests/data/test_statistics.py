# SPDX-License-Identifier: Apache-2.0
"""Statistics against hand-made numbers and the numbers of OpenVLA-OFT's code."""

import json

import numpy as np
import pytest
from sample_episodes import sample_episode

from worldenv_jax.data.errors import DataError
from worldenv_jax.data.statistics import (
    compute_statistics,
    load_statistics,
    standardize_actions,
    statistics_from_dict,
    statistics_to_dict,
    stored_statistics,
)


def ramp_episode():
    """Actions 0, 0.01, ..., 1 in every dimension; proprio ten times that, and a last frame that must not count."""
    ramp = np.linspace(0, 1, 101, dtype=np.float32)[:, None]
    proprio = np.concatenate([10 * np.repeat(ramp, 8, axis=1), np.full((1, 8), 1e6, np.float32)])
    return sample_episode(steps=101, actions=np.repeat(ramp, 7, axis=1), proprio=proprio)


def test_quantiles_of_a_ramp():
    """With 101 equally spaced values the 1 % quantile is the second value, the 99 % quantile the last but one."""
    entry = compute_statistics([ramp_episode()])
    np.testing.assert_allclose(entry["action"]["q01"], [0.01] * 7, rtol=1e-6)
    np.testing.assert_allclose(entry["action"]["q99"], [0.99] * 7, rtol=1e-6)
    np.testing.assert_allclose(entry["proprio"]["q99"], [9.9] * 8, rtol=1e-6)
    np.testing.assert_allclose(entry["proprio"]["max"], [10] * 8, rtol=1e-6)
    np.testing.assert_allclose(entry["action"]["mean"], [0.5] * 7, rtol=1e-6)
    np.testing.assert_allclose(entry["action"]["std"], [np.sqrt((101**2 - 1) / 12) / 100] * 7, rtol=1e-5)
    assert entry["action"]["mask"] == [True] * 6 + [False]
    assert (entry["num_transitions"], entry["num_trajectories"]) == (101, 1)


def test_gripper_convention(fixtures_dir):
    with np.load(fixtures_dir / "openvla_oft" / "normalisation.npz") as truth:
        ours = standardize_actions(truth["in_raw_action"])
        np.testing.assert_allclose(ours, truth["out_standardised_action"], atol=1e-7)


def test_computed_once_and_stored(tmp_path):
    first = stored_statistics(tmp_path, "robot", [ramp_episode()])
    assert list(json.loads((tmp_path / "dataset_statistics.json").read_text())) == ["robot"]
    again = stored_statistics(tmp_path, "robot", [])
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(DataError, match=r"got dataset 'other', the file has \['robot'\]"):
        load_statistics(tmp_path / "dataset_statistics.json", "other")


def test_dictionary_round_trip(tmp_path):
    statistics = statistics_from_dict(compute_statistics([sample_episode()]), "x")
    again = statistics_from_dict(statistics_to_dict(statistics), "x")
    for a, b in zip(statistics, again):
        np.testing.assert_array_equal(a, b)


def test_every_problem_of_a_file_is_listed(tmp_path):
    entry = compute_statistics([sample_episode()])
    entry["action"]["q01"] = [0.0] * 6
    del entry["proprio"]["q99"]
    (tmp_path / "s.json").write_text(json.dumps({"robot": entry}))
    with pytest.raises(DataError, match=r"action/q01: got .* expected 7 finite numbers; proprio/q99: KeyError"):
        load_statistics(tmp_path / "s.json")
    with pytest.raises(ValueError, match="at least one episode"):
        compute_statistics([])
