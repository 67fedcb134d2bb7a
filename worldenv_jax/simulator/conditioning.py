# SPDX-License-Identifier: Apache-2.0
"""What the denoiser is told: image tokens, delta actions, action maps, rays, and the clean history (EVAC).

Training and roll-out call the same functions, so that they see the same conditioning.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from worldenv_jax.errors import WorldEnvError
from worldenv_jax.networks.resampler import Resampler
from worldenv_jax.networks.vision_transformer import VisionTransformer
from worldenv_jax.simulator.action_maps import (
    draw_action_map,
    project,
    ray_maps,
    scale_intrinsics,
    tool_points,
)
from worldenv_jax.simulator.autoencoder import Autoencoder, space_to_depth
from worldenv_jax.simulator.compositing import compose
from worldenv_jax.simulator.config import SimulatorConfig
from worldenv_jax.simulator.delta_actions import delta_actions, normalize_deltas
from worldenv_jax.simulator.glance import GlanceFn, look_around
from worldenv_jax.simulator.image_preprocess import clip_preprocess
from worldenv_jax.simulator.noise_schedule import noise_schedule
from worldenv_jax.simulator.poses import (
    hand_poses,
    inverse_transform,
    quaternion_from_axis_angle,
)
from worldenv_jax.simulator.proprioception import Kinematics, ground, relative_pose
from worldenv_jax.simulator.video_unet import Prepared, VideoUNet
from worldenv_jax.types import Array, Camera, GeometryFn, Params, Statistics


class ChunkInputs(NamedTuple):
    """Everything about one chunk that is not noise; T = F + P frames, P of them new (config.pictures)."""

    image_latents: Array  # float [B, V, T, h, w, c]: the history, then its last frame P times (or first pictures)
    present: Array  # float [B, V, T]: 1 where image_latents are given
    maps: Array  # float [B, V, T, h, w, map channels]; 0 on history frames
    rays: Array  # float [B, V, T, h, w, 6]
    deltas: Array  # float [B, P, 7 * arms], normalised delta actions
    frame_features: Array | None = None  # float [B, T, FRAME_FEATURES] where the configuration has them
    geometry_tokens: Array | None = None  # float [B, V * N, unet.geometry_width] where the configuration has them


def encode_frames(config: SimulatorConfig, params: Params, frames: Array) -> Array:
    """Frames uint8 [..., H, W, 3] to scaled latents float32 [..., h, w, c], the mean of the posterior.

    Raises ValueError where frames are not uint8 of the configured size.
    """
    if frames.dtype != jnp.uint8 or frames.shape[-3:] != (*config.image_size, 3):
        expected = f"uint8 [..., {config.image_size[0]}, {config.image_size[1]}, 3]"
        raise ValueError(f"simulator: got frames {frames.dtype} {list(frames.shape)}, expected {expected}")
    return encode_images(config, params, frames.astype(jnp.float32) / 127.5 - 1.0)


def encode_images(config: SimulatorConfig, params: Params, images: Array) -> Array:
    """Images float [..., H, W, 3] in [-1, 1] to scaled latents float32 [..., h, w, c]."""
    flat = images.reshape(-1, *images.shape[-3:])
    mean, _ = Autoencoder(config.autoencoder).apply({"params": params["autoencoder"]}, flat, method="encode")
    return config.latent_scale * mean.reshape(*images.shape[:-3], *mean.shape[1:])


def decode_images(config: SimulatorConfig, params: Params, latents: Array) -> Array:
    """Scaled latents [..., h, w, c] to images float32 [..., H, W, 3] in [-1, 1]."""
    flat = latents.reshape(-1, *latents.shape[-3:]) / config.latent_scale
    images = Autoencoder(config.autoencoder).apply({"params": params["autoencoder"]}, flat, method="decode")
    return jnp.clip(images, -1.0, 1.0).reshape(*latents.shape[:-3], *images.shape[1:])


def decode_latents(config: SimulatorConfig, params: Params, latents: Array) -> Array:
    """Scaled latents [..., h, w, c] to frames uint8 [..., H, W, 3]."""
    images = decode_images(config, params, latents)
    return jnp.round(255.0 * jnp.clip((images + 1.0) / 2.0, 0.0, 1.0)).astype(jnp.uint8)


def over_frames(config: SimulatorConfig, function: Callable[[Array], Array], x: Array, axis: int) -> Array:
    """A function of images [..., H, W, C] applied to x, one frame along `axis` at a time where so configured."""
    if not config.frame_by_frame:
        return function(x)
    return jnp.moveaxis(jax.lax.map(function, jnp.moveaxis(x, axis, 0)), 0, axis)


def encode_image_tokens(config: SimulatorConfig, params: Params, images: Array) -> Array:
    """First frames float [B, V, H, W, 3] in [-1, 1] to context tokens [B, V * queries, D]."""
    batch, views = images.shape[:2]
    pixels = clip_preprocess(images.reshape(-1, *images.shape[2:]), config.image_encoder.image_size)
    tokens = VisionTransformer(config.image_encoder).apply({"params": params["image_encoder"]}, pixels)
    resampler = Resampler(config.image_resampler)
    tokens = resampler.apply({"params": params["denoiser"]["image_resampler"]}, tokens)
    return tokens.reshape(batch, views * tokens.shape[1], -1)


def encode_geometry_tokens(
    config: SimulatorConfig, params: Params, encoder: GeometryFn | None, images: Array
) -> Array | None:
    """First frames float [B, V, H, W, 3] in [-1, 1] to geometry tokens [B, V * N, D]; None where they are off.

    Args:
        params: the encoder's own lie under "geometry_encoder", and get no gradient; {} where there are none.
        encoder: must be given where config.unet.geometry_width is not 0.

    Raises:
        WorldEnvError: no encoder, or one with another D.
    """
    width = config.unet.geometry_width
    if not width:
        return None
    if encoder is None:
        raise WorldEnvError(
            f"unet.geometry_width is {width}, but no geometry encoder was given: pass geometry=f with "
            f"f(params, images [B, V, H, W, 3] in [-1, 1]) -> tokens [B, V, N, {width}], or set the width to 0"
        )
    tokens = jax.lax.stop_gradient(encoder(params.get("geometry_encoder", {}), images))
    if tokens.ndim != 4 or tokens.shape[:2] != images.shape[:2] or tokens.shape[-1] != width:
        expected = f"[{images.shape[0]}, {images.shape[1]}, N, {width}]"
        raise WorldEnvError(f"the geometry encoder returned tokens {list(tokens.shape)}, expected {expected}")
    return tokens.reshape(len(tokens), -1, width)


def encode_action_tokens(config: SimulatorConfig, params: Params, deltas: Array) -> Array:
    """Normalised delta actions [B, P, 7 * arms] to context tokens [B, queries, D]."""
    resampler = Resampler(config.action_resampler)
    return resampler.apply({"params": params["denoiser"]["action_resampler"]}, deltas)


def repeat_last(history: Array, chunk: int) -> Array:
    """History latents [B, V, F, ...] followed by `chunk` copies of the last."""
    return jnp.concatenate([history, jnp.repeat(history[:, :, -1:], chunk, axis=2)], axis=2)


def of_pictures(config: SimulatorConfig, x: Array, axis: int = 1) -> Array:
    """What belongs to the generated frames of a chunk: every config.frame_stride-th of K along `axis`."""
    return jax.lax.slice_in_dim(x, config.frame_stride - 1, None, config.frame_stride, axis)


def chunk_inputs(
    config: SimulatorConfig,
    params: Params,
    history: Array,
    proprio: Array,
    grasps: Array,
    actions: Array,
    camera: Camera,
    statistics: Statistics,
    kinematics: Kinematics,
    photographs: Array | None = None,
) -> ChunkInputs:
    """Conditioning of one chunk for a single arm.

    Args:
        history: float [B, V, F, h, w, c], scaled latents.
        proprio: float32 [B, F + P, 8], of the history and of the frames that are generated.
        grasps: float32 [B, P, 8], `last_grasps` of the latter.
        actions: float32 [B, K, 7], normalised.
        camera: of the frame that proprio[:, 0] belongs to; leaves [B, V, ...].
        photographs: uint8 [B, V, H', W', 3] of that frame, where the configuration has one.
    """
    batch, views, frames = *history.shape[:2], config.frames
    quaternion = quaternion_from_axis_angle(proprio[..., 3:6])
    hand = hand_poses(proprio)
    rotation, poses = hand[..., :3, :3], camera_poses(config, hand, camera.pose)
    height, width = config.image_size
    latent_height, latent_width = config.latent_size
    intrinsics = camera.intrinsics[:, :, None]
    latent_intrinsics = scale_intrinsics(intrinsics, latent_height / height, latent_width / width)
    latent_intrinsics = jnp.broadcast_to(latent_intrinsics, (batch, views, frames, 3, 3))

    opening = gripper_opening(proprio, kinematics)
    points = tool_points(rotation, proprio[..., :3], config.action_map)
    future = slice(config.history, None)
    pixels, depth = project(points[:, None, future], intrinsics, poses[:, :, future])
    opening_of_views = jnp.broadcast_to(opening[:, None, future], (batch, views, config.pictures))
    drawn = draw_action_map(pixels, depth, opening_of_views, config.action_map, height, width)
    maps = embed_maps(config, params, drawn)

    last = slice(config.history - 1, None)
    deltas = delta_actions(proprio[:, last, :3], quaternion[:, last], opening[:, last])
    gain = jnp.maximum(jnp.abs(kinematics.gain), 1e-4)
    deltas = normalize_deltas(deltas, jnp.zeros(6), config.frame_stride * gain)
    image_latents = repeat_last(history, config.pictures)
    if config.compositor_width:
        images = jax.lax.stop_gradient(decode_images(config, params, history))
        first, _ = compose_pictures(config, params, images, proprio, grasps, camera, kinematics, photographs)
        image_latents = image_latents.at[:, :, future].set(encode_images(config, params, first))
    return ChunkInputs(
        image_latents=image_latents,
        present=jnp.ones((batch, views, frames)),
        maps=maps,
        rays=ray_maps(latent_intrinsics, poses, latent_height, latent_width),
        deltas=jnp.tile(deltas, config.arms),
        frame_features=_frame_features(config, proprio, actions, statistics, kinematics),
    )


def camera_poses(config: SimulatorConfig, hand: Array, pose: Array) -> Array:
    """Camera to world of every frame, [B, V, T, 4, 4]; the hand's cameras keep their place on the hand [B, T, 4, 4]."""
    still = jnp.broadcast_to(pose[:, :, None], (*pose.shape[:2], hand.shape[1], 4, 4))
    if not config.hand_views:
        return still
    since_start = jnp.einsum("btij,bjk->btik", hand, inverse_transform(hand[:, 0]))
    moved = jnp.einsum("btij,bvjk->bvtik", since_start, pose)
    on_hand = jnp.isin(jnp.arange(pose.shape[1]), jnp.array(config.hand_views))
    return jnp.where(on_hand[:, None, None, None], moved, still)


