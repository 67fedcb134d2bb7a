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

_FEATURES = {
    "action": "steps/action",
    "state": "steps/observation/state",
    "joint_state": "steps/observation/joint_state",
    "discount": "steps/discount",
    "reward": "steps/reward",
    "is_first": "steps/is_first",
    "is_last": "steps/is_last",
    "is_terminal": "steps/is_terminal",
    "language_instruction": "steps/language_instruction",
    "file_path": "episode_metadata/file_path",
    "image_crc32": "steps/observation/image",
    "image_step0": "steps/observation/image",
    "wrist_image_crc32": "steps/observation/wrist_image",
    "wrist_image_step0": "steps/observation/wrist_image",
}
_NAME = re.compile(r"ep(\d+)_(\w+)")


def check(fixture: Path) -> Iterator[Result]:
    """Compares the one dataset folder below `fixture` with its truth.npz."""
    truth = load_npz(fixture / "truth.npz")
    folder = RldsFolder(next(fixture.rglob("features.json")).parent)
    yield compare("num_episodes", len(folder), truth.pop("num_episodes"), 0.0)
    for name, expected in truth.items():
        match = _NAME.fullmatch(name)
        if match and match[2] in _FEATURES and int(match[1]) < len(folder):
            values = folder.example(int(match[1]))[_FEATURES[match[2]]]
            yield _compare(name, values, expected)
        else:
            yield unknown(name)


def _compare(name: str, values: np.ndarray | list, expected: np.ndarray) -> Result:
    if name.endswith("_crc32"):
        return compare(name, [zlib.crc32(decode_image(frame)) for frame in values], expected, 0.0)
    if name.endswith("_step0"):
        return compare(name, decode_image(values[0]), expected, 0.0)
    if isinstance(values, list):
        different = [bytes(text).decode() != str(expected) for text in values]
        return compare(f"{name} (steps that differ)", sum(different), 0, 0.0)
    if values.size == expected.size:
        values = values.reshape(expected.shape)
    return compare(name, values, expected, 0.0)
