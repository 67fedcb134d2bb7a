# SPDX-License-Identifier: Apache-2.0
"""RLDS dataset folders, read and written without TensorFlow; TFDS reads what is written here.

A folder holds `features.json`, `dataset_info.json` and shards `<name>-<split>.<format>-00000-of-00002` (TFDS
4.9), one `tf.train.Example` per episode. A folder never changes once it is there: it is written beside its place,
flushed, and renamed. A dataset grows by further folders (`add_episodes` numbers them `0000`, `0001`, ...), and
`open_episodes` reads a folder of folders as one.
"""

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from worldenv_jax.data.array_record import ArrayRecordFile
from worldenv_jax.data.episodes import Episode, EpisodeSummary, summarize_episodes, validate_episode
from worldenv_jax.data.errors import DataError
from worldenv_jax.data.example_proto import Feature, parse_example, serialize_example
from worldenv_jax.data.image_codec import IMAGE_ENCODINGS
from worldenv_jax.data.rlds_schema import (
    decode_episode,
    decode_summary,
    encode_episode,
    episode_features,
    find_keys,
    summary_keys,
)
from worldenv_jax.data.tfds_metadata import (
    VERSIONS,
    Shard,
    read_dataset_info,
    read_feature_shapes,
    shard_name,
    version_folder,
    write_dataset_info,
)
from worldenv_jax.data.tfrecord import TFRecordFile, TFRecordWriter
from worldenv_jax.files import atomic_folder

_READERS = {"tfrecord": TFRecordFile, "array_record": ArrayRecordFile}
_SHARD_BYTES = 256 << 20


class RldsFolder(Sequence[Episode]):
    """The episodes of one dataset folder, in the order of splits, shards and records.

    Opening reads the framing of the shards only. An episode's numbers are parsed, checked and cached when it is
    first asked for; its images stay encoded (`EncodedFrames`) until they are indexed.

    Attributes:
        path: the folder that holds features.json.
        name: the dataset's name, from dataset_info.json.
        damage: what is wrong with the folder, one line per finding; empty where all is well.
    """

    def __init__(self, path: Path | str, skip_damaged: bool = False):
        """Opens a folder, or its newest version where it holds versions (`name/1.0.0/`).

        Args:
            path: the folder.
            skip_damaged: read every record now and leave out those that cannot be used, instead of raising.

        Raises:
            DataError: not a dataset; its features are neither ours nor described by a mapping file; or (unless
                `skip_damaged`) shards are missing, truncated or corrupt: file, offset, how many are good.
        """
        self.path = version_folder(Path(path))
        self.damage: list[str] = []
        self._skip_damaged = skip_damaged
        info = read_dataset_info(self.path)
        if info.file_format not in _READERS:
            raise DataError(self.path, f"file format {info.file_format!r}, expected one of {list(_READERS)}")
        self.name = info.name
        self._reader = _READERS[info.file_format]
        self._keys = find_keys(read_feature_shapes(self.path), self.path)
        self._load = functools.lru_cache(maxsize=self._reader.cached_episodes)(self._load_episode)
        self._records = [record for shard in info.shards for record in self._open_shard(shard)]
        if skip_damaged:
            self._drop_damaged()
        elif self.damage:
            total = sum(shard.num_records for shard in info.shards)
            raise DataError(
                self.path,
                f"{len(self)} of {total} episodes are good; open with skip_damaged=True to use them. "
                + "; ".join(self.damage),
            )

    def __reduce__(self):
        return RldsFolder, (self.path, self._skip_damaged)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Episode:
        """One episode, its images not decoded yet.

        Raises:
            DataError: its record is corrupt, or its contents do not make an episode.
        """
        return self._load(range(len(self))[index])

    def example(self, index: int) -> dict[str, Feature]:
        """All features of one record as they are on disk (see `parse_example`)."""
        _, file, record = self._records[index]
        with _damaged_record(file, record):
            return parse_example(file[record])

    @functools.cached_property
    def summaries(self) -> list[EpisodeSummary]:
        """One per episode; reads a few pages of every record and leaves the checksums for later.

        Raises:
            DataError: as `__getitem__`.
        """
        wanted, summaries = summary_keys(self._keys), []
        for split, file, record in self._records:
            with _damaged_record(file, record):
                example = parse_example(file.unverified(record), wanted)
                summaries.append(decode_summary(example, self._keys, split))
        return summaries

    def _load_episode(self, index: int) -> Episode:
        example = self.example(index)
        split, file, record = self._records[index]
        with _damaged_record(file, record):
            episode = decode_episode(example, self._keys, split, file.path)
            validate_episode(episode)
        return episode

    def _open_shard(self, shard: Shard) -> list[tuple[str, Sequence, int]]:
        try:
            file = self._reader(self.path / shard.file)
        except DataError as error:
            self.damage.append(str(error))
            return []
        if file.damage:
            self.damage.append(f"{file.path}: {file.damage}")
        elif len(file) != shard.num_records:
            self.damage.append(f"{file.path}: got {len(file)} records, dataset_info.json says {shard.num_records}")
        return [(shard.split, file, record) for record in range(len(file))]

    def _drop_damaged(self) -> None:
        good = []
        for index, record in enumerate(self._records):
            try:
                self._load_episode(index)
                good.append(record)
            except DataError as error:
                self.damage.append(str(error))
        self._records = good


