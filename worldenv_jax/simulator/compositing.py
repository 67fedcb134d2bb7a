# SPDX-License-Identifier: Apache-2.0
"""A first picture of every future frame: what may be copied is copied, what may not is drawn (as in Finn et al. 2016).

Differs from EVAC, which starts from the last frame. Copies stay sharp over many chunks, and a standing camera's arm is
drawn anew, from the hand's pose alone, over the oldest frame, which in a roll-out is a true one: it cannot fade. The
denoiser corrects the result. One frame at a time is seen, so that minutes of training do what the video model needs
hours for.

What the hand's camera sees of the thing that is grasped no frame has shown before: it is drawn, too, from a glance at
it (`glance`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from worldenv_jax.simulator.action_maps import project
from worldenv_jax.simulator.glance import CHANNELS, Glance
from worldenv_jax.simulator.layers import conv3x3
from worldenv_jax.simulator.poses import hand_poses
from worldenv_jax.simulator.proprioception import Kinematics, workspace
from worldenv_jax.simulator.reprojection import guess_frames
from worldenv_jax.types import Array, Params

PATCH = 4  # pixels; a cell of the grid that is computed on
FIRST_GUESS = 2.0  # logit of the first guess at the start, beside zeros
TIMES = 4  # whose poses are told: the frame's own, the oldest and the newest known frame's, the last grasp's
HELD_TIMES = np.array([0, 1, 3])  # ... to the drawing of what is held
POSE = 3 + 2 + 9 + 9 + 1  # features of one of them


def fourier_features(x: Array, octaves: int) -> Array:
    """x [..., D] to sines and cosines of pi / 2 * 2^i * x, i < octaves: [..., 2 * octaves * D]."""
    angles = x[..., None] * (jnp.pi / 2 * 2.0 ** jnp.arange(octaves))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*x.shape[:-1], -1)


class _Trunk(nn.Module):
    """Residual convolutions on patches, modulated by the pose (Perez et al. 2018, arXiv 1709.07871).

    Cells know where they lie in the image and beside the hand, so that what has been learned in one place serves
    everywhere. To float32 [N, H, W, outputs].
    """

    width: int
    blocks: int
    outputs: int

    @nn.compact
    def __call__(
        self,
        size: tuple[int, int],
        hand: Array,
        pose: Array,
        patches: Array | None = None,
        glances: Array | None = None,
    ) -> Array:
        """Hand's pixels [N, T, 2] in image sizes, poses [N, T, POSE]; patches [N, h, w, D], glances [N, S, S, 6]."""
        count, rows, columns = len(hand), size[0] // PATCH, size[1] // PATCH
        dense = lambda name, **options: nn.Dense(self.width, name=name, **options)
        y, x = jnp.mgrid[:rows, :columns] + 0.5
        cells = jnp.stack([x / columns, y / rows], axis=-1)
        beside = 2.0 * (cells[:, :, None] - hand[:, None, None]).reshape(count, rows, columns, -1)
        pose = pose.reshape(count, -1)
        pose = dense("pose1")(jnp.concatenate([pose, fourier_features(pose, 3)], axis=-1))
        if glances is not None:
            pose += dense("seen")(Glance(name="glance")(glances))
        pose = dense("pose2")(nn.silu(pose))
        hidden = dense("place")(jnp.concatenate([beside, fourier_features(beside, 5)], axis=-1))
        hidden += dense("image")(fourier_features(2.0 * cells, 4)) + pose[:, None, None]
        if patches is not None:
            hidden += dense("patches")(patches)
        for i in range(self.blocks):
            norm = nn.LayerNorm(use_fast_variance=False, name=f"norm{i + 1}")
            branch = conv3x3(self.width, "float32", f"conv{i + 1}")(nn.silu(norm(hidden)))
            branch *= 1.0 + dense(f"scale{i + 1}")(pose)[:, None, None]
            hidden += dense(f"out{i + 1}", kernel_init=nn.initializers.zeros)(nn.silu(branch))
        hidden = nn.silu(nn.LayerNorm(use_fast_variance=False, name="norm")(hidden))
        pixels = nn.Dense(PATCH**2 * self.outputs, name="pixels")(hidden)
        pixels = pixels.reshape(count, rows, columns, PATCH, PATCH, self.outputs).transpose(0, 1, 3, 2, 4, 5)
        return pixels.reshape(count, *size, self.outputs)


