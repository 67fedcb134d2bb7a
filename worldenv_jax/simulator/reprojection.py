# SPDX-License-Identifier: Apache-2.0
"""Guesses at the next frames before anything is learned: known frames seen from elsewhere, were everything on a plane.

Differs from EVAC, which repeats the last frame. Where cameras and hand will be is known, and most pixels belong to what
stands still or to what moves with the hand. Seen through a plane fixed in the world, a wrist camera's earlier frames
show the first; through one fixed to the hand, any camera's earlier frames show the second, arm and held object where
they will be. And what the hand's camera will come to, a standing one has seen from afar. Things are not flat: the
hand's camera has guesses for planes at several heights (a plane sweep, Collins 1996), and an object stays whole where
the right one is chosen. Which pixel belongs to what is left to `compositing` (as in Finn et al. 2016). A standing
camera's pixel is wide where the hand's looks closely, so the first frames may be photographs of finer resolution.
"""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from worldenv_jax.simulator.action_maps import project, scale_intrinsics
from worldenv_jax.simulator.poses import inverse_transform
from worldenv_jax.types import Array


def count_guesses(heights: tuple[float, ...]) -> int:
    """How many `guess_frames` makes."""
    return 4 + 3 * (len(heights) - 1)


def guess_frames(
    images: Array,
    intrinsics: Array,
    poses: Array,
    hand: Array,
    grasps: Array,
    hand_views: tuple[int, ...],
    heights: tuple[Array | float, ...],
    photographs: Array | None = None,
) -> Array:
    """Guesses at every future frame.

    Args:
        images: float [B, V, F, H, W, C], the known frames, oldest first.
        intrinsics: float [B, V, 3, 3], in pixels.
        poses: float [B, V, F + K, 4, 4], camera to world.
        hand: float [B, F + K, 4, 4], hand to world.
        grasps: float [B, K, 4, 4], where the hand of each future frame was last open.
        hand_views: the cameras on the hand; the others do not move.
        heights: of the planes that the world is taken for, metres.
        photographs: float [B, V, H', W', C], the oldest frame at any resolution, for the hand's cameras to be shown;
            by default as in `images`.

    Returns: float [B, V, K, G, H, W, C], G = `count_guesses`. Were everything still and at the first height, the newest
    known frames or (where something has moved away) the oldest ones; were everything fixed to the hand, the newest
    frame, with what the hand holds; had everything followed the hand since the grasp, the oldest frame: in a roll-out
    it is a true one, so what is carried keeps its looks. Instead of the last, a camera on the hand has the first
    standing camera's oldest frame, were everything at the first height: its own first picture does not show all that it
    will come to. Then for each other height the newest frame before the oldest, the oldest before the newest, and the
    first standing camera's oldest; of standing cameras, to which heights mean nothing, the newest frame.
    """
    known = images.shape[2]
    frames = poses.shape[2] - known
    newest, oldest = (jnp.repeat(images[:, :, i : i + 1], frames, axis=2) for i in (known - 1, 0))
    on_hand = jnp.array(sorted(hand_views), jnp.int32)
    on_stand = jnp.array([view for view in range(images.shape[1]) if view not in hand_views], jnp.int32)
    if photographs is None:
        photographs = images[:, :, 0]
    finer = [fine / coarse for fine, coarse in zip(photographs.shape[2:4], images.shape[3:5])]
    future, lens, fine_lens = poses[:, on_hand, known:], intrinsics[:, on_hand], scale_intrinsics(intrinsics, *finer)

    def look(canvas: Array, sources: Array, source_lens: Array, source_poses: Array, height: float) -> Array:
        """`canvas` [B, V, K, H, W, C], but the hand's cameras see these frames on a plane at a height."""
        planes = jnp.broadcast_to(jnp.stack([0.0, 0.0, 1.0, height]), (*future.shape[:3], 4))
        seen = reproject(sources, lens, source_poses, future, planes, source_lens, canvas[:, on_hand])
        return canvas.at[:, on_hand].set(seen)

    def through(canvas: Array, height: float, oldest_last: bool, since: int) -> Array:
        """What the hand's cameras saw at first and from frame `since` on; what comes last covers the rest."""
        first = photographs[:, on_hand, None], fine_lens[:, on_hand], poses[:, on_hand, :1]
        later = slice(since, known) if not oldest_last else slice(known - 1, since - 1, -1)
        rest = images[:, on_hand, later], lens, poses[:, on_hand, later]
        for sources in (rest, first) if oldest_last else (first, rest):
            canvas = look(canvas, *sources, height)
        return canvas

    def from_stand(canvas: Array, height: float) -> Array:
        """What the first standing camera saw at first."""
        if not hand_views:
            return canvas
        stand, to_each = on_stand[0], lambda leaf: jnp.repeat(leaf[:, None], len(on_hand), axis=1)
        sources = photographs[:, stand, None], fine_lens[:, stand], poses[:, stand, :1]
        behind = jnp.repeat(images[:, stand, None, :1], len(on_hand), axis=1)
        canvas = canvas.at[:, on_hand].set(jnp.broadcast_to(behind, canvas[:, on_hand].shape))
        return look(canvas, *map(to_each, sources), height)

    first, *others = heights
    behind = newest.at[:, on_hand].set(oldest[:, on_hand])
    sweep = []
    for height in others:
        sweep += through(newest, height, False, known - 1), through(behind, height, True, known - 1)
        sweep.append(from_stand(newest, height))
    still = through(newest, first, False, 1), through(oldest, first, True, 1)

    before = jnp.broadcast_to(hand[:, known - 1 : known], grasps.shape)
    carried = lambda frame, before: _carried(
        frame[:, on_stand], intrinsics[:, on_stand], poses[:, on_stand, known:], before, hand[:, known:]
    )
    newest = newest.at[:, on_stand].set(carried(newest, before))
    oldest = oldest.at[:, on_stand].set(carried(oldest, grasps))
    return jnp.stack([*still, newest, from_stand(oldest, first), *sweep], axis=3)


