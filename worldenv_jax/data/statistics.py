# SPDX-License-Identifier: Apache-2.0
"""Quantiles of a dataset's actions and proprioception, in the layout of OpenVLA's dataset_statistics.json.

Source: OpenVLA-OFT `get_dataset_statistics` (q01/q99 over all steps, after the gripper is standardised to 1 = open,
0 = close).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldenv_jax.data.episodes import Episode
from worldenv_jax.data.errors import DataError
from worldenv_jax.files import read_json, write_json
from worldenv_jax.types import ACTION_DIM, PROPRIO_DIM, Statistics

STATISTICS_FILE = "dataset_statistics.json"
_ACTION_MASK = [True] * 6 + [False]  # the gripper is not scaled


def compute_statistics(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Mean, std, min, max, q01 and q99 of the actions and of the proprioception before each action.

    Returns:
        OpenVLA's entry of one dataset: {"action": {...}, "proprio": {...}, "num_transitions", "num_trajectories"}.

    Raises:
        ValueError: there are no episodes.
    """
    if not len(episodes):
        raise ValueError("statistics need at least one episode, got none")
    actions = np.concatenate([standardize_actions(episode.actions) for episode in episodes])
    proprio = np.concatenate([episode.proprio[:-1] for episode in episodes])
    return {
        "action": {**_moments(actions), "mask": _ACTION_MASK},
        "proprio": _moments(proprio),
        "num_transitions": len(actions),
        "num_trajectories": len(episodes),
    }


def standardize_actions(actions: np.ndarray) -> np.ndarray:
    """Environment actions float32 [..., 7] with the gripper (-1 open, +1 close) mapped to 1 = open, 0 = close."""
    gripper = 1.0 - np.clip(actions[..., 6:], 0.0, 1.0)
    return np.concatenate([actions[..., :6], gripper], axis=-1)


def stored_statistics(path: Path | str, name: str, episodes: Sequence[Episode]) -> Statistics:
    """The statistics stored in a dataset's folder; computed and stored when they are not there yet.

    Args:
        path: the folder (of the dataset, or of dataset folders).
        name: the dataset's name, the key in the file.
        episodes: what to compute them from, where there is no file.

    Raises:
        DataError: the file has another layout, or belongs to another dataset.
    """
    file = Path(path) / STATISTICS_FILE
    if not file.exists():
        write_json(file, {name: compute_statistics(episodes)})
    return load_statistics(file, name)


def load_statistics(file: Path | str, name: str | None = None) -> Statistics:
    """Reads a dataset_statistics.json, ours or OpenVLA's.

    Args:
        file: the file.
        name: the dataset in it; may be left out where the file has one only.

    Raises:
        DataError: no such dataset in it, or another layout.
    """
    content = read_json(file)
    if not isinstance(content, Mapping) or not content:
        raise DataError(file, "not a statistics file: expected a JSON object with one entry per dataset")
    if name is None and len(content) == 1:
        name = next(iter(content))
    if name not in content:
        raise DataError(file, f"got dataset {name!r}, the file has {sorted(content)}")
    return statistics_from_dict(content[name], file)


def statistics_from_dict(entry: Mapping[str, Any], path: Path | str) -> Statistics:
    """The quantiles of one dataset's entry; `path` is named in errors.

    Raises:
        DataError: a quantile is missing, not finite, or has another length than 7 (action) or 8 (proprio).
    """
    sizes = {"action": ACTION_DIM, "proprio": PROPRIO_DIM}
    quantiles, problems = {}, []
    for group, size in sizes.items():
        for quantile in ("q01", "q99"):
            try:
                values = np.asarray(entry[group][quantile], np.float32)
            except (KeyError, TypeError, ValueError) as error:
                problems.append(f"{group}/{quantile}: {error!r}")
                continue
            if values.shape != (size,) or not np.isfinite(values).all():
                problems.append(f"{group}/{quantile}: got {values.tolist()}, expected {size} finite numbers")
            quantiles[f"{group}_{quantile}"] = values
    if problems:
        raise DataError(path, "; ".join(problems))
    return Statistics(**quantiles)


def statistics_to_dict(statistics: Statistics) -> dict[str, Any]:
    """The inverse of `statistics_from_dict`: lists of float."""
    values = {field: np.asarray(value).tolist() for field, value in statistics._asdict().items()}
    return {
        "action": {"q01": values["action_q01"], "q99": values["action_q99"], "mask": _ACTION_MASK},
        "proprio": {"q01": values["proprio_q01"], "q99": values["proprio_q99"]},
    }


def _moments(values: np.ndarray) -> dict[str, list[float]]:
    """Per dimension of float32 [N, D], along N."""
    return {
        "mean": values.mean(0).tolist(),
        "std": values.std(0).tolist(),
        "max": values.max(0).tolist(),
        "min": values.min(0).tolist(),
        "q01": np.quantile(values, 0.01, axis=0).tolist(),
        "q99": np.quantile(values, 0.99, axis=0).tolist(),
    }
