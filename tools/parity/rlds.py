# SPDX-License-Identifier: Apache-2.0
"""RLDS reading against what TFDS decodes: every number, text and pixel is equal."""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tools.parity import Result, compare, load_npz, unknown
from worldenv_jax.data.image_codec import decode_image
from worldenv_jax.data.rlds import RldsFolder
from worldenv_jax.data.tfds_metadata import read_feature_shapes

_NAME = re.compile(r"ep(?P<episode>\d+)_(?P<feature>\w+?)(?P<aspect>_crc32|_step\d+|)")


def check(fixture: Path) -> Iterator[Result]:
    """Compares the one dataset folder below `fixture` with its truth.npz.

    A quantity is called ep<episode>_<feature>, by the last part of the feature's key; of images it is the CRC-32 of
    every decoded frame (_crc32) or the pixels of one (_step<t>).
    """
    truth = load_npz(fixture / "truth.npz")
    folder = RldsFolder(next(fixture.rglob("features.json")).parent)
    keys = {key.rpartition("/")[2]: key for key in read_feature_shapes(folder.path)}
    yield compare("num_episodes", len(folder), truth.pop("num_episodes"), 0.0)
    for name, expected in truth.items():
        match = _NAME.fullmatch(name)
        if match and match["feature"] in keys and int(match["episode"]) < len(folder):
            values = folder.example(int(match["episode"]))[keys[match["feature"]]]
            yield _compare(name, match["aspect"], values, expected)
        else:
            yield unknown(name)


def _compare(name: str, aspect: str, values: np.ndarray | list, expected: np.ndarray) -> Result:
    if aspect == "_crc32":
        return compare(name, [zlib.crc32(decode_image(frame)) for frame in values], expected, 0.0)
    if aspect:
        return compare(name, decode_image(values[int(aspect.removeprefix("_step"))]), expected, 0.0)
    if isinstance(values, list):
        texts = np.array([bytes(text).decode() for text in values])
        return compare(f"{name} (texts that differ)", np.sum(texts != expected), 0, 0.0)
    if values.size == expected.size:
        values = values.reshape(expected.shape)
    return compare(name, values, expected, 0.0)
