# SPDX-License-Identifier: Apache-2.0
"""EVAC's own roll-out: two arms whose poses are all known beforehand, one camera, chunk after chunk in latent space.

This is how a released checkpoint is used (open loop, recorded or planned poses); reinforcement learning uses
`world_simulator`. `SimulatorConfig.reference_quirks` follows the published program where it differs from its design:
the delta actions of every chunk but the first are shifted by F - 1 rows and one row too long (shorter at the end),
and the image tokens of later chunks come from the decoded first frame.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.simulator.action_maps import ray_maps, scale_intrinsics
from worldenv_jax.simulator.conditioning import (
    ChunkInputs,
    decode_images,
    decode_latents,
    embed_maps,
    encode_image_tokens,
    encode_images,
    repeat_last,
)
from worldenv_jax.simulator.config import SimulatorConfig
from worldenv_jax.simulator.delta_actions import normalize_deltas
from worldenv_jax.simulator.evac_pictures import draw_pictures, drawn_poses, two_arm_deltas
from worldenv_jax.simulator.memory import memory_slots
from worldenv_jax.simulator.noise_schedule import as_float32, ddim_tables
from worldenv_jax.simulator.sampler import sample_chunk
from worldenv_jax.simulator.world_simulator import make_denoiser
from worldenv_jax.types import Array, Params

# EVAC's delta actions over AgiBotWorld: xyz and roll-pitch-yaw of the left arm, then of the right.
DELTA_MEAN = np.array([
    2.949369387467578e-05, -2.4703978620566167e-09, -3.214520512208581e-05, -1.0488863132125087e-04,
    6.125598648383931e-06, 9.914418478635093e-05, 2.5206249689794423e-05, 2.386436953835608e-07,
    -3.6538445098187414e-05, -1.170051017729845e-04, 9.653312579896854e-06, -1.260203458056615e-04,
])  # fmt: skip
DELTA_STD = np.array([
    8.946039574389581e-04, 1.1014855217635904e-03, 1.0237522979384508e-03, 1.0402864950142636e-02,
    4.9353766216338945e-03, 1.0759416673279353e-02, 9.43621432585622e-04, 1.3782102901814636e-03,
    1.1818999106504536e-03, 7.539298011753274e-03, 4.32025757794631e-03, 8.14967716114264e-03,
])  # fmt: skip


class PosePlan(NamedTuple):
    """A sequence of n poses, ready for the denoiser; rows begin with F - 1 copies of the first pose."""

    deltas: np.ndarray  # float64 [n - 1, 14], normalised
    pictures: np.ndarray  # uint8 [n + F - 1, H, W, 3]
    rays: np.ndarray  # float32 [n + F - 1, h, w, 6]


class PoseChunk(NamedTuple):
    """One chunk of the roll-out, with what the denoiser was given."""

    inputs: ChunkInputs
    image_tokens: Array  # [1, queries, D]
    blank_tokens: Array | None
    latents: Array  # float32 [1, 1, F + K, h, w, c], history included
    frames: Array  # uint8 [K, H, W, 3]


def plan_poses(
    config: SimulatorConfig,
    poses: np.ndarray,
    camera_to_world: np.ndarray,
    intrinsics: np.ndarray,
    source_size: tuple[int, int],
    stride: int = 1,
) -> PosePlan:
    """Draws and standardises a sequence of two-arm poses.

    Args:
        poses: float64 [n, 16]: position (m), quaternion xyzw, gripper (0 to about 120); left arm, then right.
        camera_to_world: float [n + F - 1, 4, 4]: of every pose, the first repeated for the history.
        intrinsics: float [3, 3], in pixels of the recorded images.
        source_size: height and width of the recorded images.
        stride: recorded frames per step; the deltas' statistics grow with it.

    Raises ValueError where lengths disagree, or a camera matrix is singular or not finite.
    """
    expected = len(poses) + config.history - 1
    if poses.shape[1:] != (16,) or len(camera_to_world) != expected:
        got = f"poses {list(poses.shape)} and {len(camera_to_world)} camera poses"
        raise ValueError(f"pose plan: got {got}, expected poses [n, 16] and n + {config.history - 1} camera poses")
    matrices = np.concatenate([np.asarray(camera_to_world, np.float64)[:, :3, :3], np.asarray(intrinsics)[None]])
    if not np.isfinite(matrices).all() or (np.abs(np.linalg.det(matrices)) < 1e-9).any():
        raise ValueError("pose plan: a camera matrix is singular or not finite")
    (height, width), (latent_height, latent_width) = config.image_size, config.latent_size
    camera_to_world = np.asarray(camera_to_world, np.float64)
    scaled = scale_intrinsics(np.asarray(intrinsics, np.float64), height / source_size[0], width / source_size[1])
    latent = scale_intrinsics(scaled, latent_height / height, latent_width / width)
    latent = np.broadcast_to(latent, (expected, 3, 3))
    drawn = drawn_poses(np.asarray(poses, np.float64), config.history)
    return PosePlan(
        normalize_deltas(two_arm_deltas(np.asarray(poses, np.float64)), stride * DELTA_MEAN, stride * DELTA_STD),
        draw_pictures(drawn, scaled, camera_to_world, config.action_map, height, width),
        ray_maps(latent, camera_to_world, latent_height, latent_width).astype(np.float32),
    )


def rollout_poses(
    config: SimulatorConfig, params: Params, image: np.ndarray, plan: PosePlan, num_chunks: int, noise
) -> Iterator[PoseChunk]:
    """Predicts num_chunks * K frames.

    Args:
        image: float [H, W, 3] in [0, 1], of any size.
        plan: `plan_poses`; where it is too short, its last row is repeated and deltas are 0.
        noise: function of (chunk, history and future shape [1, 1, F + K, h, w, c]) to the start noise
            [1, 1, K, h, w, c] and the step noise [S, 1, 1, F + K, h, w, c] or None; see `draw_noise`.

    Raises ValueError where config.frame_stride is not 1.
    """
    if config.frame_stride != 1:
        raise ValueError(f"a roll-out of poses generates every frame, but frame_stride is {config.frame_stride}")
    run = jax.jit(functools.partial(_run_chunk, config))
    first = jnp.asarray(resize_image(image, config.image_size))
    latents = jax.jit(functools.partial(encode_images, config))(params, first[None])
    latents = jnp.repeat(latents, config.history, axis=0)
    for chunk in range(num_chunks):
        slots = memory_slots(len(latents), config.history)
        pictures, rays, deltas = _chunk_rows(config, plan, chunk, slots)
        if chunk and config.reference_quirks:
            first = decode_images(config, params, latents[slots[0]])
        shape = (1, 1, config.frames, *latents.shape[1:])
        result = run(params, first, latents[slots], pictures, rays, deltas, *noise(chunk, shape))
        latents = jnp.concatenate([latents, result.latents[0, 0, config.history :]])
        yield result


def draw_noise(config: SimulatorConfig, key: Array):
    """Gaussian noise for `rollout_poses`."""

    def noise(chunk: int, shape: tuple[int, ...]) -> tuple[Array, Array | None]:
        start, step = jax.random.split(jax.random.fold_in(key, chunk))
        start = jax.random.normal(start, (*shape[:2], config.chunk, *shape[3:]))
        return start, jax.random.normal(step, (config.ddim_steps, *shape)) if config.eta else None

    return noise


def resize_image(image: np.ndarray, size: tuple[int, int]) -> Array:
    """float [H, W, 3] in [0, 1] to float32 [*size, 3] in [-1, 1]: bilinear with antialiasing."""
    return 2.0 * jax.image.resize(jnp.asarray(image, jnp.float32), (*size, 3), "linear", antialias=True) - 1.0


def _chunk_rows(
    config: SimulatorConfig, plan: PosePlan, chunk: int, slots: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Future pictures [K, H, W, 3], rays of all frames [F + K, h, w, 6], and deltas [rows, 14] of one chunk."""
    last = chunk * config.chunk + config.history - 1
    wanted = np.concatenate([slots[:-1], np.arange(last, last + config.chunk + 1)])
    rows = np.minimum(wanted, len(plan.pictures) - 1)
    begin, end = chunk * config.chunk, (chunk + 1) * config.chunk
    if config.reference_quirks and chunk:
        # The published program slices the deltas like the pictures.
        begin, end = last, last + config.chunk + 1
    deltas = plan.deltas[begin:end]
    if not config.reference_quirks or wanted[-1] >= len(plan.pictures):
        deltas = np.concatenate([deltas, np.zeros((max(config.chunk - len(deltas), 0), deltas.shape[1]))])
    return plan.pictures[rows[config.history :]], plan.rays[rows], deltas


def _run_chunk(
    config: SimulatorConfig, params: Params, first: Array, history: Array, pictures: Array, rays: Array, deltas: Array,
    start_noise: Array, step_noise: Array | None,
) -> PoseChunk:  # fmt: skip
    tables = as_float32(ddim_tables(config.schedule, config.ddim_steps, config.eta, config.land_on_x0))
    inputs = ChunkInputs(
        image_latents=repeat_last(history[None, None], config.chunk),
        present=jnp.ones((1, 1, config.frames)),
        maps=embed_maps(config, params, pictures[None, None].astype(jnp.float32) / 255.0),
        rays=rays[None, None],
        deltas=deltas[None].astype(jnp.float32),
    )
    tokens = encode_image_tokens(config, params, first[None, None])
    blank = None
    if config.guidance != 1.0:
        blank = encode_image_tokens(config, params, jnp.zeros_like(first)[None, None])
    denoise = make_denoiser(config, params, inputs, tokens, blank)
    latents, _ = sample_chunk(denoise, inputs.image_latents, start_noise, step_noise, tables)
    frames = decode_latents(config, params, latents[0, 0, config.history :])
    return PoseChunk(inputs, tokens, blank, latents, frames)
