# SPDX-License-Identifier: Apache-2.0
"""The world simulator as a function of actions: World-Env's p(o' | o, s', a) behind `types.SimulatorFns`.

A chunk: actions advance proprioception deterministically, the predicted hand poses become action maps and delta
actions, DDIM denoises P latents (of all K frames, or of every so many-th, `SimulatorConfig.frame_stride`) beside the
sparse memory, and the decoder turns them into frames. The memory stays in latent space (EVAC): frames are encoded once,
at the start.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from worldenv_jax.networks.resampler import Resampler
from worldenv_jax.networks.vision_transformer import VisionTransformer
from worldenv_jax.simulator.arm_motion import ArmContext, init_arm_motion
from worldenv_jax.simulator.autoencoder import Autoencoder
from worldenv_jax.simulator.compositing import init_compositor
from worldenv_jax.simulator.conditioning import (
    ChunkInputs,
    chunk_inputs,
    decode_latents,
    encode_frames,
    encode_geometry_tokens,
    encode_image_tokens,
    make_glance,
    of_pictures,
    over_frames,
    predict_v,
    prepare,
)
from worldenv_jax.simulator.config import SimulatorConfig
from worldenv_jax.simulator.grips import Grip, no_grip
from worldenv_jax.simulator.memory import memory_slots
from worldenv_jax.simulator.noise_schedule import as_float32, ddim_tables, guide
from worldenv_jax.simulator.proprioception import Kinematics, advance_proprio, last_grasps
from worldenv_jax.simulator.reprojection import count_guesses
from worldenv_jax.simulator.sampler import sample_chunk
from worldenv_jax.simulator.video_unet import VideoUNet
from worldenv_jax.types import (
    ACTION_DIM,
    Array,
    Camera,
    GeometryFn,
    Params,
    Prediction,
    SimulatorFns,
    Starts,
    Statistics,
)


class SimulatorState(NamedTuple):
    """What a roll-out carries; N = F + max_chunks * P memory slots."""

    latents: Array  # float32 [B, V, N, h, w, c]
    proprio: Array  # float32 [B, N, 8]
    before: Array  # float32 [B, 8], proprioception one step before the newest
    action: Array  # float32 [B, 7], the last environment action; zeros at the start
    grasp: Array  # float32 [B, 8], where the hand was last open
    grip: Grip  # leaves [B], whether it holds something; only with "arm_motion"
    count: Array  # int32 [], filled slots; the first F all hold the first frame
    image_tokens: Array  # float [B, V * queries, D], of the first frame
    blank_tokens: Array | None  # the same for a blank image; None without guidance
    geometry_tokens: Array | None  # float [B, V * N, D], of the first frame; None where they are off
    camera: Camera  # of the first frame
    photographs: Array | None  # uint8 [B, V, H', W', 3], of the first frame; None where the configuration has none


@functools.partial(jax.jit, static_argnums=0)
def init_simulator(config: SimulatorConfig, key: Array) -> Params:
    """Random parameters: {"autoencoder", "image_encoder", "denoiser": {"unet", "image_resampler", "action_resampler"}}.

    With config.compositor_width also "compositor", with config.motion_width "arm_motion". Under `jax.eval_shape`
    nothing is allocated.
    """
    keys = jax.random.split(key, 5)
    unet, (height, width) = config.unet, config.latent_size
    video = jnp.zeros((1, 1, 2, height, width, unet.condition_channels + unet.latent_channels))
    tokens = jnp.zeros((1, 1, unet.context_width))
    features = jnp.zeros((1, 2, unet.frame_features)) if unet.frame_features else None
    geometry = jnp.zeros((1, 1, unet.geometry_width)) if unet.geometry_width else None
    one = jnp.zeros(1, jnp.int32)
    size = config.image_encoder.image_size
    init = lambda module, key, *inputs, **options: module.init(key, *inputs, **options)["params"]
    condition, latents = video[..., unet.latent_channels :], video[..., : unet.latent_channels]
    params = {
        "autoencoder": init(Autoencoder(config.autoencoder), keys[0], jnp.zeros((1, *config.image_size, 3))),
        "image_encoder": init(VisionTransformer(config.image_encoder), keys[1], jnp.zeros((1, size, size, 3))),
        "denoiser": {
            "unet": init(
                VideoUNet(unet), keys[2], latents, one[None], condition, tokens, tokens, one, one, features, geometry,
                method="initialise",
            ),
            "image_resampler": init(
                Resampler(config.image_resampler), keys[3], jnp.zeros((1, 1, config.image_resampler.input_width))
            ),
            "action_resampler": init(
                Resampler(config.action_resampler), keys[4], jnp.zeros((1, 1, config.action_resampler.input_width))
            ),
        },
    }  # fmt: skip
    if config.compositor_width:
        at = jax.random.fold_in(key, 6)
        drawn = config.image_size, count_guesses(config.plane_heights), config.glance_size
        params["compositor"] = init_compositor(config.compositor_width, at, *drawn)
    if config.motion_width:
        seen = len(config.motion_views), *config.latent_size, config.autoencoder.latent_channels
        at = jax.random.fold_in(key, 5)
        params["arm_motion"] = init_arm_motion(config.motion_width, at, seen, config.glance_size)
    return params


def extend_params(config: SimulatorConfig, key: Array, params: Params) -> Params:
    """Parameters of a model without geometry features plus fresh ones for them: still the same function.

    Only what `params` lacks is computed.
    """
    known = flatten_dict(params)

    def missing(key: Array) -> dict[tuple[str, ...], Array]:
        return {name: leaf for name, leaf in flatten_dict(init_simulator(config, key)).items() if name not in known}

    return unflatten_dict({**known, **jax.jit(missing)(key)})


def make_simulator_fns(
    config: SimulatorConfig, statistics: Statistics, kinematics: Kinematics, geometry: GeometryFn | None = None
) -> SimulatorFns:
    """The simulator for `rollout.imagine_rollout`.

    Args:
        statistics: of the data that the policy's normalised actions refer to.
        kinematics: how proprioception follows from environment actions.
        geometry: a frozen encoder, needed where config.unet.geometry_width is not 0; its parameters lie under
            "geometry_encoder" beside the simulator's own.

    A roll-out longer than config.max_chunks overwrites the newest memory; keys are arrays [B], one per trajectory.
    """
    tables = as_float32(ddim_tables(config.schedule, config.ddim_steps, config.eta, config.land_on_x0))

    def init(params: Params, keys: Array, starts: Starts) -> SimulatorState:
        del keys
        _check_starts(config, starts)
        latents = encode_frames(config, params, starts.images)
        slots = config.history + config.max_chunks * config.pictures
        images = starts.images.astype(jnp.float32) / 127.5 - 1.0
        blank = None if config.guidance == 1.0 else encode_image_tokens(config, params, jnp.zeros_like(images))
        return SimulatorState(
            latents=jnp.broadcast_to(latents[:, :, None], (*latents.shape[:2], slots, *latents.shape[2:])),
            proprio=jnp.broadcast_to(starts.proprio[:, None], (len(latents), slots, starts.proprio.shape[-1])),
            before=starts.proprio,
            action=jnp.zeros((len(latents), ACTION_DIM)),
            grasp=starts.proprio,
            grip=no_grip(len(latents)),
            count=jnp.int32(config.history),
            image_tokens=encode_image_tokens(config, params, images),
            blank_tokens=blank,
            geometry_tokens=encode_geometry_tokens(config, params, geometry, images),
            camera=starts.camera,
            photographs=starts.photographs if config.photograph_size else None,
        )

    def step(params: Params, keys: Array, state: SimulatorState, actions: Array) -> tuple[SimulatorState, Prediction]:
        slots = memory_slots(state.count, config.history)
        history, past = state.latents[:, :, slots], state.proprio[:, slots]
        commands = statistics.unnormalize_action(actions)
        arm = None
        if "arm_motion" in params:
            seen = history[:, jnp.array(config.motion_views), -1][:, None]
            glance = make_glance(config, state.photographs, state.camera, kinematics)
            arm = ArmContext(params["arm_motion"], state.action, seen, state.grip, glance)
        advance = advance_proprio(kinematics, state.before, past[:, -1], commands, arm)
        future = advance.proprio
        grasps = last_grasps(kinematics, state.grasp, future)
        shown = of_pictures(config, future)
        hand = jnp.concatenate([past, shown], axis=1), of_pictures(config, grasps)
        scene = state.camera, statistics, kinematics, state.photographs
        inputs = chunk_inputs(config, params, history, *hand, actions, *scene)
        inputs = inputs._replace(geometry_tokens=state.geometry_tokens)

        denoise = make_denoiser(config, params, inputs, state.image_tokens, state.blank_tokens)
        start_noise, step_noise = _draw_noise(config, keys, inputs.image_latents.shape)
        latents, _ = sample_chunk(denoise, inputs.image_latents, start_noise, step_noise, tables)
        latents = latents[:, :, config.history :]
        new = state._replace(
            latents=jax.lax.dynamic_update_slice_in_dim(state.latents, latents, state.count, axis=2),
            proprio=jax.lax.dynamic_update_slice_in_dim(state.proprio, shown, state.count, axis=1),
            before=jnp.concatenate([past[:, -1:], future], axis=1)[:, -2],
            action=commands[:, -1],
            grasp=grasps[:, -1],
            grip=jax.tree.map(lambda leaf: leaf[:, -1], advance.grip),
            count=state.count + config.pictures,
        )
        decode = functools.partial(decode_latents, config, params)
        frames = over_frames(config, decode, jnp.moveaxis(latents, 1, 2), axis=1)
        return new, Prediction(jnp.repeat(frames, config.frame_stride, axis=1), future)

    return SimulatorFns(init, step)


def make_denoiser(
    config: SimulatorConfig, params: Params, inputs: ChunkInputs, image_tokens: Array, blank_tokens: Array | None
):
    """(latents, step) to v, with classifier-free guidance where config.guidance is not 1.

    The unconditional pass sees the tokens of a blank image, geometry tokens that are 0 and no image latents on future
    frames.
    """
    prepared = prepare(config, params, inputs, image_tokens)
    steps = lambda latents, t: jnp.full(latents.shape[:2], t)
    conditional = lambda latents, t: predict_v(config, params, latents, steps(latents, t), prepared)
    if config.guidance == 1.0:
        return conditional
    is_history = jnp.arange(config.frames) < config.history
    present = inputs.present * is_history
    image_latents = inputs.image_latents * is_history[:, None, None, None]
    bare = inputs._replace(image_latents=image_latents, present=present)
    if bare.geometry_tokens is not None:
        bare = bare._replace(geometry_tokens=jnp.zeros_like(bare.geometry_tokens))
    bare = prepare(config, params, bare, blank_tokens)

    def guided(latents: Array, t: Array) -> Array:
        unconditional = predict_v(config, params, latents, steps(latents, t), bare)
        return guide(conditional(latents, t), unconditional, config.guidance, config.guidance_rescale)

    return guided


def _draw_noise(config: SimulatorConfig, keys: Array, shape: tuple[int, ...]) -> tuple[Array, Array | None]:
    """Start noise [B, V, P, ...] and, with eta > 0, step noise [S, B, V, T, ...]; row b depends on keys[b] only."""
    views, _, *latent = shape[1:]
    start = jax.vmap(lambda key: jax.random.normal(key, (views, config.pictures, *latent)))(keys)
    if config.eta == 0.0:
        return start, None
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, 1), (config.ddim_steps, *shape[1:]))
    return start, jnp.moveaxis(jax.vmap(draw)(keys), 0, 1)


def _check_starts(config: SimulatorConfig, starts: Starts) -> None:
    expected = {
        "images": (starts.images.shape[1:], (config.views, *config.image_size, 3)),
        "camera.intrinsics": (starts.camera.intrinsics.shape[1:], (config.views, 3, 3)),
        "camera.pose": (starts.camera.pose.shape[1:], (config.views, 4, 4)),
    }
    if config.photograph_size:
        got = None if starts.photographs is None else starts.photographs.shape[1:]
        expected["photographs"] = got, config.photographs_shape
    wrong = [f"{name} [B, {got}], expected [B, {need}]" for name, (got, need) in expected.items() if got != need]
    if wrong:
        raise ValueError("simulator starts: " + "; ".join(wrong))