def compose_pictures(
    config: SimulatorConfig,
    params: Params,
    images: Array,
    proprio: Array,
    grasps: Array,
    camera: Camera,
    kinematics: Kinematics,
    photographs: Array | None = None,
) -> tuple[Array, Array]:
    """First pictures of the frames after images float [B, V, F, H, W, 3] in [-1, 1]; see `compose`.

    Args:
        proprio: float32 [B, F + K, 8], of known and future frames.
        grasps: float32 [B, K, 8], `last_grasps` of the future frames.
        camera: of the frame that proprio[:, 0] belongs to; leaves [B, V, ...].
        photographs: as in `chunk_inputs`.
    """
    glance = make_glance(config, photographs, camera, kinematics)
    glances = None if glance is None else glance(grasps[..., :3])
    if photographs is not None:
        photographs = photographs.astype(jnp.float32) / 127.5 - 1.0
    poses = camera_poses(config, hand_poses(proprio), camera.pose)
    heights = tuple(ground(kinematics) + height for height in config.plane_heights)
    geometry = camera.intrinsics, poses, proprio, grasps, kinematics, config.hand_views, heights
    return compose(params["compositor"], images, *geometry, photographs, glances)


def make_glance(
    config: SimulatorConfig, photographs: Array | None, camera: Camera, kinematics: Kinematics
) -> GlanceFn | None:
    """Looks at hands in the photograph of the first standing camera; None where the configuration has no glances.

    Args:
        photographs: uint8 [B, V, H', W', 3].
        camera: of the same frame, for images of config.image_size; leaves [B, V, ...].
        kinematics: for its ground.
    """
    if not config.glance_size:
        return None
    stand = next(view for view in range(config.views) if view not in config.hand_views)
    finer = [config.photograph_size / size for size in config.image_size]
    lens, height = scale_intrinsics(camera.intrinsics[:, stand], *finer), ground(kinematics) + config.plane_heights[0]
    return look_around(photographs[:, stand], lens, camera.pose[:, stand], height, config.glance_size)


