# SPDX-License-Identifier: Apache-2.0
"""Is what an imagined hand holds still recognisable? The nearest true picture of a held thing says which task it is of.

Where every task has its own thing to carry (libero_object) a picture that shows it belongs to that task's pictures. A
blur, a wrong colour, or an empty hand are near to some other's. No network is trained for this, and none is trusted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from worldenv_jax.data.episodes import Episode
from worldenv_jax.simulator.action_maps import project
from worldenv_jax.simulator.proprioception import finger_opening

SQUARE = 16  # pixels, in pictures of 64
LIFTED = 0.03  # metres above the lowest place since the hand was told to close
FINGERS = 0.008  # metres between fingers that hold something


class Gallery(NamedTuple):
    """True pictures of held things as one camera sees them."""

    squares: np.ndarray  # float32 [N, S, S, 3]
    tasks: np.ndarray  # int [N]


def carrying_steps(proprio: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """The steps at which a hand carries something: closed by command, not empty, and lifted.

    Args:
        proprio: float [T + 1, 8], before each action and after the last.
        actions: float [T, 7], environment actions.

    Returns: int [N], among 1 .. T.
    """
    closing = np.concatenate([[False], np.asarray(actions)[:, 6] > 0])
    carrying, lowest = [], np.inf
    for step, (closed, row) in enumerate(zip(closing, np.asarray(proprio))):
        lowest = min(lowest, row[2]) if closed else np.inf
        if closed and finger_opening(row) > FINGERS and row[2] > lowest + LIFTED:
            carrying.append(step)
    return np.array(carrying, int)


def squares_at_hand(episode: Episode, frames: np.ndarray, steps: Sequence[int], view: int) -> np.ndarray:
    """Squares float32 [N, S, S, 3] around the recorded hand, moved into the image where they would leave it.

    Args:
        episode: whose hand and cameras.
        frames: uint8 [T + 1, V, H, W, 3], the episode's own or imagined ones.
        steps: N of them.
        view: of the V cameras.
    """
    height, width = frames.shape[2:4]
    size = SQUARE * width // 64
    squares = np.zeros((len(steps), size, size, 3), np.float32)
    for row, step in enumerate(steps):
        hand = np.asarray(episode.proprio[step], np.float32)[None, :3]
        pixels, _ = project(hand, episode.intrinsics[step, view], episode.camera_pose[step, view])
        x, y = np.clip(np.rint(pixels[0]).astype(int) - size // 2, 0, [width - size, height - size])
        squares[row] = frames[step, view, y : y + size, x : x + size]
    return squares


def build_gallery(episodes: Sequence[Episode], view: int, every: int = 8) -> Gallery:
    """Held things of true episodes, at every so many-th carrying step."""
    steps = [carrying_steps(episode.proprio, episode.actions)[::every] for episode in episodes]
    squares = [squares_at_hand(episode, episode.images, own, view) for episode, own in zip(episodes, steps)]
    tasks = np.repeat([episode.task for episode in episodes], [len(own) for own in steps])
    return Gallery(np.concatenate(squares), tasks)


def recognise(gallery: Gallery, squares: np.ndarray) -> np.ndarray:
    """The task of the nearest picture in the gallery (mean squared error), int [N]."""
    nearest = [np.square(gallery.squares - square).mean((1, 2, 3)).argmin() for square in squares]
    return gallery.tasks[np.array(nearest, int)]
