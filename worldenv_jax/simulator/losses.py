# SPDX-License-Identifier: Apache-2.0
"""Training losses of the simulator: of autoencoder and compositor, and v-prediction with a noised history (EVAC)."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.simulator.action_maps import project
from worldenv_jax.simulator.arm_motion import ArmContext
from worldenv_jax.simulator.autoencoder import Autoencoder
from worldenv_jax.simulator.conditioning import (
    camera_poses,
    chunk_inputs,
    compose_pictures,
    decode_images,
    encode_geometry_tokens,
    encode_image_tokens,
    make_glance,
    of_pictures,
    predict_v,
    prepare,
)
from worldenv_jax.simulator.config import SimulatorConfig
from worldenv_jax.simulator.grips import DECIDES, Grip
from worldenv_jax.simulator.noise_schedule import (
    add_noise,
    noise_schedule,
    sinusoid_steps,
    trailing_timesteps,
    v_target,
)
from worldenv_jax.simulator.poses import hand_poses
from worldenv_jax.simulator.proprioception import (
    Kinematics,
    advance_proprio,
    finger_opening,
    last_grasps,
    relative_pose,
)
from worldenv_jax.types import Array, Camera, GeometryFn, Params, Statistics

CHAIN = 4  # pictures that the compositor is unrolled over
BLIND = 0.5  # share of the chains that know the oldest frame only
GRASP_SMOOTHING = 0.1  # of the labels of `ArmMotion.grasps` (Szegedy et al. 2016, arXiv 1512.00567, section 7)
CHARBONNIER = 0.03  # of the range [-1, 1]: smaller errors count quadratically
HAND_WEIGHT = 9.0  # what errors at the hand count beside 1 elsewhere
HAND_RADIUS = 0.08  # of the image's width


class SimulatorBatch(NamedTuple):
    """Windows of recorded episodes, cut as a roll-out will see them.

    For a window that predicts the frames after step s: the history is the episode's frames
    `memory.history_steps(s, F)` (the first, those at one and two thirds, s itself), the future the frames
    s + 1 .. s + K, repeated at the episode's end where `mask` is False.
    """

    latents: Array  # float32 [B, F + K, V, h, w, c], `encode_frames` of history and future
    first_images: Array  # uint8 [B, V, H, W, 3], the oldest history frame
    proprio: Array  # float32 [B, F, 8], of the history
    previous_proprio: Array  # float32 [B, 8], one step before s; that of s where s = 0
    previous_action: Array  # float32 [B, 7], environment action of step s - 1; zeros where s = 0
    grasp: Array  # float32 [B, 8], where the hand was last open, as of s
    grip: Grip  # leaves [B], as of s
    holds: Array  # float32 [B, K], `Grip.holds` after each action
    actions: Array  # float32 [B, K, 7], normalised, of the steps s .. s + K - 1
    camera: Camera  # of the oldest history frame, leaves [B, V, ...]
    mask: Array  # bool [B, K], False on future frames that do not exist
    photographs: Array | None = None  # uint8 [B, V, H', W', 3], of the oldest history frame, where the config has one


class MotionBatch(NamedTuple):
    """Stretches of L steps of recorded episodes."""

    proprio: Array  # float32 [B, L + 1, 8], before each action and after the last
    actions: Array  # float32 [B, L, 7], environment actions
    previous_proprio: Array  # float32 [B, 8], one step before the stretch; its first at the start of an episode
    previous_action: Array  # float32 [B, 7], zeros at the start of an episode
    pictures: Array  # float [B, P, V, h, w, c], latents of `motion_views` before every (L / P)-th action
    grip: Grip  # leaves [B], before the stretch
    holds: Array  # float32 [B, L], `Grip.holds` after each action
    camera: Camera  # of the episode's first frame, leaves [B, V, ...]
    photographs: Array | None = None  # uint8 [B, V, H', W', 3], of that frame, where the config has one


def autoencoder_loss(
    config: SimulatorConfig, params: Params, key: Array, frames: Array
) -> tuple[Array, dict[str, Array]]:
    """Squared reconstruction error and the KL divergence from N(0, 1), for frames uint8 [N, H, W, 3].

    Absolute errors would let small objects wait: their pixels are few, and the background's many errors are small.

    Returns: the loss, and {"reconstruction", "kl", "psnr"} (decibels at a range of 255).
    """
    model, variables = Autoencoder(config.autoencoder), {"params": params["autoencoder"]}
    images = frames.astype(jnp.float32) / 127.5 - 1.0
    mean, log_variance = model.apply(variables, images, method="encode")
    latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    error = model.apply(variables, latents, method="decode") - images
    reconstruction = jnp.mean(error**2)
    kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)
    metrics = {"reconstruction": reconstruction, "kl": kl, "psnr": -10.0 * jnp.log10(reconstruction / 4.0)}
    return reconstruction + config.autoencoder.kl_weight * kl, metrics


def measure_latent_scale(config: SimulatorConfig, params: Params, frames: Array) -> float:
    """1 / standard deviation of the unscaled latents of frames uint8 [N, H, W, 3]: the value for `latent_scale`."""
    images = frames.astype(jnp.float32) / 127.5 - 1.0
    mean, _ = Autoencoder(config.autoencoder).apply({"params": params["autoencoder"]}, images, method="encode")
    return float(1.0 / jnp.std(mean))


def arm_motion_loss(
    config: SimulatorConfig, params: Params, key: Array, batch: MotionBatch, kinematics: Kinematics
) -> tuple[Array, dict[str, Array]]:
    """Open-loop error over the stretch: of the pose in centimetres and twentieths of a radian, of the opening in 5 mm.

    Errors count by sqrt(1 + e^2) - 1, so that collisions that nothing foretells do not rule, and by 1 / sqrt(steps),
    because they grow. The arm is told what the hand holds; which grasps hold is learned where it was decided, with
    labels that are doubted a little (`GRASP_SMOOTHING`): a decision that is sure of everything is learned by heart.

    Returns: the loss, and {"position", "rotation", "opening", "grasp_loss", "grasp_accuracy"}: the mean errors at the
    end in metres and radians, cross-entropy with the smoothed labels (nats) and share of the grasps that were foretold.
    """
    glance = make_glance(config, batch.photographs, batch.camera, kinematics)
    arm = ArmContext(params, batch.previous_action, batch.pictures, batch.grip, glance, batch.holds, key)
    predicted, grip, logit = advance_proprio(
        kinematics, batch.previous_proprio, batch.proprio[:, 0], batch.actions, arm
    )
    truth = batch.proprio[:, 1:]
    motion = relative_pose(predicted, truth)
    opening = finger_opening(predicted) - finger_opening(truth)
    errors = jnp.concatenate([motion / jnp.array([0.01] * 3 + [0.05] * 3), opening[..., None] / 0.005], axis=-1)
    weight = 1.0 / jnp.sqrt(1.0 + jnp.arange(motion.shape[1]))[:, None]
    last = jnp.linalg.norm(motion[:, -1].reshape(-1, 2, 3), axis=-1).mean(0)
    before = jnp.concatenate([batch.grip.holds[:, None], grip.holds[:, :-1]], axis=1)
    decided = (grip.closing == DECIDES) & (grip.holds != 0) & (before == 0)
    share = decided / jnp.maximum(decided.sum(), 1)
    correct = logit * grip.holds
    grasp_loss = (share * (jax.nn.softplus(-correct) + 0.5 * GRASP_SMOOTHING * correct)).sum()
    metrics = {
        "position": last[0],
        "rotation": last[1],
        "opening": jnp.abs(opening[:, -1]).mean(),
        "grasp_loss": grasp_loss,
        "grasp_accuracy": (share * (correct > 0)).sum(),
    }
    return (weight * (jnp.sqrt(1.0 + jnp.square(errors)) - 1.0)).sum(-1).mean() + grasp_loss, metrics


def compositor_loss(
    config: SimulatorConfig,
    params: Params,
    key: Array,
    batch: SimulatorBatch,
    statistics: Statistics,
    kinematics: Kinematics,
) -> tuple[Array, dict[str, Array]]:
    """Charbonnier errors of a chain of pictures, each composed of the one before it, and of the arms drawn for them.

    Absolute errors where they are large, so that an edge is put in one place instead of faintly in two. Those near the
    hand count more: what it holds is a handful of pixels, and rewards depend on it. A chain has `CHAIN` pictures, 1 to
    K frames apart; `batch` has CHAIN * K future frames. A long roll-out has seen nothing true but the oldest frame, and
    so have half of the chains: where the newest frame is true, to copy it is all that can be learned.

    Returns: the loss, and {"psnr"} (decibels at a range of 255).
    """
    _check_batch(replace(config, chunk=CHAIN * config.chunk), batch)
    steps = jnp.cumsum(jax.random.randint(key, (len(batch.actions), CHAIN), 1, config.chunk + 1), axis=1) - 1
    choose = lambda x: jnp.take_along_axis(x, steps.reshape(*steps.shape, *[1] * (x.ndim - 2)), axis=1)
    known, future = jnp.split(batch.latents, [config.history], axis=1)
    images = decode_images(config, params, jnp.moveaxis(jnp.concatenate([known, choose(future)], axis=1), 2, 1))
    images, truth = jnp.split(images, [config.history], axis=2)
    future, grasps = (choose(p) for p in predict_proprio(config, params, batch, statistics, kinematics))
    proprio = batch.proprio
    weight = choose(batch.mask).astype(jnp.float32)
    on_stand = jnp.array([view for view in range(config.views) if view not in config.hand_views], jnp.int32)
    on_hand = jnp.array(config.hand_views if config.glance_size else (), jnp.int32)
    drawn_views = jnp.concatenate([on_stand, on_hand])
    charbonnier = lambda error, weight=1.0: (weight * jnp.sqrt(error + CHARBONNIER**2)).mean((1, 2, 3, 4, 5))
    blind = jax.random.bernoulli(jax.random.fold_in(key, 1), BLIND, (len(images),))
    images = jnp.where(blind[:, None, None, None, None, None], images[:, :, :1], images)
    proprio = jnp.where(blind[:, None, None], proprio[:, :1], proprio)
    absolute, squared = [], []
    for i in range(CHAIN):
        there = jnp.concatenate([proprio, future[:, i : i + 1]], axis=1)
        scene = batch.camera, kinematics, batch.photographs
        picture, drawn = compose_pictures(config, params, images, there, grasps[:, i : i + 1], *scene)
        error = jnp.square(picture - truth[:, :, i : i + 1])
        near = hand_weight(config, there, batch.camera)[:, :, -1:]
        drawn_weight = jnp.ones_like(near).at[:, on_hand].set(near[:, on_hand])[:, drawn_views]
        drawn_error = jnp.square(drawn - truth[:, drawn_views, i : i + 1])
        absolute.append(charbonnier(error, near) + charbonnier(drawn_error, drawn_weight))
        squared.append(error.mean((1, 2, 3, 4, 5)))
        images = images.at[:, :, -1:].set(jax.lax.stop_gradient(picture))
        proprio = there.at[:, -2].set(there[:, -1])[:, :-1]
    mean = lambda errors: jnp.sum(weight * jnp.stack(errors, axis=1)) / jnp.maximum(jnp.sum(weight), 1.0)
    return mean(absolute), {"psnr": -10.0 * jnp.log10(mean(squared) / 4.0)}


def hand_weight(config: SimulatorConfig, proprio: Array, camera: Camera) -> Array:
    """1 + HAND_WEIGHT at the hand's pixel, falling to 1 around it, divided by its mean over the image.

    Args:
        proprio: float32 [B, T, 8].
        camera: of the frame that proprio[:, 0] belongs to; leaves [B, V, ...].
    Returns: float32 [B, V, T, H, W, 1].
    """
    (height, width), hand = config.image_size, hand_poses(proprio)
    poses = camera_poses(config, hand, camera.pose)
    at, _ = project(hand[:, None, :, None, :3, 3], camera.intrinsics[:, :, None], poses)
    y, x = jnp.mgrid[:height, :width] + 0.5
    squared = jnp.square(jnp.stack([x, y], axis=-1) - at[..., None, :]).sum(-1)
    weight = 1.0 + HAND_WEIGHT * jnp.exp(-0.5 * squared / (HAND_RADIUS * width) ** 2)
    return (weight / weight.mean((-2, -1), keepdims=True))[..., None]


def predict_proprio(
    config: SimulatorConfig, params: Params, batch: SimulatorBatch, statistics: Statistics, kinematics: Kinematics
) -> tuple[Array, Array]:
    """Proprioception [B, K, 8] of a batch's future frames, as a roll-out predicts it where its pictures are true.

    Returns: it, and its `last_grasps` [B, K, 8].
    """
    commands = statistics.unnormalize_action(batch.actions)
    if "arm_motion" not in params:
        arm = None
    else:
        known = batch.proprio.shape[1] - 1
        pictures = batch.latents[:, known : -1 : config.chunk, jnp.array(config.motion_views)]
        arm = ArmContext(params["arm_motion"], batch.previous_action, pictures, batch.grip, holds=batch.holds)
    future = advance_proprio(kinematics, batch.previous_proprio, batch.proprio[:, -1], commands, arm).proprio
    return future, last_grasps(kinematics, batch.grasp, future)


def denoising_loss(
    config: SimulatorConfig,
    params: Params,
    key: Array,
    batch: SimulatorBatch,
    statistics: Statistics,
    kinematics: Kinematics,
    geometry: GeometryFn | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Squared error of v on the frames that are generated; proprioception is advanced from actions, as in a roll-out.

    `geometry`: as in `make_simulator_fns`.

    Returns: the loss, and {"v_error", "x0_error"} (the latter over the same frames, in scaled latents).
    """
    keys = iter(jax.random.split(key, 8))
    _check_batch(config, batch)
    latents = jnp.moveaxis(batch.latents, 2, 1)
    past, ahead = jnp.split(latents, [config.history], axis=2)
    clean = jnp.concatenate([past, of_pictures(config, ahead, axis=2)], axis=2)
    count, views = clean.shape[:2]
    divisor = jax.random.randint(next(keys), (), config.history_noise[0], config.history_noise[1] + 1)
    uniform = jax.random.uniform(next(keys), (count, views, config.history))
    history = noise_history(config, past, uniform, divisor, jax.random.normal(next(keys), past.shape))

    future, grasps = predict_proprio(config, params, batch, statistics, kinematics)
    hand = jnp.concatenate([batch.proprio, of_pictures(config, future)], axis=1), of_pictures(config, grasps)
    scene = batch.camera, statistics, kinematics, batch.photographs
    inputs = chunk_inputs(config, params, history, *hand, batch.actions, *scene)
    images = batch.first_images.astype(jnp.float32) / 127.5 - 1.0
    inputs = inputs._replace(geometry_tokens=encode_geometry_tokens(config, params, geometry, images))
    if config.condition_dropout:
        inputs, images = drop_conditions(config, next(keys), inputs, images)
    prepared = prepare(config, params, inputs, encode_image_tokens(config, params, images))

    t = _draw_steps(config, next(keys), count)
    noise = jax.random.normal(next(keys), clean.shape)
    x0 = jnp.concatenate([history, clean[:, :, config.history :]], axis=2)
    error, x0_error = v_error(config, params, x0, noise, t, prepared)
    mask = of_pictures(config, batch.mask)[:, None]
    weight = jnp.broadcast_to(mask, error.shape).astype(jnp.float32)
    loss, x0_error = (jnp.sum(e * weight) / jnp.maximum(jnp.sum(weight), 1.0) for e in (error, x0_error))
    return loss, {"v_error": loss, "x0_error": x0_error}