class ArmDrawing(nn.Module):
    """What has to be painted over a frame so that it shows the hand elsewhere: the arm, and what it hid before.

    With glances also what the hand holds or comes to.
    """

    width: int

    @nn.compact
    def __call__(self, frames: Array, hand: Array, pose: Array, glances: Array | None = None) -> Array:
        """Frames float [N, H, W, 3] in [-1, 1] with the drawing on them.

        Args:
            hand: float [N, T, 2], where the hand is to be, where it is in the frame, and others, in image sizes.
            pose: float [N, T, POSE], of hand and camera, about [-1, 1].
            glances: float [N, S, S, 6] in [-1, 1], where the hand was last open.
        """
        pixels = _Trunk(self.width, 4, 4, name="trunk")(frames.shape[1:3], hand, pose, glances=glances)
        opacity = jax.nn.sigmoid(pixels[..., 3:] - FIRST_GUESS)
        return opacity * jnp.tanh(pixels[..., :3]) + (1.0 - opacity) * frames


class Compositor(nn.Module):
    """A weighted mean, pixel by pixel, of the guesses and of a picture of its own."""

    width: int

    @nn.compact
    def __call__(self, guesses: Array, hand: Array, pose: Array) -> Array:
        """One frame as seen by one camera, float32 [N, H, W, 3] in [-1, 1].

        Args:
            guesses: float [N, G, H, W, 3] in [-1, 1]; H and W are multiples of `PATCH`.
            hand, pose: float [N, TIMES, 2] and [N, TIMES, POSE], as in `ArmDrawing`.
        """
        count, number, height, width, _ = guesses.shape
        patches = guesses.reshape(count, number, height // PATCH, PATCH, width // PATCH, PATCH, 3)
        patches = patches.transpose(0, 2, 4, 1, 3, 5, 6).reshape(count, height // PATCH, width // PATCH, -1)
        pixels = _Trunk(self.width, 3, number + 4, name="trunk")((height, width), hand, pose, patches)
        shares = jax.nn.softmax(pixels[..., 3:].at[..., 0].add(FIRST_GUESS))
        layers = jnp.concatenate([guesses, jnp.tanh(pixels[..., :3])[:, None]], axis=1)
        return jnp.einsum("nhwg,nghwc->nhwc", shares, layers)


def init_compositor(width: int, key: Array, size: tuple[int, int], guesses: int, glance_size: int = 0) -> Params:
    """Random parameters {"drawing", "choice"} for so many guesses at images of `size`; with glances also "held".

    `glance_size`: S of glances; 0: there are none.
    """
    one, two = jax.random.split(key)
    frame, hand, pose = jnp.zeros((1, guesses, *size, 3)), jnp.zeros((1, TIMES, 2)), jnp.zeros((1, TIMES, POSE))
    params = {"drawing": ArmDrawing(width).init(one, frame[:, 0], hand[:, :2], pose[:, :2])["params"]}
    if glance_size:
        glances = jnp.zeros((1, glance_size, glance_size, CHANNELS))
        inputs = frame[:, 0], hand[:, HELD_TIMES], pose[:, HELD_TIMES], glances
        params["held"] = ArmDrawing(width).init(jax.random.fold_in(key, 2), *inputs)["params"]
        frame = jnp.zeros((1, guesses + 1, *size, 3))
    return params | {"choice": Compositor(width).init(two, frame, hand, pose)["params"]}


def compose(
    params: Params,
    images: Array,
    intrinsics: Array,
    cameras: Array,
    proprio: Array,
    grasps: Array,
    kinematics: Kinematics,
    hand_views: tuple[int, ...],
    plane_heights: tuple[Array | float, ...],
    photographs: Array | None = None,
    glances: Array | None = None,
) -> tuple[Array, Array]:
    """First pictures of the K frames that follow on F known ones.

    Args:
        params: `init_compositor`.
        images: float [B, V, F, H, W, 3] in [-1, 1], the known frames, oldest first.
        intrinsics: float [B, V, 3, 3], in pixels.
        cameras: float [B, V, F + K, 4, 4], camera to world.
        proprio: float32 [B, F + K, 8].
        grasps: float32 [B, K, 8], `last_grasps` of the frames to come.
        kinematics: for its workspace and fingers, the units of poses here.
        hand_views, plane_heights, photographs: as in `guess_frames`.
        glances: float [B, K, S, S, 6] in [-1, 1], at `grasps`; given if and only if there are parameters "held".
    Returns: float32 [B, V, K, H, W, 3] in [-1, 1]; and what was drawn, [B, V', K, H, W, 3]: of the standing cameras
        the oldest frame with the arm redrawn, with glances then of the hand's what it holds, too.
    """
    hand, (views, known, *frame) = hand_poses(proprio), images.shape[1:]
    moving = hand, hand_poses(grasps), hand_views
    guesses = guess_frames(images, intrinsics, cameras, *moving, plane_heights, photographs)
    told = _where(intrinsics, cameras, proprio, kinematics)
    of_grasps = _where(intrinsics, cameras[:, :, known:], grasps, kinematics)

    def at_times(x: Array, of_grasps: Array) -> Array:
        """[B, V, F + K, D] and [B, V, K, D] to [B, V, K, TIMES, D]."""
        future = x[:, :, known:]
        oldest, newest = (jnp.broadcast_to(x[:, :, i, None], future.shape) for i in (0, known - 1))
        return jnp.stack([future, oldest, newest, of_grasps], axis=3)

    place, pose = (at_times(*x) for x in zip(told, of_grasps))
    place = place / jnp.array([frame[1], frame[0]])
    merge = lambda x: x.reshape(-1, *x.shape[3:])
    width = params["drawing"]["trunk"]["pose2"]["bias"].size
    on_stand = jnp.array([view for view in range(views) if view not in hand_views], jnp.int32)
    newest, oldest = jnp.moveaxis(guesses[:, on_stand], 3, 0)[:2]
    where = merge(place[:, on_stand])[:, :2], merge(pose[:, on_stand])[:, :2]
    drawn = ArmDrawing(width).apply({"params": params["drawing"]}, merge(oldest), *where).reshape(oldest.shape)
    first = jnp.stack([jax.lax.stop_gradient(drawn), newest], axis=3)
    guesses = guesses.at[:, on_stand, :, :2].set(first)
    if glances is not None:
        on_hand = jnp.array(sorted(hand_views), jnp.int32)
        behind = guesses[:, :, :, 3][:, on_hand]  # nothing that is newer than the oldest frame
        where = (merge(x[:, on_hand])[:, HELD_TIMES] for x in (place, pose))
        glances = merge(jnp.repeat(glances[:, None], len(on_hand), axis=1))
        held = ArmDrawing(width).apply({"params": params["held"]}, merge(behind), *where, glances)
        held = held.reshape(behind.shape)
        # A standing camera's frames need no further layer.
        layer = guesses[:, :, :, 0].at[:, on_hand].set(jax.lax.stop_gradient(held))
        guesses = jnp.concatenate([guesses, layer[:, :, :, None]], axis=3)
        drawn = jnp.concatenate([drawn, held], axis=1)
    inputs = merge(guesses), merge(place), merge(pose)
    composed = Compositor(width).apply({"params": params["choice"]}, *inputs)
    return composed.reshape(*guesses.shape[:3], *frame), drawn


def _where(intrinsics: Array, cameras: Array, proprio: Array, kinematics: Kinematics) -> tuple[Array, Array]:
    """The hand's pixel [B, V, T, 2], and poses [B, V, T, POSE]: in the world, then from the camera."""
    hand = hand_poses(proprio)
    pixels, depth = project(hand[:, None, :, None, :3, 3], intrinsics[:, :, None], cameras)
    low, high = workspace(kinematics)
    position = (2.0 * proprio[..., :3] - low - high) / (high - low)
    fingers = proprio[..., 6:] / jnp.maximum(jnp.abs(kinematics.finger_open), 1e-3)
    seen = jnp.einsum("bvtji,btjk->bvtik", cameras[..., :3, :3], hand[..., :3, :3]).reshape(*depth.shape[:3], 9)
    rotation = hand[..., :3, :3].reshape(*hand.shape[:2], 9)
    world = jnp.concatenate([position, fingers, rotation], axis=-1)[:, None]
    world = jnp.broadcast_to(world, (*depth.shape[:3], world.shape[-1]))
    return pixels[..., 0, :], jnp.concatenate([world, seen, depth], axis=-1)
