# SPDX-License-Identifier: Apache-2.0
"""LeRobot folders, laid out here by hand as versions 2.1 and 3.0 describe them."""

import json
import sys

import numpy as np
import pytest

from worldenv_jax.data.errors import DataError
from worldenv_jax.data.image_codec import encode_image
from worldenv_jax.data.lerobot import read_lerobot

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

LENGTHS = [3, 2]
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 32, 48, 3), np.uint8)
STATES = RNG.normal(size=(5, 8)).astype(np.float32)
ACTIONS = RNG.uniform(-1, 1, (5, 7)).astype(np.float32)
CAMERA = "observation.images.front"


def rows(with_images):
    for i, (episode, frame) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        row = {"episode_index": episode, "frame_index": frame, "task_index": episode, "action": ACTIONS[i].tolist()}
        row["observation.state"] = STATES[i].tolist()
        if with_images:
            row[CAMERA] = {"bytes": encode_image(IMAGES[i], "png"), "path": None}
        yield row


def write_table(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(list(content)), path)


def write_info(path, version, dtype, **paths):
    features = {
        CAMERA: {"dtype": dtype, "shape": [32, 48, 3]},
        "observation.state": {"dtype": "float32", "shape": [8]},
        "action": {"dtype": "float32", "shape": [7]},
    }
    info = {"codebase_version": version, "fps": 20, "chunks_size": 1000, "features": features, **paths}
    (path / "meta").mkdir(parents=True)
    (path / "meta" / "info.json").write_text(json.dumps(info))


@pytest.fixture
def version_2(tmp_path):
    """Images inside the parquet files."""
    template = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    write_info(tmp_path, "v2.1", "image", data_path=template, video_path=None)
    for number in range(2):
        file = tmp_path / template.format(episode_chunk=0, episode_index=number)
        write_table(file, [row for row in rows(True) if row["episode_index"] == number])
    lines = [{"episode_index": n, "tasks": [f"task {n}"], "length": LENGTHS[n]} for n in (1, 0)]
    (tmp_path / "meta" / "episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


@pytest.fixture
def version_3(tmp_path):
    """Both episodes in one parquet file and one video."""
    imageio = pytest.importorskip("imageio.v3")
    pytest.importorskip("imageio_ffmpeg")
    videos = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    data = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    write_info(tmp_path, "v3.0", "video", data_path=data, video_path=videos)
    write_table(tmp_path / data.format(chunk_index=0, file_index=4), rows(False))
    episodes = [
        {
            "episode_index": number,
            "tasks": [f"task {number}"],
            "data/chunk_index": 0,
            "data/file_index": 4,
            f"videos/{CAMERA}/chunk_index": 0,
            f"videos/{CAMERA}/file_index": 2,
            f"videos/{CAMERA}/from_timestamp": [0.0, 3 / 20][number],
        }
        for number in range(2)
    ]
    write_table(tmp_path / "meta/episodes/chunk-000/file-000.parquet", episodes)
    video = tmp_path / videos.format(video_key=CAMERA, chunk_index=0, file_index=2)
    video.parent.mkdir(parents=True)
    flat = np.broadcast_to(np.arange(20, 220, 40, dtype=np.uint8)[:, None, None, None], (5, 32, 48, 3))
    imageio.imwrite(video, flat, plugin="FFMPEG", fps=20, macro_block_size=16)
    return tmp_path


def test_version_2_with_images(version_2):
    first, second = read_lerobot(version_2)
    np.testing.assert_array_equal(np.asarray(first.images)[:, 0], IMAGES[[0, 1, 2, 2]])
    np.testing.assert_array_equal(np.asarray(second.images)[:, 0], IMAGES[[3, 4, 4]])
    np.testing.assert_array_equal(second.proprio, STATES[[3, 4, 4]])
    np.testing.assert_array_equal(second.actions, ACTIONS[3:])
    np.testing.assert_array_equal(second.success, [False, False, True])
    assert [(e.instruction, e.task) for e in (first, second)] == [("task 0", 0), ("task 1", 1)]


def test_version_3_with_videos(version_3):
    """Frames are of one colour each: 20, 60, 100 | 140, 180, as far as the codec keeps them."""
    first, second = read_lerobot(version_3)
    assert first.images.shape == (4, 1, 32, 48, 3)
    means = [episode.images.mean(axis=(1, 2, 3, 4)) for episode in (first, second)]
    np.testing.assert_allclose(means[0], [20, 60, 100, 100], atol=4)
    np.testing.assert_allclose(means[1], [140, 180, 180], atol=4)
    np.testing.assert_array_equal(second.actions, ACTIONS[3:])


def test_other_names(version_2):
    info = (version_2 / "meta" / "info.json").read_text().replace("observation.state", "joints")
    (version_2 / "meta" / "info.json").write_text(info)
    with pytest.raises(DataError, match=r"no features \['observation.state'\]; it has .*'joints'"):
        next(read_lerobot(version_2))
    with pytest.raises(DataError, match=r"proprio: got float32 \[4, 7\]"):
        next(read_lerobot(version_2, {"proprio": "action"}))


def test_damaged_episode_is_named(version_2):
    file = next(version_2.rglob("episode_000001.parquet"))
    file.write_bytes(file.read_bytes()[:50])
    episodes = read_lerobot(version_2)
    assert next(episodes).num_steps == 3
    with pytest.raises(DataError, match="episode_000001.parquet: cannot be read"):
        next(episodes)


def test_other_folders(tmp_path):
    with pytest.raises(DataError, match="not a LeRobot dataset"):
        next(read_lerobot(tmp_path))
    write_info(tmp_path, "v1.6", "image", data_path="")
    with pytest.raises(DataError, match="codebase_version v1.6"):
        next(read_lerobot(tmp_path))


def test_a_missing_extra_is_named(version_2, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"worldenv-jax\[lerobot\]"):
        next(read_lerobot(version_2))
