# SPDX-License-Identifier: Apache-2.0
"""Frames reprojected through a plane, against pictures of a painted plane rendered from both places; the guesses."""

import jax.numpy as jnp
import numpy as np

from worldenv_jax.simulator.reprojection import count_guesses, guess_frames, reproject

SIZE, HEIGHT = 32, 0.1
FLOOR = np.array([0.0, 0.0, 1.0, HEIGHT], np.float32)
# robosuite's pictures are upside down, so its focal lengths are negative.
INTRINSICS = np.array([[-30.0, 0, 16], [0, 30, 16], [0, 0, 1]])


def _looking_down(x, y, z, turn=0.0, tilt=0.0):
    """A camera at (x, y, z) in float64, its third axis towards the plane."""
    c, s, ct, st = np.cos(turn), np.sin(turn), np.cos(tilt), np.sin(tilt)
    down = np.diag([1.0, -1.0, -1.0])
    rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ down @ np.array([[1, 0, 0], [0, ct, -st], [0, st, ct]])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, (x, y, z)
    return pose


def _plane_points(pose, lens=INTRINSICS, size=SIZE):
    """Where the ray through every pixel's centre meets the plane, float64 [size, size, 2]."""
    v, u = np.mgrid[:size, :size] + 0.5
    across, down = (u - lens[0, 2]) / lens[0, 0], (v - lens[1, 2]) / lens[1, 1]
    ray = np.stack([across, down, np.ones_like(u)], -1) @ pose[:3, :3].T
    return (pose[:3, 3] + (HEIGHT - pose[2, 3]) / ray[..., 2:] * ray)[..., :2]


def _picture(pose):
    """A plane painted in slow waves, so that bilinear sampling is nearly exact."""
    x, y = np.moveaxis(_plane_points(pose), -1, 0)
    return np.stack([np.sin(5 * x), np.cos(4 * y), np.sin(3 * (x + y))], -1)


def _shown(pose, by):
    """Which pixels of the camera at `pose` show a point that the camera at `by` sees."""
    points = np.concatenate([_plane_points(pose), np.full((SIZE, SIZE, 1), HEIGHT)], -1)
    local = (points - by[:3, 3]) @ by[:3, :3]
    u, v = (INTRINSICS[i, i] * local[..., i] / local[..., 2] + 16 for i in range(2))
    return (u > 0) & (u < SIZE) & (v > 0) & (v < SIZE)


def test_a_painted_plane_from_elsewhere():
    """The newest frame shows a part of each target, an older one from higher up the rest."""
    sources = [_looking_down(0.1, 0.0, 1.2), _looking_down(0.0, 0.0, 0.6, 0.2)]
    targets = [_looking_down(0.15, -0.1, 0.5, -0.3, 0.1), _looking_down(0.3, 0.1, 0.6)]
    cast = lambda poses: jnp.asarray(np.stack(poses), jnp.float32)
    got = reproject(
        cast([_picture(s) for s in sources]), cast(INTRINSICS), cast(sources), cast(targets), np.tile(FLOOR, (2, 1))
    )
    assert got.shape == (2, SIZE, SIZE, 3)
    for frame, target in zip(np.asarray(got), targets):
        by_new, by_old = (_shown(target, by=source) for source in reversed(sources))
        assert by_new.mean() > 0.3 and (by_old & ~by_new).mean() > 0.1
        error = np.abs(frame - _picture(target)).max(-1)
        # Within half a pixel of the border the nearest pixel stands in; the older frame's pixels are twice as large.
        assert np.median(error[by_new]) < 0.01 and np.quantile(error[by_new], 0.9) < 0.05
        assert np.quantile(error[by_old & ~by_new], 0.9) < 0.1


def test_unseen_points_keep_the_newest_frame():
    images = jnp.stack([jnp.zeros((SIZE, SIZE, 1)), jnp.ones((SIZE, SIZE, 1))])
    pose = jnp.asarray(_looking_down(0, 0, 0.6), jnp.float32)
    away = jnp.asarray(_looking_down(50.0, 0, 0.6), jnp.float32)
    got = reproject(images, jnp.asarray(INTRINSICS, jnp.float32), jnp.stack([pose, pose]), away[None], FLOOR[None])
    np.testing.assert_array_equal(got, np.ones((1, SIZE, SIZE, 1)))