def v_error(
    config: SimulatorConfig, params: Params, x0: Array, noise: Array, t: Array, prepared
) -> tuple[Array, Array]:
    """Mean squared errors of v and of x0 per generated frame, [B, V, P] each.

    Args:
        x0, noise: float [B, V, F + P, h, w, c]; the history part of x0 is what the denoiser sees there.
        t: int [B], the noise step.
        prepared: `conditioning.prepare`.
    """
    _, noisy, target, alpha = noisy_latents(config, x0, noise, t)
    prediction = predict_v(config, params, noisy, jnp.broadcast_to(t[:, None], x0.shape[:2]), prepared)
    error = jnp.square(prediction - target)[:, :, config.history :].mean((-3, -2, -1))
    # x0 - x0_predicted = sqrt(1 - a) (v - v_target).
    return error, error * (1.0 - alpha[:, :, 0, 0, 0])


def noisy_latents(config: SimulatorConfig, x0: Array, noise: Array, t: Array) -> tuple[Array, Array, Array, Array]:
    """Scaled x0, its noised form with a clean history, the v target, and alphas_cumprod[t] as [B, 1, 1, 1, 1, 1]."""
    schedule = noise_schedule(config.schedule)
    at = lambda table: jnp.asarray(table, jnp.float32)[t][:, None, None, None, None, None]
    alpha = at(schedule.alphas_cumprod)
    scaled = x0 * at(schedule.x0_scale)
    past = slice(0, config.history)
    noisy = add_noise(scaled, noise, alpha).at[:, :, past].set(scaled[:, :, past])
    return scaled, noisy, v_target(scaled, noise, alpha), alpha


