# SPDX-License-Identifier: Apache-2.0
"""Recordings written here by hand (CSV by string formatting, pictures by Pillow), read back and trained on."""

import json

import numpy as np
import pytest
from PIL import Image

from tools import import_recordings
from worldenv_jax.data.errors import DataError
from worldenv_jax.data.recordings import read_recordings
from worldenv_jax.data.rlds import open_episodes
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.training import pipeline

HEADER = "episode,instruction,kind,x,y,z,rx,ry,rz,finger_1,finger_2,dx,dy,dz,drx,dry,drz,gripper,success"
LENGTH = 12


def picture(number, t):
    """40 x 60, grey rises with the time; the left and right ten columns are red and must be cut off."""
    image = np.full((40, 60, 3), 10 * number + t, np.uint8)
    image[:, :10] = image[:, 50:] = (255, 0, 0)
    return image


def row(number, t, **changes):
    values = {name: round(0.001 * (t + 1) * (i + 1), 6) for i, name in enumerate(HEADER.split(",")[3:11])}
    values |= {name: round(0.01 * (number + i + t) - 0.1, 6) for i, name in enumerate(HEADER.split(",")[11:17])}
    words = ["push it", "lift it"][number % 2]
    values |= {"episode": f"take_{number}", "instruction": words, "kind": "", "gripper": -1}
    values |= {"success": int(t == LENGTH - 1 and number != 4)} | changes
    return ",".join(str(values[name]) for name in HEADER.split(","))


def write_folder(folder, episodes=6, video=False, **changes):
    """Episodes 0 to 3 are demonstrations, 4 a failed and 5 a successful exploration."""
    folder.mkdir(exist_ok=True)
    kind = lambda number: "exploration" if number > 3 else "demonstration"
    lines = [row(n, t, **({"kind": kind(n)} | changes)) for n in range(episodes) for t in range(LENGTH)]
    (folder / "steps.csv").write_text("\n".join([HEADER, *lines]))
    for number in range(episodes):
        pictures = [picture(number, t) for t in range(LENGTH)]
        if video:
            imageio = pytest.importorskip("imageio.v3")
            pytest.importorskip("imageio_ffmpeg")
            imageio.imwrite(folder / f"take_{number}.mp4", np.stack(pictures), fps=10, macro_block_size=1)
            continue
        (folder / f"take_{number}").mkdir()
        for t, image in enumerate(pictures):
            Image.fromarray(image).save(folder / f"take_{number}" / f"{t:06d}.png")
    return folder


def test_every_number_and_picture_comes_back(tmp_path):
    read = list(read_recordings(write_folder(tmp_path / "robot"), image_size=20))
    assert [kind for kind, _ in read] == ["demonstration"] * 4 + ["exploration"] * 2
    for number, (_, episode) in enumerate(read):
        cells = [row(number, t).split(",") for t in range(LENGTH)]
        np.testing.assert_array_equal(episode.proprio[:LENGTH], np.array([c[3:11] for c in cells]).astype(np.float32))
        np.testing.assert_array_equal(episode.actions, np.array([c[11:18] for c in cells]).astype(np.float32))
        grey = [10 * number + min(t, LENGTH - 1) for t in range(LENGTH + 1)]
        assert episode.images.shape[1:] == (1, 20, 20, 3)
        assert (episode.images == np.reshape(grey, (-1, 1, 1, 1, 1))).all()
        assert episode.instruction == ["push it", "lift it"][number % 2] and episode.task == number % 2
        assert episode.succeeded == (number != 4)


def test_photographs_are_the_first_frames_and_cut_as_they_are(tmp_path):
    for number, (_, episode) in enumerate(read_recordings(write_folder(tmp_path / "robot"), 20, photograph_size=32)):
        assert episode.photographs.shape == (1, 32, 32, 3) and (episode.photographs == 10 * number).all()
        assert episode.images.shape[1:] == (1, 20, 20, 3)


def test_videos_are_read_as_the_pictures_they_were_made_of(tmp_path):
    for _, episode in read_recordings(write_folder(tmp_path / "robot", 1, video=True), image_size=20):
        grey = [min(t, LENGTH - 1) for t in range(LENGTH + 1)]
        assert np.abs(episode.images[:, 0, 5:-5, 5:-5].astype(int).mean((1, 2, 3)) - grey).max() < 3  # lossy


