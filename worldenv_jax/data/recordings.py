# SPDX-License-Identifier: Apache-2.0
"""Recordings of one's own robot: videos or image folders, and a CSV file, as episodes.

Layout::

    steps.csv                    a header and one row per frame, see COLUMNS
    <episode>.mp4                the frames of an episode: a video ...
    <episode>/*.png|*.jpg        ... or images, in the order of their names
    <episode>/<camera>.mp4       several cameras: a video each, or a folder of images each
    cameras.json                 optional: {camera or "camera": {"intrinsics": 3 x 3, "pose": 4 x 4}}

A row holds the state at its frame and the action that followed it; the last frame is repeated after the last action.
Frames are cut to the square in their middle and resized.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from worldenv_jax.data.episodes import Episode, validate_episode
from worldenv_jax.data.errors import DataError
from worldenv_jax.data.video import iterate_video

PROPRIO = ("x", "y", "z", "rx", "ry", "rz", "finger_1", "finger_2")  # m, axis-angle in rad, finger positions in m
ACTION = ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")  # commands in [-1, 1]; gripper -1 = open, +1 = close
COLUMNS = ("episode", "instruction", *PROPRIO, *ACTION)
# And, where wanted: `success` (0 or 1 at every frame; without it an episode succeeds at its end), `kind`.
KINDS = ("demonstration", "exploration")  # what the policy is cloned from, and what only simulator and reflector see
_VIDEOS, _IMAGES = (".mp4", ".avi", ".mov", ".mkv", ".webm"), (".png", ".jpg", ".jpeg")
# Where no camera is given: at the robot's base, looking along its z, 90 degrees wide. Maps drawn with it still tell
# where the hand moves, but do not lie on the picture.
_UNKNOWN_POSE = np.eye(4, dtype=np.float32)


def read_recordings(folder: Path | str, image_size: int, photograph_size: int = 0) -> Iterator[tuple[str, Episode]]:
    """Reads a folder of recordings.

    Args:
        folder: see the head of this file.
        image_size: width and height of the episodes' frames in pixels.
        photograph_size: those of the photographs, which are the first frames; 0: none.

    Yields:
        (kind, episode), in the order of the CSV file; tasks are the different instructions in their order there.

    Raises:
        DataError: columns are missing; a cell is not a number or an action is outside [-1, 1] (says in which line);
            an episode's frames are missing or not as many as its rows; episodes differ in their cameras.
    """
    folder = Path(folder)
    episodes = _read_rows(folder / "steps.csv")
    tasks = list(dict.fromkeys(rows[0]["instruction"] for rows in episodes.values()))
    known_cameras = _read_cameras(folder / "cameras.json")
    expected: list[str] | None = None
    for number, (name, rows) in enumerate(episodes.items()):
        sources = _find_frames(folder, name)
        expected = expected or list(sources)
        if list(sources) != expected:
            raise DataError(folder, f"episode {name!r} has the cameras {list(sources)}, earlier ones have {expected}")
        views, photographs, cameras = [], [], []
        for camera, source in sources.items():
            frames, photograph, size = _read_frames(source, image_size, photograph_size)
            if len(frames) != len(rows):
                raise DataError(source, f"has {len(frames)} frames, steps.csv has {len(rows)} rows of {name!r}")
            views.append(np.concatenate([frames, frames[-1:]]))
            photographs.append(photograph)
            cameras.append(_square_camera(known_cameras.get(camera), size, image_size))
        kind = rows[0].get("kind") or KINDS[0]
        episode = _make_episode(rows, np.stack(views, axis=1), cameras, tasks, number)
        yield kind, replace(episode, photographs=np.stack(photographs)) if photograph_size else episode


def _make_episode(
    rows: Sequence[Mapping[str, Any]], images: np.ndarray, cameras: Sequence, tasks: Sequence[str], number: int
) -> Episode:
    steps = len(rows)
    proprio = np.array([[row[name] for name in PROPRIO] for row in rows], np.float32)
    success = [bool(row.get("success", 0.0)) for row in rows]
    intrinsics, pose = (np.stack(leaves) for leaves in zip(*cameras))
    episode = Episode(
        images=images,
        proprio=np.concatenate([proprio, proprio[-1:]]),
        actions=np.array([[row[name] for name in ACTION] for row in rows], np.float32),
        success=np.array([*success, success[-1] if "success" in rows[0] else True]),
        intrinsics=np.repeat(intrinsics[None], steps + 1, axis=0),
        camera_pose=np.repeat(pose[None], steps + 1, axis=0),
        instruction=rows[0]["instruction"],
        task=tasks.index(rows[0]["instruction"]),
        seed=number,
        split="train",
        starts="official",
        actor="human",
    )
    validate_episode(episode)
    return episode


def _read_rows(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Episode -> its rows, numbers as floats."""
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            table = csv.DictReader(stream)
            missing = [name for name in COLUMNS if name not in (table.fieldnames or ())]
            if missing:
                raise DataError(file, f"has no columns {missing}; it has {table.fieldnames}")
            episodes: dict[str, list[dict[str, Any]]] = {}
            for row in table:
                episodes.setdefault(row["episode"], []).append(_numbers(row, file, table.line_num))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(file, f"cannot be read: {error}") from error
    if not episodes:
        raise DataError(file, "has no rows")
    return episodes


