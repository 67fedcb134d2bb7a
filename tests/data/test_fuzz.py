# SPDX-License-Identifier: Apache-2.0
"""Damaged dataset folders: whatever is wrong with them, the answer is episodes or DataError."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_episodes import sample_episode

from worldenv_jax.data.episodes import validate_episode
from worldenv_jax.data.errors import DataError
from worldenv_jax.data.example_proto import serialize_example
from worldenv_jax.data.rlds import RldsFolder, write_episodes
from worldenv_jax.data.tfrecord import TFRecordWriter

SHARD = "worldenv-train.tfrecord-00000-of-00001"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=5), child, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The contents of a good folder, and a folder to write damaged ones to."""
    root = tmp_path_factory.mktemp("fuzz")
    folder = write_episodes(root / "good", [sample_episode(i, steps=2) for i in range(2)])
    (root / "bad").mkdir()
    return {file.name: file.read_bytes() for file in folder.iterdir()}, root / "bad"


def read_everything(folder):
    """The episodes that were read, valid ones, and what was said, which names the folder."""
    episodes, said = [], ""
    try:
        for episode in RldsFolder(folder, skip_damaged=True):
            episode = replace(episode, images=np.asarray(episode.images))
            validate_episode(episode)
            episodes.append(episode)
        RldsFolder(folder)
    except DataError as error:
        said = str(error)
        assert str(folder) in said
    return episodes, said


def assert_untouched(episodes):
    """Each is one of those that were written, pixel by pixel."""
    for episode in episodes:
        good = sample_episode(episode.seed, steps=2)
        np.testing.assert_array_equal(episode.images, good.images)
        np.testing.assert_array_equal(episode.actions, good.actions)
        np.testing.assert_array_equal(episode.proprio, good.proprio)


def fresh_folder(files, **changed):
    contents, bad = files
    for name, data in {**contents, **changed}.items():
        (bad / "new").write_bytes(data)
        (bad / "new").rename(bad / name)
    return bad


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bytes_of_a_shard(files, data):
    shard = bytearray(files[0][SHARD])
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(shard) - 1))
        shard[position : position + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    episodes, _ = read_everything(fresh_folder(files, **{SHARD: bytes(shard)}))
    assert_untouched(episodes)  # checksums: what comes out of a damaged shard was not


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_json_files(files, data):
    """One value somewhere in the file is replaced by another."""
    name = data.draw(st.sampled_from(["features.json", "dataset_info.json"]))
    content = json.loads(files[0][name])
    place, node = None, content
    while isinstance(node, dict | list) and node and (place is None or data.draw(st.booleans())):
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        place, node = (node, key), node[key]
    place[0][place[1]] = data.draw(JSON)
    episodes, said = read_everything(fresh_folder(files, **{name: json.dumps(content).encode()}))
    assert_untouched(episodes)
    assert len(episodes) == 2 or said


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_features_of_an_example(files, data):
    """One feature has other contents, with right checksums."""
    folder = fresh_folder(files)
    example = RldsFolder(folder).example(0)
    example = {k: [bytes(x) for x in v] if isinstance(v, list) else v for k, v in example.items()}
    key = data.draw(st.sampled_from(sorted(example)))
    kinds = [
        st.lists(st.binary(max_size=4), max_size=4),
        st.lists(st.floats(width=32), max_size=22).map(lambda values: np.array(values, np.float32)),
        st.lists(st.integers(-(2**63), 2**63 - 1), max_size=22).map(lambda values: np.array(values, np.int64)),
    ]
    writer = TFRecordWriter(folder / "new")
    writer.write(serialize_example({**example, key: data.draw(st.one_of(kinds))}))
    writer.close()
    writer.path.rename(folder / SHARD)
    episodes, said = read_everything(folder)
    assert len(episodes) == 1 or said  # of the two that the folder announces
