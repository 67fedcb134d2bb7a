# SPDX-License-Identifier: Apache-2.0
"""The two JSON files of a TFDS 4.9 dataset folder: dataset_info.json and features.json."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from worldenv_jax.data.errors import DataError
from worldenv_jax.files import write_json

VERSION = "1.0.0"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


class Shard(NamedTuple):
    """One file of a dataset."""

    split: str
    file: str
    num_records: int


class DatasetInfo(NamedTuple):
    """What dataset_info.json says."""

    name: str
    file_format: str  # "tfrecord" | "array_record"
    shards: tuple[Shard, ...]


VERSIONS = "[0-9]*.[0-9]*.[0-9]*"  # of a dataset; not what a killed writer has left behind under a hidden name


def version_folder(path: Path) -> Path:
    """The folder with features.json: `path` itself, or its newest version (`path/1.0.0`).

    Raises:
        DataError: there is none.
    """
    if (path / "features.json").exists():
        return path
    versions = [child for child in path.glob(VERSIONS) if (child / "features.json").exists()]
    if not versions:
        raise DataError(path, "not a dataset folder: no features.json in it or in a version folder below it")
    return max(versions, key=lambda child: [int(part) for part in child.name.split(".") if part.isdigit()])


def shard_name(name: str, split: str, file_format: str, number: int, count: int) -> str:
    """The file name of a shard; the dataset's name can differ from its folder (`LIBERO10` → `liber_o10`)."""
    return f"{name}-{split}.{file_format}-{number:05d}-of-{count:05d}"


def read_dataset_info(folder: Path) -> DatasetInfo:
    """Reads dataset_info.json.

    Raises:
        DataError: it is missing, has another layout, or lists no shards.
    """
    path = folder / "dataset_info.json"
    info = _read_json(path)
    try:
        name, file_format, shards = str(info["name"]), str(info["fileFormat"]), []
        for split in info["splits"]:
            lengths = [int(length) for length in split["shardLengths"]]
            for number, length in enumerate(lengths):
                file = shard_name(name, split["name"], file_format, number, len(lengths))
                shards.append(Shard(str(split["name"]), file, length))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(path, f"not TFDS's dataset_info.json: {error!r}") from error
    if not shards:
        raise DataError(path, "lists no shards: no episode can be read")
    return DatasetInfo(name, file_format, tuple(shards))


def write_dataset_info(folder: Path, name: str, splits: Mapping[str, tuple[int, list[int]]]) -> None:
    """Writes dataset_info.json of a TFRecord dataset; `splits` maps a split to (bytes, records per shard)."""
    entries = [
        {
            "filepathTemplate": _TEMPLATE,
            "name": split,
            "numBytes": str(num_bytes),
            "shardLengths": [str(length) for length in lengths],
        }
        for split, (num_bytes, lengths) in splits.items()
    ]
    info = {"fileFormat": "tfrecord", "moduleName": "worldenv_jax.data.rlds", "name": name, "splits": entries}
    write_json(folder / "dataset_info.json", {**info, "version": VERSION})


def read_feature_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every feature in features.json by its key on disk, e.g. "steps/action": (7,).

    Raises:
        DataError: features.json has another layout.
    """
    path = folder / "features.json"
    try:
        return dict(_flatten(_read_json(path), ""))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(path, f"not TFDS's features.json: {error!r}") from error


def _flatten(feature: dict, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    if "featuresDict" in feature:
        for name, child in feature["featuresDict"]["features"].items():
            yield from _flatten(child, f"{prefix}/{name}" if prefix else name)
    elif "sequence" in feature:
        yield from _flatten(feature["sequence"]["feature"], prefix)
    else:
        leaf = feature.get("tensor") or feature.get("image") or {}
        yield prefix, tuple(int(size) for size in leaf.get("shape", {}).get("dimensions", ()))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(path, f"cannot be read: {error}") from error