def _numbers(row: Mapping[str, str], file: Path, line: int) -> dict[str, Any]:
    result: dict[str, Any] = dict(row)
    for name in (*PROPRIO, *ACTION, *(["success"] if "success" in row else [])):
        try:
            result[name] = float(row[name])
        except (TypeError, ValueError) as error:
            raise DataError(file, f"line {line}, column {name}: {row[name]!r} is not a number") from error
        limit = 1.0 if name in ACTION else np.finfo(np.float32).max
        if not abs(result[name]) <= limit:
            raise DataError(file, f"line {line}, column {name}: got {row[name]}, expected at most {limit:g} either way")
    if row.get("kind") not in (None, "", *KINDS):
        raise DataError(file, f"line {line}, column kind: got {row['kind']!r}, expected one of {KINDS}")
    return result


def _find_frames(folder: Path, name: str) -> dict[str, Path]:
    """Camera -> video file or folder of images; "camera" where an episode has a single one without a name."""
    videos = [path for suffix in _VIDEOS if (path := folder / f"{name}{suffix}").is_file()]
    if videos:
        return {"camera": videos[0]}
    inside = sorted((folder / name).iterdir()) if (folder / name).is_dir() else []
    if any(path.suffix.lower() in _IMAGES for path in inside):
        return {"camera": folder / name}
    cameras = {path.stem: path for path in inside if path.is_dir() or path.suffix.lower() in _VIDEOS}
    if not cameras:
        raise DataError(folder / name, "no frames: expected a video, a folder of images, or one of these per camera")
    return cameras


def _read_frames(source: Path, image_size: int, photograph_size: int) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Square frames uint8 [T, image_size, image_size, 3], the first as photograph, (height, width) of recorded ones."""
    try:
        if source.is_dir():
            files = sorted(path for path in source.iterdir() if path.suffix.lower() in _IMAGES)
            pictures = (np.asarray(Image.open(path).convert("RGB")) for path in files)
        else:
            pictures = iterate_video(source)
        frames, size, photograph = [], (0, 0), np.zeros((0, 0, 3), np.uint8)
        for picture in pictures:
            size = picture.shape[:2]
            if photograph_size and not frames:
                photograph = _cut(picture, photograph_size)
            frames.append(_cut(picture, image_size))
    except OSError as error:
        raise DataError(source, f"cannot be read: {error}") from error
    if not frames:
        raise DataError(source, "has no frames")
    return np.stack(frames), photograph, size


def _cut(picture: np.ndarray, size: int) -> np.ndarray:
    """The square in the middle, resized."""
    top, left, side = _square(picture.shape[:2])
    cut = Image.fromarray(picture[top : top + side, left : left + side])
    return np.asarray(cut.resize((size, size), Image.Resampling.LANCZOS))


def _square(size: tuple[int, int]) -> tuple[int, int, int]:
    """Top, left and side of the square in the middle."""
    side = min(size)
    return (size[0] - side) // 2, (size[1] - side) // 2, side


def _read_cameras(file: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    if not file.exists():
        return {}
    try:
        entries = json.loads(file.read_text())
        return {
            name: (
                np.array(entry["intrinsics"], np.float32).reshape(3, 3),
                np.array(entry["pose"], np.float32).reshape(4, 4),
            )
            for name, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(file, f'expected {{camera: {{"intrinsics": 3 x 3, "pose": 4 x 4}}}}: {error}') from error


def _square_camera(
    camera: tuple[np.ndarray, np.ndarray] | None, size: tuple[int, int], image_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Intrinsics of the cut and resized picture, and the pose."""
    if camera is None:
        half = image_size / 2
        return np.array([[half, 0, half], [0, half, half], [0, 0, 1]], np.float32), _UNKNOWN_POSE
    top, left, side = _square(size)
    intrinsics = camera[0].copy()
    intrinsics[:2, 2] -= (left, top)
    intrinsics[:2] *= image_size / side
    return intrinsics, camera[1]