def test_cameras_follow_the_cut_and_the_resize(tmp_path):
    folder = write_folder(tmp_path / "robot", 1)
    pose = np.arange(16).reshape(4, 4)
    camera = {"intrinsics": [[80, 0, 30], [0, 80, 20], [0, 0, 1]], "pose": pose.tolist()}
    (folder / "cameras.json").write_text(json.dumps({"camera": camera}))
    ((_, episode),) = read_recordings(folder, image_size=20)
    # The picture's centre stays the centre: (30, 20) of 60 x 40 is (10, 10) of 20 x 20; everything is half as large.
    np.testing.assert_array_equal(episode.intrinsics[3, 0], [[40, 0, 10], [0, 40, 10], [0, 0, 1]])
    np.testing.assert_array_equal(episode.camera_pose[3, 0], pose)


def test_two_cameras_are_two_views(tmp_path):
    folder = write_folder(tmp_path / "robot", 1)
    for name in ("wrist", "front"):
        (folder / "take_0" / name).mkdir()
    for file in sorted((folder / "take_0").glob("*.png")):
        picture = np.asarray(Image.open(file))
        Image.fromarray(255 - picture).save(folder / "take_0" / "wrist" / file.name)
        file.rename(folder / "take_0" / "front" / file.name)
    ((_, episode),) = read_recordings(folder, image_size=20)
    np.testing.assert_array_equal(episode.images[:, 0], 255 - episode.images[:, 1])
    assert episode.images[5, 0].max() == 5  # front first: in alphabetical order


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"dx": 1.5}, "line 2, column dx: got 1.5, expected at most 1 either way"),
        ({"x": "nan"}, "line 2, column x: got nan"),
        ({"ry": "abc"}, "line 2, column ry: 'abc' is not a number"),
        ({"kind": "demo"}, "line 2, column kind: got 'demo'"),
    ],
)
def test_bad_cells_are_named(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        list(read_recordings(write_folder(tmp_path / "robot", 1, **changes), 20))


def test_missing_parts_are_named(tmp_path):
    folder = write_folder(tmp_path / "robot", 2)
    (folder / "take_1" / "000003.png").unlink()
    with pytest.raises(DataError, match="take_1: has 11 frames, steps.csv has 12 rows"):
        list(read_recordings(folder, 20))
    (folder / "steps.csv").write_text("episode,x\n")
    with pytest.raises(DataError, match="has no columns .*'instruction'"):
        list(read_recordings(folder, 20))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_recordings(tmp_path, 20))


@pytest.mark.slow
def test_from_a_folder_to_trained_models(tmp_path):
    """Import, clone, train the simulator: the stages of any other run, for two steps each."""
    folder, workdir = write_folder(tmp_path / "robot"), tmp_path / "run"
    settings = ["environment.name=recorded", "cloning.steps=2", "scale_head.steps=1", "autoencoder.steps=1"]
    settings += ["denoiser.steps=1"]
    arguments = ["--config=debug", f"--workdir={workdir}", *(f"--set={s}" for s in settings)]
    import_recordings.main([f"--folder={folder}", *arguments])
    assert len(open_episodes(workdir / "data" / "demonstrations")) == 4
    config = import_recordings.apply_overrides(import_recordings.get_config("debug"), settings)
    run = pipeline.Run(config, workdir)
    pipeline.start(run)
    pipeline.clone_policy(run)
    pipeline.train_simulator(run)
    losses = [json.loads(line) for line in (workdir / "metrics" / "denoiser.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in losses)
    assert run.instructions == ("push it", "lift it")
    with pytest.raises(WorldEnvError, match="no world to act in"):
        pipeline.evaluate(run, "before")
    with pytest.raises(WorldEnvError, match="exists already"):
        import_recordings.main([f"--folder={folder}", *arguments])


def test_a_config_with_a_world_is_refused(tmp_path):
    with pytest.raises(WorldEnvError, match="environment.name=recorded"):
        import_recordings.main([f"--folder={tmp_path}", f"--workdir={tmp_path / 'run'}", "--config=debug"])
