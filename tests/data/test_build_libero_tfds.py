# SPDX-License-Identifier: Apache-2.0
"""The TFDS builder: TFDS and our reader see the episodes that went in."""

import sys
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from sample_episodes import sample_episode

from worldenv_jax.data.episodes import episodes_equal
from worldenv_jax.data.rlds import open_episodes, write_episodes

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.build_libero_tfds import LiberoEpisodes  # noqa: E402

EPISODES = [sample_episode(0, success_at=3), sample_episode(1), sample_episode(2, steps=2, split="test")]


def test_array_record(tmp_path):
    source = write_episodes(tmp_path / "source", EPISODES)
    builder = LiberoEpisodes(source=source, encoding="png", data_dir=str(tmp_path / "tfds"), file_format="array_record")
    builder.download_and_prepare()
    read_by_tfds = tfds.builder_from_directory(builder.data_path).as_data_source("train")
    steps = list(read_by_tfds[1]["steps"])
    np.testing.assert_array_equal([step["observation"]["image"] for step in steps], EPISODES[1].images[:, 0])
    np.testing.assert_array_equal([step["action"] for step in steps[:-1]], EPISODES[1].actions)
    read_by_us = open_episodes(Path(builder.data_path))
    assert len(read_by_us) == 3
    assert all(episodes_equal(a, b) for a, b in zip(EPISODES, read_by_us))