def noise_history(config: SimulatorConfig, history: Array, uniform: Array, divisor: Array, noise: Array) -> Array:
    """Teacher forcing's counterweight: history latents [B, V, F, h, w, c] with a little noise, as a roll-out has.

    Args:
        uniform: float [B, V, F] in [0, 1).
        divisor: int []; the largest noise step is steps / divisor.
        noise: standard normal, like the history.
    """
    steps = sinusoid_steps(uniform, divisor, config.schedule)
    alpha = jnp.asarray(noise_schedule(config.schedule).alphas_cumprod, jnp.float32)[steps]
    return add_noise(history, noise, alpha[..., None, None, None])


def drop_conditions(config: SimulatorConfig, key: Array, inputs, images: Array):
    """Leaves out conditions at random, one draw r per sample, so that guidance has an unconditional pass.

    With p = config.condition_dropout (EVAC's 0.1): delta actions where r < 2p; the first image, and its geometry
    tokens, where p <= r < 3p; the future's image latents and mask in [0, p/2), [p, 3p/2) and [5p/2, 7p/2); the action
    maps in [p/2, 3p/2).
    """
    r = jax.random.uniform(key, (len(images),)) / config.condition_dropout
    keep = lambda dropped, leaf: leaf * (1.0 - dropped).reshape(-1, *[1] * (leaf.ndim - 1))
    is_future = jnp.arange(config.frames) >= config.history
    gone = ((r < 0.5) | ((r >= 1.0) & (r < 1.5)) | ((r >= 2.5) & (r < 3.5)))[:, None] & is_future
    present = inputs.present * (1.0 - gone)[:, None]
    latents = inputs.image_latents * (1.0 - gone)[:, None, :, None, None, None]
    no_reference = (r >= 1.0) & (r < 3.0)
    if inputs.geometry_tokens is not None:
        inputs = inputs._replace(geometry_tokens=keep(no_reference, inputs.geometry_tokens))
    inputs = inputs._replace(
        deltas=keep(r < 2.0, inputs.deltas),
        maps=keep((r >= 0.5) & (r < 1.5), inputs.maps),
        present=present,
        image_latents=latents,
    )
    return inputs, keep(no_reference, images)


def _draw_steps(config: SimulatorConfig, key: Array, count: int) -> Array:
    if config.sampled_steps_only:
        steps = trailing_timesteps(config.schedule, config.ddim_steps)
        return jnp.asarray(steps.astype(np.int32))[jax.random.randint(key, (count,), 0, len(steps))]
    return jax.random.randint(key, (count,), 0, config.schedule.steps)


def _check_batch(config: SimulatorConfig, batch: SimulatorBatch) -> None:
    latent = (*config.latent_size, config.autoencoder.latent_channels)
    expected = {
        "latents": (config.history + config.chunk, config.views, *latent),
        "first_images": (config.views, *config.image_size, 3),
        "proprio": (config.history, 8),
        "actions": (config.chunk, 7),
        "mask": (config.chunk,),
    }
    got = {name: getattr(batch, name).shape[1:] for name in expected}
    wrong = [f"{name} [B, {got[name]}], expected [B, {need}]" for name, need in expected.items() if got[name] != need]
    if wrong:
        raise ValueError("simulator batch: " + "; ".join(wrong))
