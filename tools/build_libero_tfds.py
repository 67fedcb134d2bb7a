# SPDX-License-Identifier: Apache-2.0
"""Builds a TFDS dataset (array_record, random access) from collected episodes or LIBERO HDF5 demonstrations.

    python tools/build_libero_tfds.py --source=demos/libero_object --data_dir=tfds

`--source` is a folder written by `worldenv_jax.data.rlds`, a folder of such folders, or a folder of .hdf5 files (one
per task; the task's number is the file's place in alphabetical order). Afterwards
`tfds.builder_from_directory("tfds/libero_episodes/1.0.0").as_data_source("train")` reads it, and so does
`worldenv_jax.data.rlds.open_episodes`. No TensorFlow is needed; with TensorFlow installed,
`--file_format=tfrecord` works too.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import app, flags

from worldenv_jax.data.episodes import Episode, SelectedEpisodes, summarize_episodes
from worldenv_jax.data.hdf5 import read_demonstrations
from worldenv_jax.data.image_codec import IMAGE_ENCODINGS
from worldenv_jax.data.rlds import open_episodes
from worldenv_jax.data.rlds_schema import encode_episode, episode_features
from worldenv_jax.errors import run_main

_SOURCE = flags.DEFINE_string("source", None, "Folder of episodes or of .hdf5 files.", required=True)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS puts its datasets.", required=True)
_FORMAT = flags.DEFINE_enum("file_format", "array_record", ["array_record", "tfrecord"], "Format of the shards.")
_ENCODING = flags.DEFINE_enum("encoding", "jpeg", IMAGE_ENCODINGS, "Of the images.")


class LiberoEpisodes(tfds.core.GeneratorBasedBuilder):
    """The schema of `worldenv_jax.data.rlds_schema`, one example per episode."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # TFDS would look beside this file for checksums of downloads

    def __init__(self, source: str, encoding: str, **kwargs: Any):
        """Reads `source`; images are stored as "jpeg" or "png"."""
        self._source, self._encoding = Path(source), encoding
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        first = next(iter(next(iter(self._splits().values()))))
        views, *size = first.images.shape[1:4]
        features = episode_features(views, tuple(size), self._encoding)
        return tfds.core.DatasetInfo(
            builder=self, features=features, disable_shuffling=True, description="Episodes of a robot arm."
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(episodes) for split, episodes in self._splits().items()}

    def _generate_examples(self, episodes: Iterable[Episode]) -> Iterator[tuple[int, dict]]:
        for number, episode in enumerate(episodes):
            yield number, tfds_example(episode, self._encoding)

    def _splits(self) -> dict[str, Iterable[Episode]]:
        files = sorted(self._source.glob("*.hdf5"))
        if files:
            return {"train": _demonstrations(files)}
        episodes = open_episodes(self._source)
        names = sorted({summary.split for summary in summarize_episodes(episodes)}, reverse=True)
        return {name: SelectedEpisodes(episodes, lambda s, name=name: s.split == name) for name in names}


def tfds_example(episode: Episode, encoding: str) -> dict[str, Any]:
    """An episode as TFDS takes it: a list of nested step dicts, images as encoded bytes."""
    example: dict[str, Any] = {"episode_metadata": {}, "steps": [{"observation": {}} for _ in episode.success]}
    for key, values in encode_episode(episode, encoding).items():
        group, *path = key.split("/")
        if group == "episode_metadata":
            example[group][path[0]] = values[0]
            continue
        for step, value in zip(example["steps"], values):
            target = step["observation"] if len(path) == 2 else step
            target[path[-1]] = value
    return example


def _demonstrations(files: list[Path]) -> Iterator[Episode]:
    for task, file in enumerate(files):
        yield from read_demonstrations(file, task)


def main(_: list[str]) -> None:
    """Builds the dataset."""
    builder = LiberoEpisodes(
        source=_SOURCE.value, encoding=_ENCODING.value, data_dir=_DATA_DIR.value, file_format=_FORMAT.value
    )
    builder.download_and_prepare()
    counts = {name: split.num_examples for name, split in builder.info.splits.items()}
    print(f"{builder.data_path}: {counts}")


if __name__ == "__main__":
    app.run(lambda argv: run_main(lambda: main(argv)))
