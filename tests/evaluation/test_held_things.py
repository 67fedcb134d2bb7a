# SPDX-License-Identifier: Apache-2.0
"""Which thing a hand holds, on made-up episodes: when it carries, where it is looked for, and what it is taken for."""

import numpy as np

from worldenv_jax.data.episodes import Episode
from worldenv_jax.evaluation.held_things import build_gallery, carrying_steps, recognise, squares_at_hand


def _episode(task, colour, steps=12):
    """A hand that closes at step 2, on something, and rises by 1 cm a step from 4 on; it is seen at pixel (20, 40)."""
    proprio = np.zeros((steps + 1, 8), np.float32)
    proprio[:, 2] = 0.01 * np.maximum(np.arange(steps + 1) - 4, 0)
    proprio[:, 6:] = 0.02, -0.02
    actions = np.full((steps, 7), -1.0, np.float32)
    actions[2:, 6] = 1.0
    # The camera moves with the hand, 1 m above it.
    pose = np.tile(np.diag([1.0, -1.0, -1.0, 1.0]), (steps + 1, 1, 1, 1)).astype(np.float32)
    pose[:, 0, :3, 3] = proprio[:, :3] + [0.0, 0.0, 1.0]
    lens = np.array([[50.0, 0, 20], [0, 50, 40], [0, 0, 1]], np.float32)
    images = np.zeros((steps + 1, 1, 64, 64, 3), np.uint8)
    images[:, 0, 32:48, 12:28] = colour
    return Episode(
        images=images, proprio=proprio, actions=actions, success=np.zeros(steps + 1, bool),
        intrinsics=np.tile(lens, (steps + 1, 1, 1, 1)), camera_pose=pose, instruction="lift", task=task, seed=0,
        split="train", starts="shifted", actor="policy",
    )  # fmt: skip


def test_a_hand_carries_from_3_cm_on():
    episode = _episode(0, 0)
    np.testing.assert_array_equal(carrying_steps(episode.proprio, episode.actions), np.arange(8, 13))
    actions = episode.actions.copy()
    actions[9, 6] = -1.0  # opened once: it has to rise anew
    np.testing.assert_array_equal(carrying_steps(episode.proprio, actions), [8, 9])
    empty = episode.proprio.copy()
    empty[:, 6:] = 0.003, -0.003
    assert len(carrying_steps(empty, episode.actions)) == 0


def test_squares_lie_around_the_hand_and_in_the_image():
    episode = _episode(0, 200)
    squares = squares_at_hand(episode, episode.images, [8, 9], 0)
    assert squares.shape == (2, 16, 16, 3) and (squares == 200).all()
    episode.intrinsics[:, 0, :2, 2] = 61.0, -5.0
    episode.images[:, 0, :16, 48:] = 77
    assert (squares_at_hand(episode, episode.images, [9], 0) == 77).all()


def test_the_nearest_picture_names_the_task():
    red, blue = _episode(3, (250, 0, 0)), _episode(5, (0, 0, 250))
    gallery = build_gallery([red, blue], view=0, every=2)
    np.testing.assert_array_equal(gallery.tasks, [3, 3, 3, 5, 5, 5])
    imagined = np.stack([np.full((16, 16, 3), colour, np.float32) for colour in ((140, 60, 60), (40, 40, 90))])
    np.testing.assert_array_equal(recognise(gallery, imagined), [3, 5])
