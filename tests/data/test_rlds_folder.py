# SPDX-License-Identifier: Apache-2.0
"""Dataset folders: round trips, TFDS as a second reader, foreign datasets, damage, atomic writing."""

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sample_episodes import sample_episode

from worldenv_jax.data.episodes import episodes_equal, summarize_episodes
from worldenv_jax.data.errors import DataError
from worldenv_jax.data.example_proto import serialize_example
from worldenv_jax.data.rlds import RldsFolder, add_episodes, open_episodes, write_episodes
from worldenv_jax.data.tfrecord import TFRecordFile, TFRecordWriter

EPISODES = [
    sample_episode(0, steps=5, success_at=4, sample=2),
    sample_episode(1, steps=3, split="test", environment={}),
    sample_episode(2, steps=1, noise=0.0, actor="expert", instruction="öffne die Schublade"),
]
IN_FILE_ORDER = [EPISODES[0], EPISODES[2], EPISODES[1]]  # split "train" before "test"


@pytest.fixture
def folder(tmp_path):
    return write_episodes(tmp_path / "episodes", EPISODES)


@pytest.fixture
def reference(fixtures_dir, tmp_path):
    """A copy of the fixture of `modified_libero_rlds`."""
    return shutil.copytree(fixtures_dir / "rlds" / "libero_object_no_noops", tmp_path / "libero")


def test_reading_back_is_identical(folder):
    episodes = open_episodes(folder)
    assert len(episodes) == 3
    assert all(episodes_equal(a, b) for a, b in zip(IN_FILE_ORDER, episodes))
    assert episodes_equal(episodes[-1], IN_FILE_ORDER[2])
    assert summarize_episodes(episodes) == summarize_episodes(IN_FILE_ORDER)
    with pytest.raises(IndexError):
        episodes[3]


@pytest.mark.parametrize("views", [1, 2, 4])
def test_any_number_of_views(tmp_path, views):
    written = sample_episode(views=views)
    assert episodes_equal(written, open_episodes(write_episodes(tmp_path / "v", [written]))[0])


def test_a_start_without_actions(tmp_path):
    start = sample_episode(steps=0, actor="nobody")
    add_episodes(tmp_path, [start])
    (read,) = open_episodes(tmp_path)
    assert episodes_equal(read, start)
    with pytest.raises(ValueError, match="0 steps"):
        add_episodes(tmp_path, [replace(start, actor="policy")])


def test_photographs(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 24, 20, 3), np.uint8)
    written = sample_episode(photographs=pixels)
    folder = write_episodes(tmp_path / "a", [written])
    assert episodes_equal(written, open_episodes(folder)[0])
    record = bytes(TFRecordFile(folder / "worldenv-train.tfrecord-00000-of-00001")[0])
    example = tfds.builder_from_directory(folder).info.features.deserialize_example_np(record)
    for view in range(2):
        np.testing.assert_array_equal(example["episode_metadata"][f"photograph_{view}"], pixels[view])
    with pytest.raises(DataError, match=r"episode 1 has photographs \[H, W\] None, the first has \[24, 20\]"):
        write_episodes(tmp_path / "b", [written, sample_episode()])
    with pytest.raises(DataError, match=r"photographs: got uint8 \[1, 24, 20, 3\], expected uint8 \[2, "):
        write_episodes(tmp_path / "b", [sample_episode(photographs=pixels[:1])])
    change_features(folder / "worldenv-train.tfrecord-00000-of-00001", **{"episode_metadata/photograph_1": [b"PK"]})
    with pytest.raises(DataError, match="not a readable JPEG or PNG"):
        open_episodes(folder)[0]


def test_jpeg_is_close_and_not_encoded_twice(tmp_path):
    smooth = np.broadcast_to(np.arange(0, 240, 10, np.uint8)[:, None, None], (6, 2, 24, 16, 3))
    first = open_episodes(write_episodes(tmp_path / "a", [sample_episode(images=smooth)], encoding="jpeg"))
    second = open_episodes(write_episodes(tmp_path / "b", first, encoding="jpeg"))
    assert np.abs(np.asarray(first[0].images).astype(int) - smooth).max() <= 4
    assert episodes_equal(first[0], second[0])


