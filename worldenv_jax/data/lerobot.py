# SPDX-License-Identifier: Apache-2.0
"""LeRobot datasets (Hugging Face, codebase versions 2.0 to 3.0) as episodes.

Version 2: `data/chunk-000/episode_000000.parquet` and one video per camera and episode. Version 3: many episodes per
parquet file and video; `meta/episodes` says where each one lies. Frames are videos, or encoded images inside the
parquet file. Needs the extra `lerobot`. To sample from a large dataset, convert it once:
`write_episodes(folder, read_lerobot(path))`.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldenv_jax.data.episodes import Episode, validate_episode
from worldenv_jax.data.errors import DataError
from worldenv_jax.data.image_codec import EncodedFrames
from worldenv_jax.data.video import read_video

_NAMES = {"proprio": ("observation.state", "state"), "action": ("action", "actions")}


def read_lerobot(path: Path | str, names: Mapping[str, Any] | None = None, split: str = "train") -> Iterator[Episode]:
    """Reads the episodes of a dataset folder in their order.

    A recording of T rows has T frames, each before its action; the last frame is repeated after the last action. A
    demonstration counts as solved at its end, unless a column `next.success` says otherwise.

    Args:
        path: the folder that holds `meta` and `data`.
        names: {"images": [...], "proprio": ..., "action": ...} where the features are not called
            observation.state (or state) and action (or actions); images default to all cameras in their order.
        split: of the episodes.

    Raises:
        DataError: not such a dataset; features are missing or have other sizes; an episode is damaged (earlier ones
            have been yielded).
    """
    path = Path(path)
    info = _read_info(path)
    columns = _find_features(info["features"], names or {}, path)
    for row in _episode_rows(path, info):
        number = int(row["episode_index"])
        try:
            episode = _read_episode(path, info, columns, row, split)
            validate_episode(episode)
        except DataError:
            raise
        except (OSError, KeyError, ValueError, IndexError, TypeError) as error:
            raise DataError(path, f"episode {number}: {error}") from error
        yield episode


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads((path / "meta" / "info.json").read_text())
        if not str(info["codebase_version"]).startswith(("v2", "v3")):
            raise ValueError(f"codebase_version {info['codebase_version']}, expected v2 or v3")
        missing = [key for key in ("features", "fps", "data_path", "chunks_size") if key not in info]
        if missing:
            raise ValueError(f"no {missing}")
        return info
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(path, f"not a LeRobot dataset: meta/info.json: {error}") from error


def _find_features(features: Mapping[str, Any], names: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """{"images": [feature, ...], "proprio": feature, "action": feature}."""
    cameras = [name for name, feature in features.items() if feature["dtype"] in ("image", "video")]
    found = {"images": list(names.get("images", cameras))}
    for part, candidates in _NAMES.items():
        found[part] = names.get(part) or next((name for name in candidates if name in features), candidates[0])
    missing = [name for name in (*found["images"], found["proprio"], found["action"]) if name not in features]
    if missing or not found["images"]:
        raise DataError(
            path, f"no features {missing or 'with images'}; it has {sorted(features)}; pass names={found} with its own"
        )
    return found


def _episode_rows(path: Path, info: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the dataset says about each episode: its number, tasks and (version 3) places."""
    if info["codebase_version"].startswith("v2"):
        try:
            lines = (path / "meta" / "episodes.jsonl").read_text().splitlines()
            yield from sorted(map(json.loads, lines), key=lambda row: row["episode_index"])
        except (OSError, ValueError, KeyError) as error:
            raise DataError(path / "meta" / "episodes.jsonl", f"cannot be read: {error}") from error
    else:
        for file in sorted((path / "meta" / "episodes").rglob("*.parquet")):
            yield from _read_parquet(file)


def _read_episode(
    path: Path, info: Mapping[str, Any], columns: Mapping[str, Any], row: Mapping[str, Any], split: str
) -> Episode:
    number = int(row["episode_index"])
    rows = [r for r in _read_parquet(path / _data_file(info, row)) if r["episode_index"] == number]
    rows.sort(key=lambda r: r["frame_index"])
    steps = len(rows)
    if not steps:
        raise ValueError("no rows in the data file")
    proprio = np.array([r[columns["proprio"]] for r in rows], np.float32)
    solved = [bool(np.ravel(r.get("next.success", t == steps - 1))[0]) for t, r in enumerate(rows)]
    images = _read_frames(path, info, columns["images"], row, rows)
    views = images.shape[1]
    return Episode(
        images=images,
        proprio=np.concatenate([proprio, proprio[-1:]]),
        actions=np.array([r[columns["action"]] for r in rows], np.float32),
        success=np.array([False, *solved]),
        intrinsics=np.zeros((steps + 1, views, 3, 3), np.float32),
        camera_pose=np.zeros((steps + 1, views, 4, 4), np.float32),
        instruction=str(row["tasks"][0]),
        task=int(rows[0].get("task_index", -1)),
        seed=-1,
        split=split,
        starts="official",
        actor="human",
    )


def _read_frames(
    path: Path, info: Mapping[str, Any], cameras: list[str], row: Mapping[str, Any], rows: list[dict]
) -> np.ndarray | EncodedFrames:
    """The T + 1 frames of all cameras, uint8 [T+1, V, H, W, 3]."""
    if all(info["features"][camera]["dtype"] == "image" for camera in cameras):
        views = [[r[camera]["bytes"] for r in rows] for camera in cameras]
        return EncodedFrames([[*view, view[-1]] for view in views], path)
    views = [read_video(path / _video_file(info, row, c), _first_frame(info, row, c), len(rows)) for c in cameras]
    images = np.stack(views, axis=1)
    return np.concatenate([images, images[-1:]])


def _data_file(info: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    number = int(row["episode_index"])
    return info["data_path"].format(
        episode_chunk=number // int(info["chunks_size"]),
        episode_index=number,
        chunk_index=int(row.get("data/chunk_index", 0)),
        file_index=int(row.get("data/file_index", 0)),
    )


def _video_file(info: Mapping[str, Any], row: Mapping[str, Any], camera: str) -> str:
    number = int(row["episode_index"])
    return info["video_path"].format(
        video_key=camera,
        episode_chunk=number // int(info["chunks_size"]),
        episode_index=number,
        chunk_index=int(row.get(f"videos/{camera}/chunk_index", 0)),
        file_index=int(row.get(f"videos/{camera}/file_index", 0)),
    )


def _first_frame(info: Mapping[str, Any], row: Mapping[str, Any], camera: str) -> int:
    return round(row.get(f"videos/{camera}/from_timestamp", 0.0) * info["fps"])


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(file, 'LeRobot datasets need the extra: pip install "worldenv-jax[lerobot]"') from error
    try:
        return parquet.read_table(file).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(file, f"cannot be read: {error}") from error