def gripper_opening(proprio: Array, kinematics: Kinematics) -> Array:
    """How far the fingers are open, 0 to 1; [..., 8] to [...]."""
    width = lambda fingers: fingers[..., 0] - fingers[..., 1]
    opened, closed = width(kinematics.finger_open), width(kinematics.finger_closed)
    return jnp.clip((width(proprio[..., 6:]) - closed) / jnp.maximum(opened - closed, 1e-6), 0.0, 1.0)


def embed_maps(config: SimulatorConfig, params: Params, drawn: Array) -> Array:
    """Future action maps [B, V, P, H, W, 3] in [0, 1] to [B, V, F + P, h, w, map channels], 0 on history frames."""
    drawn = drawn * 2.0 - 1.0
    if config.map_latents:
        maps = over_frames(config, functools.partial(encode_images, config, params), drawn, axis=2)
    else:
        maps = space_to_depth(drawn.reshape(-1, *drawn.shape[3:]), config.autoencoder.downsampling)
        maps = maps.reshape(*drawn.shape[:3], *maps.shape[1:])
    return jnp.pad(maps, ((0, 0), (0, 0), (config.history, 0), (0, 0), (0, 0), (0, 0)))


def prepare(config: SimulatorConfig, params: Params, inputs: ChunkInputs, image_tokens: Array) -> Prepared:
    """Everything that the denoising steps of one chunk share."""
    present = jnp.broadcast_to(inputs.present[..., None, None, None], (*inputs.rays.shape[:-1], 1))
    condition = jnp.concatenate([inputs.image_latents, present, inputs.maps, inputs.rays], axis=-1)
    batch = len(condition)
    prepared = VideoUNet(config.unet).apply(
        {"params": params["denoiser"]["unet"]},
        condition,
        image_tokens,
        encode_action_tokens(config, params, inputs.deltas),
        jnp.full(batch, config.frame_rate),
        jnp.full(batch, config.domain),
        inputs.frame_features,
        inputs.geometry_tokens,
        method="prepare",
    )
    if config.change_variance is None:
        return prepared
    return prepared._replace(reference=inputs.image_latents)