def test_tfds_reads_the_folder(folder):
    """Without TensorFlow: the builder's features decode the raw records."""
    builder = tfds.builder_from_directory(folder)
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 2, "test": 1}
    record = bytes(TFRecordFile(folder / "worldenv-test.tfrecord-00000-of-00001")[0])
    example = builder.info.features.deserialize_example_np(record)
    steps, written = list(example["steps"]), EPISODES[1]
    assert len(steps) == 4
    for t, step in enumerate(steps):
        np.testing.assert_array_equal(step["observation"]["image"], written.images[t, 0])
        np.testing.assert_array_equal(step["observation"]["wrist_image"], written.images[t, 1])
        np.testing.assert_array_equal(step["observation"]["state"], written.proprio[t])
        np.testing.assert_array_equal(step["camera_pose"], written.camera_pose[t])
        assert step["language_instruction"].decode() == written.instruction
        assert (step["is_first"], step["is_last"]) == (t == 0, t == 3)
    np.testing.assert_array_equal([step["action"] for step in steps[:3]], written.actions)
    np.testing.assert_array_equal(steps[3]["action"], [0, 0, 0, 0, 0, 0, written.actions[-1, 6]])
    assert example["episode_metadata"]["seed"] == 1


def test_reference_dataset(reference):
    """T steps become T actions and T + 1 frames; the recording ends with a reward."""
    episodes = open_episodes(reference)
    assert [episode.num_steps for episode in episodes] == [20, 12, 17, 14]
    assert episodes[0].images.shape == (21, 2, 256, 256, 3)
    assert episodes[0].first_success == 20
    np.testing.assert_array_equal(episodes[0].images[20], episodes[0].images[19])
    assert summarize_episodes(episodes) == summarize_episodes(list(episodes))


def test_growing_dataset(tmp_path):
    for episode in EPISODES:
        add_episodes(tmp_path / "grown", [episode])
    assert sorted(path.name for path in (tmp_path / "grown").iterdir()) == ["0000", "0001", "0002"]
    grown = open_episodes(tmp_path / "grown")
    assert all(episodes_equal(a, b) for a, b in zip(EPISODES, grown))
    assert [summary.split for summary in grown.summaries] == ["train", "test", "train"]


def test_what_a_killed_writer_leaves_is_not_read(tmp_path):
    add_episodes(tmp_path, [sample_episode(0)])
    half = tmp_path / ".0001.4711.tmp"
    shutil.copytree(tmp_path / "0000", half)
    (half / "dataset_info.json").unlink()
    assert [episode.seed for episode in open_episodes(tmp_path)] == [0]
    assert add_episodes(tmp_path, [sample_episode(1)]).name == "0001"


def test_a_folder_that_lists_no_shards_is_an_error(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps({**info, "splits": []}))
    with pytest.raises(DataError, match="lists no shards"):
        RldsFolder(copy)


def test_array_record_is_read_too(folder, tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    copy = shutil.copytree(folder, tmp_path / "copy")
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "array_record"}))
    for split in ("train", "test"):
        source = copy / f"worldenv-{split}.tfrecord-00000-of-00001"
        writer = ArrayRecordWriter(str(source).replace("tfrecord", "array_record"), "group_size:1")
        for record in TFRecordFile(source):
            writer.write(bytes(record))
        writer.close()
    assert all(episodes_equal(a, b) for a, b in zip(IN_FILE_ORDER, RldsFolder(copy)))
    broken = copy / "worldenv-test.array_record-00000-of-00001"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(DataError, match="2 of 3 episodes are good"):
        RldsFolder(copy)


def test_pickled_sequences_open_again(folder):
    assert episodes_equal(pickle.loads(pickle.dumps(open_episodes(folder)))[1], IN_FILE_ORDER[1])