def test_leading_axes():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 1, 2, SIZE, SIZE, 3)).astype(np.float32)
    intrinsics = np.tile(INTRINSICS, (2, 1, 1, 1)).astype(np.float32)
    poses = np.stack([_looking_down(0, 0, 0.6), _looking_down(0.1, 0, 0.5)])[:, None, None].astype(np.float32)
    sources, targets = np.tile(poses, (1, 1, 2, 1, 1)), np.tile(poses[::-1], (1, 1, 3, 1, 1))
    planes = np.tile(FLOOR, (2, 1, 3, 1))
    got = reproject(*map(jnp.asarray, (images, intrinsics, sources, targets, planes)))
    assert got.shape == (2, 1, 3, SIZE, SIZE, 3)
    for i in range(2):
        alone = reproject(*(jnp.asarray(leaf[i, 0]) for leaf in (images, intrinsics, sources, targets, planes)))
        np.testing.assert_allclose(got[i, 0], alone, atol=1e-6)


def _hand_poses(*places, turn=0.0):
    """Hands in float32 [1, T, 4, 4], pointing down."""
    return np.stack([_looking_down(*place, turn) for place in places])[None].astype(np.float32)


def test_what_the_hand_carries_moves_by_whole_pixels():
    """A hand that moves sideways before a still camera takes the picture along: focal length times way over depth.

    The oldest frame follows the hand's way since the grasp only.
    """
    rng = np.random.default_rng(2)
    images = rng.uniform(-1, 1, (1, 1, 2, SIZE, SIZE, 3)).astype(np.float32)
    pose = np.tile(_looking_down(0, 0, 0.9), (1, 1, 4, 1, 1)).astype(np.float32)
    # 0.6 m away from the camera and f = 30: 0.02 m is a pixel. The camera's x axis is the world's, mirrored by f < 0.
    hand = _hand_poses((0, 0, 0.3), (0.02, 0, 0.3), (0.06, 0, 0.3), (0.02, -0.04, 0.3))
    grasps = _hand_poses((0.02, 0, 0.3), (0.02, -0.02, 0.3))
    guesses = np.asarray(guess_frames(images, np.tile(INTRINSICS, (1, 1, 1, 1)), pose, hand, grasps, (), (HEIGHT,)))
    assert guesses.shape == (1, 1, 2, 4, SIZE, SIZE, 3)
    for k in range(2):
        np.testing.assert_array_equal(guesses[0, 0, k, 0], images[0, 0, 1])  # still, newest
        np.testing.assert_array_equal(guesses[0, 0, k, 1], images[0, 0, 0])  # still, oldest
    inner = slice(4, -4)
    for (k, guess, known), (right, down) in {
        (0, 2, 1): (-2, 0),
        (0, 3, 0): (-2, 0),
        (1, 2, 1): (0, 2),
        (1, 3, 0): (0, 1),
    }.items():
        moved = np.roll(images[0, 0, known], (down, right), axis=(0, 1))
        np.testing.assert_allclose(guesses[0, 0, k, guess][inner, inner], moved[inner, inner], atol=2e-4)


def test_guesses_of_a_camera_on_the_hand():
    """What stands still is reprojected, newest or oldest frames in front; what the hand carries stays in its place."""
    rng = np.random.default_rng(3)
    images = rng.uniform(-1, 1, (1, 2, 3, SIZE, SIZE, 3)).astype(np.float32)
    places = [_looking_down(0.04 * t, 0, 0.6) for t in range(5)]
    poses = np.tile(np.stack(places), (1, 2, 1, 1, 1)).astype(np.float32)
    hand = _hand_poses(*((0.04 * t, 0, 0.4) for t in range(5)))
    intrinsics = np.tile(INTRINSICS, (1, 2, 1, 1)).astype(np.float32)
    guesses = np.asarray(guess_frames(images, intrinsics, poses, hand, hand[:, 3:], (1,), (HEIGHT,)))
    planes = np.tile(FLOOR, (2, 1))
    for guess, order in ((0, 1), (1, -1)):
        expected = reproject(images[0, 1, ::order], intrinsics[0, 1], poses[0, 1, :3][::order], poses[0, 1, 3:], planes)
        np.testing.assert_allclose(guesses[0, 1, :, guess], expected, atol=1e-6)
    np.testing.assert_array_equal(guesses[0, 1, :, 2], np.tile(images[0, 1, 2], (2, 1, 1, 1)))


