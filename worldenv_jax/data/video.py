# SPDX-License-Identifier: Apache-2.0
"""Frames out of video files, through the extra `video`."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from worldenv_jax.data.errors import DataError


def iterate_video(file: Path) -> Iterator[np.ndarray]:
    """Frames uint8 [H, W, 3] of a video in their order.

    Raises:
        DataError: the extra `video` is not installed.
    """
    try:
        import imageio.v3 as imageio
        import imageio_ffmpeg  # noqa: F401 (imageio would look for it later and say less)
    except ImportError as error:
        raise DataError(file, 'reading videos needs the extra: pip install "worldenv-jax[video]"') from error
    return imageio.imiter(file, plugin="FFMPEG")


def read_video(file: Path, first: int, count: int) -> np.ndarray:
    """Frames first .. first + count - 1 of a video, uint8 [count, H, W, 3].

    Raises:
        DataError: the extra `video` is not installed.
        ValueError: the video is shorter.
    """
    frames = list(islice(iterate_video(file), first, first + count))
    if len(frames) < count:
        raise ValueError(f"{file} has {len(frames)} of the {count} frames from frame {first} on")
    return np.stack(frames)