def test_truncated_shard(reference):
    shard = next(reference.rglob("*00001-of-00002"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"(?s)3 of 4 episodes are good.*00001-of-00002: record 1 at byte \d+: trunc"):
        open_episodes(reference)
    assert len(open_episodes(reference, skip_damaged=True)) == 3


def test_missing_shard(reference):
    next(reference.rglob("*00000-of-00002")).unlink()
    with pytest.raises(DataError, match="2 of 4 episodes are good.*No such file"):
        open_episodes(reference)
    assert len(RldsFolder(reference, skip_damaged=True).damage) == 1


def test_corrupt_payload_is_found_when_it_is_read(folder):
    shard = folder / "worldenv-train.tfrecord-00000-of-00001"
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(data)
    episodes = open_episodes(folder)
    assert episodes_equal(episodes[1], IN_FILE_ORDER[1])
    with pytest.raises(DataError, match="00000-of-00001: record 0 at byte 0: corrupt"):
        episodes[0]
    good = open_episodes(folder, skip_damaged=True)
    assert [episode.seed for episode in good] == [2, 1]


def replace_records(shard, records):
    """A new file in place of the old one, which may still be mapped."""
    writer = TFRecordWriter(shard.with_name("new"))
    for record in records:
        writer.write(record)
    writer.close()
    writer.path.rename(shard)


def change_features(shard, **changes):
    """Replaces features of the first record of a shard, with right checksums."""
    records = [bytes(record) for record in TFRecordFile(shard)]
    features = RldsFolder(shard.parent).example(0)
    features = {k: [bytes(x) for x in v] if isinstance(v, list) else v for k, v in features.items()}
    replace_records(shard, [serialize_example({**features, **changes}), *records[1:]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps/action": np.full(42, np.nan, np.float32)}, "actions: got NaN"),
        ({"steps/action": np.zeros(41, np.float32)}, "reshape"),
        ({"steps/observation/image": [b""] * 3}, "frames in the views, 6 actions"),
        ({"steps/observation/state": []}, "not an episode"),
        ({"steps/language_instruction": []}, "not an episode"),
        ({"steps/language_instruction": np.array([10**12])}, "got 1 numbers, expected byte strings"),
        ({"episode_metadata/environment": [b"PK"]}, "environment state is damaged"),
    ],
)
def test_contents_that_are_no_episode(folder, changes, message):
    change_features(folder / "worldenv-train.tfrecord-00000-of-00001", **changes)
    with pytest.raises(DataError, match=f"record 0 at byte 0.*{message}"):
        open_episodes(folder)[0]
    assert [episode.seed for episode in open_episodes(folder, skip_damaged=True)] == [2, 1]


def test_folders_from_before_tries_were_numbered(folder):
    shard = folder / "worldenv-train.tfrecord-00000-of-00001"
    features, records = RldsFolder(folder).example(0), [bytes(record) for record in TFRecordFile(shard)]
    features = {k: [bytes(x) for x in v] if isinstance(v, list) else v for k, v in features.items()}
    assert features.pop("episode_metadata/sample") == 2
    replace_records(shard, [serialize_example(features), *records[1:]])
    assert open_episodes(folder)[0].sample == 0


def test_other_names_need_a_mapping(reference):
    folder = reference / "1.0.0"
    features = (folder / "features.json").read_text().replace('"state"', '"robot"')
    (folder / "features.json").write_text(features)
    with pytest.raises(DataError, match=r"no feature 'observation/state'.*observation/robot.*mapping.json"):
        open_episodes(reference)
    for shard in folder.glob("*tfrecord*"):
        records = [bytes(r).replace(b"observation/state", b"observation/robot") for r in TFRecordFile(shard)]
        replace_records(shard, records)
    (folder / "mapping.json").write_text(json.dumps({"proprio": ["observation/robot"]}))
    assert open_episodes(reference)[0].proprio.shape == (21, 8)
    (folder / "mapping.json").write_text(json.dumps({"proprio": ["action"]}))
    with pytest.raises(DataError, match=r"proprio \['action'\] has 7 numbers, expected 8"):
        open_episodes(reference)
    (folder / "mapping.json").write_text(json.dumps({"state": "action"}))
    with pytest.raises(DataError, match="not a mapping file.*'state'"):
        open_episodes(reference)


def test_failed_writing_leaves_nothing(tmp_path):
    def episodes():
        yield EPISODES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_episodes(tmp_path / "a", episodes())
    assert list(tmp_path.iterdir()) == []


def test_refused_writing(tmp_path, folder):
    with pytest.raises(DataError, match="exists already"):
        write_episodes(folder, EPISODES)
    with pytest.raises(DataError, match="no episodes"):
        write_episodes(tmp_path / "b", [])
    with pytest.raises(DataError, match=r"episode 1 has images \[V, H, W\] \[1, 6, 8\], the first has \[2, 6, 8\]"):
        write_episodes(tmp_path / "b", [EPISODES[0], sample_episode(views=1)])
    with pytest.raises(DataError, match="episode 0 cannot be written.*actor"):
        write_episodes(tmp_path / "b", [sample_episode(actor="cat")])
    with pytest.raises(ValueError, match="'gif'"):
        write_episodes(tmp_path / "b", EPISODES, encoding="gif")


def test_not_a_dataset(tmp_path):
    with pytest.raises(DataError, match="not a dataset folder"):
        open_episodes(tmp_path)
    (tmp_path / "features.json").write_text("{}")
    with pytest.raises(DataError, match="dataset_info.json"):
        open_episodes(tmp_path)