def test_a_camera_on_the_hand_is_shown_what_the_standing_one_sees():
    """A painted plane: the standing camera, with a shorter lens, sees all of what the hand will."""
    wide, stand = INTRINSICS.copy(), _looking_down(0.3, -0.2, 1.1, 0.4, 0.3)
    wide[[0, 1], [0, 1]] *= 0.5
    hand = [_looking_down(0.1 * t, 0.05 * t, 0.6 - 0.05 * t, 0.1 * t) for t in range(4)]
    x, y = np.moveaxis(_plane_points(stand, wide), -1, 0)
    images = np.zeros((1, 2, 2, SIZE, SIZE, 3), np.float32)
    images[0, 0, 0] = np.stack([np.sin(5 * x), np.cos(4 * y), np.sin(3 * (x + y))], -1)
    poses = np.stack([np.tile(stand, (4, 1, 1)), np.stack(hand)])[None].astype(np.float32)
    intrinsics = np.stack([wide, INTRINSICS])[None].astype(np.float32)
    moved = np.stack(hand)[None].astype(np.float32)
    for heights, guess in (((HEIGHT,), 3), ((0.3, HEIGHT), 6)):
        guesses = np.asarray(guess_frames(images, intrinsics, poses, moved, moved[:, 2:], (1,), heights))
        for k in range(2):
            error = np.abs(guesses[0, 1, k, guess] - _picture(hand[2 + k])).max(-1)
            assert np.quantile(error, 0.9) < 0.1  # a pixel of the standing camera covers several of the hand's


def test_photographs_show_what_a_pixel_cannot():
    """Stripes of 1 cm, at most as wide as a first frame's pixels: eight times as many pixels a side show them."""
    fine, wide = 8, INTRINSICS.copy()
    wide[[0, 1], [0, 1]] *= 0.5  # pixels of 2 cm at 0.3 m
    stand = _looking_down(0.1, 0, HEIGHT + 0.3, 0.2)
    hand = [_looking_down(0.1, 0, HEIGHT + 0.4), *(_looking_down(0.1, 0.01 * t, HEIGHT + 0.1) for t in range(3))]
    stripes = lambda points: np.sin(2 * np.pi * points[..., :1] / 0.02)
    finer = lambda lens: lens * np.array([[fine], [fine], [1]])
    first = (stand, wide), (hand[0], INTRINSICS)
    photographs = np.stack([stripes(_plane_points(pose, finer(lens), fine * SIZE)) for pose, lens in first])[None]
    images = np.zeros((1, 2, 2, SIZE, SIZE, 1), np.float32)
    images[0, :, 0] = photographs[0].reshape(2, SIZE, fine, SIZE, fine, 1).mean((2, 4))
    poses = np.stack([np.tile(stand, (4, 1, 1)), np.stack(hand)])[None].astype(np.float32)
    intrinsics, hand = np.stack([wide, INTRINSICS])[None].astype(np.float32), np.stack(hand)[None].astype(np.float32)
    guesses = lambda *more: guess_frames(images, intrinsics, poses, hand, hand[:, 2:], (1,), (HEIGHT,), *more)[0, 1]
    truth = np.stack([stripes(_plane_points(pose, INTRINSICS)) for pose in poses[0, 1, 2:]])
    for guess in (1, 3):  # its own oldest frame, and the standing camera's
        error = lambda guesses, guess=guess: np.abs(np.asarray(guesses[:, guess]) - truth).mean()
        assert error(guesses(photographs.astype(np.float32))) < 0.05 < 0.3 < error(guesses())


def test_a_plane_sweep_finds_what_is_higher():
    """Painted planes at two heights: each is seen from elsewhere by the guesses of its own height, by no others."""
    places = [_looking_down(0.05 * t, 0.02 * t, 0.7 - 0.03 * t, 0.1 * t) for t in range(4)]
    hand = np.stack(places)[None].astype(np.float32)
    poses, intrinsics = np.tile(hand[:, None], (1, 2, 1, 1, 1)), np.tile(INTRINSICS, (1, 2, 1, 1)).astype(np.float32)
    images = np.stack([[_picture(place) for place in places[:2]]] * 2)[None].astype(np.float32)
    for heights, right in (((HEIGHT, 0.3), (0, 1)), ((0.3, HEIGHT), (4, 5, 6))):
        guesses = np.asarray(guess_frames(images, intrinsics, poses, hand, hand[:, 2:], (1,), heights))
        assert guesses.shape == (1, 2, 2, count_guesses(heights), SIZE, SIZE, 3)
        np.testing.assert_array_equal(guesses[0, 0, :, 4:], np.tile(images[0, 0, 1], (2, 3, 1, 1, 1)))  # stands still
        for k in range(2):
            inner = _shown(places[2 + k], places[0]) & _shown(places[2 + k], places[1])
            errors = np.abs(guesses[0, 1, k] - _picture(places[2 + k])).max(-1)[:, inner]
            typical = np.median(errors, axis=1)
            assert (typical[list(right)] < 0.02).all()
            assert (np.delete(typical, [*right, 2, 3]) > 0.05).all()