def predict_v(config: SimulatorConfig, params: Params, latents: Array, t: Array, prepared: Prepared) -> Array:
    """The denoiser's v for latents [B, V, F + P, h, w, c] at the noise steps t [B, V]."""
    unet = {"params": params["denoiser"]["unet"]}
    v, reference = VideoUNet(config.unet).apply(unet, latents, t, config.history, prepared), prepared.reference
    return v if reference is None else v + guess_v(config, latents, t, reference)


def guess_v(config: SimulatorConfig, latents: Array, t: Array, reference: Array) -> Array:
    """The v of the most likely x0 given the noisy latents, were x0 ~ N(reference, config.change_variance).

    With x = a x0 + s eps, a^2 + s^2 = 1: x0 = ((1 - k) reference + k x / a), k = a^2 V / (a^2 V + s^2), and
    v = a eps - s x0 = (a x - x0) / s.

    Args:
        latents, reference: float [B, V, T, h, w, c]; the reference before the schedule's rescaling.
        t: int [B, V], noise steps.
    """
    schedule, variance = noise_schedule(config.schedule), config.change_variance
    at = lambda table: jnp.asarray(table, jnp.float32)[t][..., None, None, None, None]
    squared = at(schedule.alphas_cumprod)
    a, s = jnp.sqrt(squared), jnp.sqrt(1.0 - squared)
    total = squared * variance + s**2
    x0 = (s**2 * reference * at(schedule.x0_scale) + a * variance * latents) / total
    return (a * latents - x0) / s


def _frame_features(
    config: SimulatorConfig, proprio: Array, actions: Array, statistics: Statistics, kinematics: Kinematics
) -> Array | None:
    if not config.unet.frame_features:
        return None
    actions = jnp.clip(actions, -1.5, 1.5)
    actions = actions.reshape(len(actions), config.pictures, config.frame_stride, -1).mean(2)
    actions = jnp.pad(actions, ((0, 0), (config.history, 0), (0, 0)))
    reference = jnp.broadcast_to(proprio[:, config.history - 1 : config.history], proprio.shape)
    motion = relative_pose(proprio, reference) / jnp.maximum(jnp.abs(kinematics.gain), 1e-4)
    return jnp.concatenate([actions, statistics.normalize_proprio(proprio), jnp.clip(motion, -8.0, 8.0)], axis=-1)