def settle(pixels: Array) -> Array:
    """Pixel coordinates in thousandths.

    XLA may compute a pixel's index and its weight anew, from coordinates that differ in the last bit. Where they are
    whole numbers, as of a hand that stands still, the pixel would be its neighbour's.
    """
    return jnp.round(1024.0 * pixels) / 1024.0


def _carried(images: Array, intrinsics: Array, poses: Array, before: Array, after: Array) -> Array:
    """Frames [B, V, K, H, W, C] of cameras that stand still, had everything moved with the hand from before to after.

    Args:
        intrinsics, poses: float [B, V, 3, 3] and [B, V, K, 4, 4].
        before, after: float [B, K, 4, 4], hand to world.
    """
    seen = lambda hand: jnp.einsum("btij,bvtjk->bvtik", inverse_transform(hand), poses)
    source, target = seen(before), seen(after)
    planes = jnp.pad(target[..., :3, 2], ((0, 0),) * 3 + ((0, 1),))  # through the hand, facing the camera
    intrinsics = jnp.broadcast_to(intrinsics[:, :, None], (*source.shape[:3], 3, 3))
    one = lambda leaf: leaf[:, :, :, None]
    return reproject(one(images), intrinsics, one(source), one(target), one(planes))[:, :, :, 0]


def reproject(
    images: Array,
    intrinsics: Array,
    sources: Array,
    targets: Array,
    planes: Array,
    seen_with: Array | None = None,
    canvas: Array | None = None,
) -> Array:
    """Frames of the past as seen from other places; a pixel takes the newest frame that shows its point of the plane.

    Args:
        images: float [..., S, H', W', C], oldest first.
        intrinsics: float [..., 3, 3], in pixels, of the frames to make.
        sources: float [..., S, 4, 4], camera to world of `images`; "world" is any frame that the plane is fixed in.
        targets: float [..., K, 4, 4], camera to world of the frames to make.
        planes: float [..., K, 4], (n, d) of the points p with n . p = d, metres.
        seen_with: float [..., 3, 3], intrinsics of `images`, where they are other ones.
        canvas: float [..., K, H, W, C], what is left where no frame shows the point; the newest frame by default.

    Returns: float [..., K, H, W, C].
    """
    function = _reproject
    for _ in range(intrinsics.ndim - 2):
        function = jax.vmap(function)
    seen_with = intrinsics if seen_with is None else seen_with
    if canvas is None:
        canvas = jnp.repeat(images[..., -1:, :, :, :], targets.shape[-3], axis=-4)
    return function(images, intrinsics, sources, targets, planes, seen_with, canvas)


def _reproject(
    images: Array, intrinsics: Array, sources: Array, targets: Array, planes: Array, seen_with: Array, canvas: Array
) -> Array:
    """The same without leading axes."""
    rows, columns = images.shape[1:3]
    v, u = jnp.mgrid[: canvas.shape[1], : canvas.shape[2]].astype(jnp.float32) + 0.5  # pixel centres
    pixels = jnp.stack([u, v, jnp.ones_like(u)], axis=-1).reshape(-1, 3)
    sample = jax.vmap(lambda channel, at: map_coordinates(channel, at, order=1, mode="nearest"), (-1, None), -1)

    def seen_from(target: Array, plane: Array, canvas: Array) -> Array:
        rays = pixels @ jnp.linalg.inv(intrinsics).T @ target[:3, :3].T
        approach = rays @ plane[:3]
        distance = (plane[3] - plane[:3] @ target[:3, 3]) / jnp.where(jnp.abs(approach) < 1e-6, 1e-6, approach)
        points = target[:3, 3] + distance[:, None] * rays
        seen = canvas.reshape(-1, canvas.shape[-1])
        for image, source in zip(images, sources):  # later ones cover earlier ones
            at, depth = project(points, seen_with, source)
            at = settle(at)
            inside = (at >= 0.0).all(-1) & (at[:, 0] < columns) & (at[:, 1] < rows)
            shown = inside & (depth > 0.0) & (distance > 0.0)
            seen = jnp.where(shown[:, None], sample(image, (at[:, 1] - 0.5, at[:, 0] - 0.5)), seen)
        return seen.reshape(canvas.shape)

    return jax.vmap(seen_from)(targets, planes, canvas)