@contextlib.contextmanager
def _damaged_record(file: TFRecordFile | ArrayRecordFile, record: int) -> Iterator[None]:
    """Names the record in whatever its contents make the block raise."""
    try:
        yield
    except DataError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(file.path, f"{file.where(record)}: not an episode: {error}") from error


class _Concatenation(Sequence[Episode]):
    """Several sequences as one."""

    def __init__(self, parts: Sequence[Sequence[Episode]]):
        self._parts = tuple(parts)
        self._starts = np.cumsum([0, *map(len, self._parts)])

    @functools.cached_property
    def summaries(self) -> list[EpisodeSummary]:
        """Those of the parts."""
        return [summary for part in self._parts for summary in summarize_episodes(part)]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Episode:
        index = range(len(self))[index]
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part][index - int(self._starts[part])]


def open_episodes(*paths: Path | str, skip_damaged: bool = False) -> Sequence[Episode]:
    """Opens datasets as one sequence of episodes.

    Args:
        *paths: dataset folders, or folders of dataset folders (read in the order of their names).
        skip_damaged: see `RldsFolder`.

    Returns:
        Episodes whose images are decoded where they are indexed; can be sent to worker processes.

    Raises:
        DataError: see `RldsFolder`.
    """
    folders = [folder for path in paths for folder in _dataset_folders(Path(path))]
    return _Concatenation([RldsFolder(folder, skip_damaged) for folder in folders])


def _dataset_folders(path: Path) -> list[Path]:
    try:
        return [version_folder(path)]
    except DataError:
        found = [version_folder(child) for child in sorted(path.glob("[!.]*")) if _is_dataset(child)]
        if not found:
            raise
        return found


def _is_dataset(path: Path) -> bool:
    return (path / "features.json").exists() or any(path.glob(f"{VERSIONS}/features.json"))


def add_episodes(root: Path | str, episodes: Iterable[Episode], encoding: str = "png") -> Path:
    """Adds episodes to a dataset that grows: writes the next numbered folder below `root`, atomically.

    Returns:
        The new folder. `open_episodes(root)` reads all of them.

    Raises:
        DataError: as `write_episodes`.
    """
    root = Path(root)
    taken = [int(child.name) for child in root.glob("[0-9]*") if child.name.isdigit()]
    return write_episodes(root / f"{max(taken, default=-1) + 1:04d}", episodes, encoding=encoding)


def write_episodes(
    folder: Path | str, episodes: Iterable[Episode], name: str = "worldenv", encoding: str = "png"
) -> Path:
    """Writes a new dataset folder that appears whole or not at all; one TFDS split per `Episode.split`.

    Args:
        folder: must not exist.
        episodes: consumed one by one; all with the same views and image size.
        name: the dataset's name for TFDS, lower case with underscores.
        encoding: "png" (lossless) or "jpeg" (quality 95).

    Returns:
        `folder`.

    Raises:
        DataError: the folder exists; there are no episodes; an episode is invalid or has other image sizes.
        WorldEnvError: the disk is full or cannot be written.
    """
    folder = Path(folder)
    if encoding not in IMAGE_ENCODINGS:
        raise ValueError(f"got encoding {encoding!r}, expected one of {IMAGE_ENCODINGS}")
    if folder.exists():
        raise DataError(folder, "exists already; datasets are never overwritten, choose another folder")
    with atomic_folder(folder) as temporary:
        _write_folder(temporary, folder, episodes, name, encoding)
    return folder


def _image_sizes(episode: Episode) -> dict[str, list[int] | None]:
    """Of the frames and of the photographs, if there are any."""
    photographs = None if episode.photographs is None else list(episode.photographs.shape[1:3])
    return {"images [V, H, W]": list(episode.images.shape[1:4]), "photographs [H, W]": photographs}


def _write_folder(temporary: Path, folder: Path, episodes: Iterable[Episode], name: str, encoding: str) -> None:
    shards: dict[str, list[TFRecordWriter]] = {}
    sizes: dict[str, list[int] | None] | None = None
    for number, episode in enumerate(episodes):
        try:
            validate_episode(episode)
        except ValueError as error:
            raise DataError(folder, f"episode {number} cannot be written: {error}") from error
        if sizes is None:
            sizes = _image_sizes(episode)
            (views, *image), photographs = sizes.values()
            episode_features(views, tuple(image), encoding, photographs).save_config(os.fspath(temporary))
        for kind, size in _image_sizes(episode).items():
            if size != sizes[kind]:
                raise DataError(folder, f"episode {number} has {kind} {size}, the first has {sizes[kind]}")
        writers = shards.setdefault(episode.split, [])
        if not writers or writers[-1].num_bytes >= _SHARD_BYTES:
            writers.append(TFRecordWriter(temporary / f"{episode.split}-{len(writers)}"))
        writers[-1].write(serialize_example(encode_episode(episode, encoding)))
    if sizes is None:
        raise DataError(folder, "there are no episodes to write")
    for split, writers in shards.items():
        for number, writer in enumerate(writers):
            writer.close()
            writer.path.rename(temporary / shard_name(name, split, "tfrecord", number, len(writers)))
    splits = {
        split: (sum(writer.num_bytes for writer in writers), [writer.num_records for writer in writers])
        for split, writers in shards.items()
    }
    write_dataset_info(temporary, name, splits)
