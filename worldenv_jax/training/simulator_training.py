# SPDX-License-Identifier: Apache-2.0
"""Fitting the simulator: autoencoder, arm motion, compositor, and denoiser on cached latents (World-Env, section 1.3).

All learn from demonstrations and exploration together; batches of the denoiser hold as many windows of failed as of
successful episodes.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.configs import ExperimentConfig
from worldenv_jax.data.episodes import Episode
from worldenv_jax.data.windows import BatchSampler, SimulatorWindows
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.simulator import (
    CHAIN,
    Grip,
    Kinematics,
    MotionBatch,
    SimulatorBatch,
    SimulatorConfig,
    arm_motion_loss,
    autoencoder_loss,
    check_episode,
    compositor_loss,
    denoising_loss,
    encode_frames,
    episode_grips,
    history_steps,
    last_grasps,
    measure_latent_scale,
    principal_components,
)
from worldenv_jax.training.augmentation import augment
from worldenv_jax.training.models import stack_photographs
from worldenv_jax.training.pretrained import initial_simulator
from worldenv_jax.training.workdir import Workdir, mesh_from_config, run_training
from worldenv_jax.types import Array, Camera, GeometryFn, Params, Statistics

STRETCH_CHUNKS = 4  # that `ArmMotion` is unrolled over
FROZEN = ("autoencoder", "arm_motion", "compositor", "geometry_encoder")  # while the denoiser learns
ENCODE_BATCH = 64  # frames per call while latents are cached


def train_autoencoder(config: ExperimentConfig, workdir: Workdir, episodes: Sequence[Episode]) -> Params:
    """Fits the autoencoder to single frames; returns the simulator's parameters with it in place.

    Raises:
      WorldEnvError: an episode with frames, cameras or actions that the simulator cannot be trained on.
    """
    for number, episode in enumerate(episodes):
        camera = Camera(episode.intrinsics, episode.camera_pose)
        name = f"{number} ({episode.instruction!r})"
        recorded = episode.images, episode.proprio, camera, episode.actions, episode.photographs
        check_episode(config.simulator, name, *recorded)
    frames = np.concatenate(
        [np.asarray(episode.images[:]).reshape(-1, *episode.images.shape[2:]) for episode in episodes]
    )
    stage, seed = config.autoencoder, config.seed
    params = initial_simulator(config, jax.random.key(seed))
    if config.simulator.autoencoder.principal and not config.pretrained.simulator:
        params["autoencoder"] = principal_components(config.simulator.autoencoder, frames)

    def loss(params: Params, key: Array, batch: Array) -> tuple[Array, dict[str, Array]]:
        return autoencoder_loss(config.simulator, {"autoencoder": params}, key, batch)

    def batch_fn(step: int) -> np.ndarray:
        rows = np.random.default_rng([seed, step]).integers(0, len(frames), stage.batch_size)
        return frames[rows]

    trained, mesh = params["autoencoder"], mesh_from_config(config.mesh)
    trained = run_training(workdir, "autoencoder", stage, mesh, trained, loss, batch_fn, jax.random.key(seed + 1))
    return {**params, "autoencoder": trained}


def latent_scale(config: ExperimentConfig, params: Params, episodes: Sequence[Episode]) -> float:
    """1 / standard deviation of the latents of the first episodes' frames; part of the simulator from then on."""
    frames = np.concatenate([np.asarray(episode.images[::4])[:, 0] for episode in episodes[:64]])[:512]
    return measure_latent_scale(config.simulator, params, frames)


def train_arm_motion(
    config: ExperimentConfig,
    workdir: Workdir,
    params: Params,
    episodes: Sequence[Episode],
    kinematics: Kinematics,
    replay: Callable[[], Sequence[Episode]] | None = None,
) -> Params:
    """Fits `ArmMotion` to stretches of recorded episodes; returns the simulator's parameters with it in place.

    Pictures are augmented as the policy's are. With `replay`, which gives what the simulator makes of `episodes`, half
    of the stretches show imagined pictures: they betray a coming contact in other ways than true ones do.

    Raises:
      WorldEnvError: all episodes are too short.
    """
    stage, simulator, seed = config.arm_motion, config.simulator, config.seed
    length, views = STRETCH_CHUNKS * simulator.chunk, list(simulator.motion_views)
    if max(episode.num_steps for episode in episodes) < length:
        raise WorldEnvError(f"no episode has {length} steps: set simulator.motion_width=0")

    @functools.cache  # once, and not at all where the stage is finished
    def stretches() -> list[tuple[Episode, Episode, Grip]]:
        """Episodes, where their pictures come from, and what their hands hold."""
        grips = [episode_grips(kinematics, np.asarray(e.proprio[:]), np.asarray(e.actions[:])) for e in episodes]
        rows = [*zip(episodes, episodes, grips), *zip(episodes, replay() if replay else (), grips)]
        return [row for row in rows if row[1].num_steps >= length]

    def stretch(rng: np.random.Generator) -> MotionBatch:
        true, shown, grips = stretches()[rng.integers(len(stretches()))]
        t = _stretch_start(rng, np.asarray(shown.actions), length)
        if shown is not true:  # at a frame that was generated: it is shown in place of those before it, too
            t -= t % simulator.frame_stride
        end, actions, proprio = t + length, np.asarray(true.actions), np.asarray(true.proprio)
        before = actions[t - 1] if t else np.zeros_like(actions[0])
        pictures = np.asarray(shown.images[t : end : simulator.chunk])[:, views]
        grip = Grip(grips.closing[t], grips.holds[t])
        motion = proprio[t : end + 1], actions[t:end], proprio[max(t - 1, 0)], before
        camera = Camera(np.asarray(true.intrinsics[0]), np.asarray(true.camera_pose[0]))
        photographs = true.photographs if simulator.glance_size else None
        return MotionBatch(*motion, pictures, grip, grips.holds[t + 1 : end + 1], camera, photographs)

    def batch_fn(step: int) -> MotionBatch:
        rng = np.random.default_rng([seed, step])
        return jax.tree.map(lambda *leaves: np.stack(leaves), *(stretch(rng) for _ in range(stage.batch_size)))

    def loss(arm_motion: Params, key: Array, batch: MotionBatch) -> tuple[Array, dict[str, Array]]:
        dropout, key = jax.random.split(key)
        pictures = encode_frames(simulator, params, augment(key, batch.pictures, config.augmentation))
        return arm_motion_loss(simulator, arm_motion, dropout, batch._replace(pictures=pictures), kinematics)

    mesh, key, name = mesh_from_config(config.mesh), jax.random.key(seed + 3), "arm_motion"
    name += "_imagined" if replay else ""
    trained = run_training(workdir, name, stage, mesh, params["arm_motion"], loss, batch_fn, key)
    return {**params, "arm_motion": trained}


def _stretch_start(rng: np.random.Generator, actions: np.ndarray, length: int) -> int:
    """Where a stretch begins: where its episode does (a fifth), before the hand closes (two fifths), or anywhere."""
    last, kind = len(actions) - length, rng.random()
    closings = np.flatnonzero((actions[1:, 6] > 0) & (actions[:-1, 6] <= 0)) + 1
    if kind < 0.2:
        return 0
    if kind < 0.6 and len(closings):
        return int(np.clip(rng.choice(closings) - rng.integers(1, length), 0, last))
    return int(rng.integers(0, last + 1))


def train_compositor(
    config: ExperimentConfig,
    workdir: Workdir,
    params: Params,
    episodes: Sequence[Episode],
    statistics: Statistics,
    kinematics: Kinematics,
) -> Params:
    """Fits `Compositor` to chains of frames; returns the simulator's parameters with it in place."""
    stage, simulator = config.compositor, config.simulator
    chains = replace(simulator, chunk=CHAIN * simulator.chunk)
    sampler = make_sampler(chains, params, episodes, statistics, kinematics, stage.batch_size, config.seed + 4)

    def loss(compositor: Params, key: Array, batch: SimulatorBatch) -> tuple[Array, dict[str, Array]]:
        return compositor_loss(simulator, params | {"compositor": compositor}, key, batch, statistics, kinematics)

    mesh, key = mesh_from_config(config.mesh), jax.random.key(config.seed + 4)
    trained = run_training(workdir, "compositor", stage, mesh, params["compositor"], loss, sampler, key)
    return {**params, "compositor": trained}


def train_denoiser(
    config: ExperimentConfig,
    workdir: Workdir,
    params: Params,
    episodes: Sequence[Episode],
    statistics: Statistics,
    kinematics: Kinematics,
    geometry: GeometryFn | None = None,
) -> Params:
    """Fits the denoiser (and the image encoder, unless frozen) on latents; returns all parameters.

    `geometry`: a frozen encoder, as in `make_simulator_fns`.
    """
    stage, simulator = config.denoiser, config.simulator
    sampler = make_sampler(simulator, params, episodes, statistics, kinematics, stage.batch_size, config.seed)
    frozen = {name: leaf for name, leaf in params.items() if name in FROZEN}
    trained = {name: leaf for name, leaf in params.items() if name not in frozen}

    def loss(params: Params, key: Array, batch: SimulatorBatch) -> tuple[Array, dict[str, Array]]:
        return denoising_loss(simulator, frozen | params, key, batch, statistics, kinematics, geometry)

    mesh, key = mesh_from_config(config.mesh), jax.random.key(config.seed + 2)
    return frozen | run_training(workdir, "denoiser", stage, mesh, trained, loss, sampler, key)


def make_sampler(
    config: SimulatorConfig,
    params: Params,
    episodes: Sequence[Episode],
    statistics: Statistics,
    kinematics: Kinematics,
    batch_size: int,
    seed: int,
) -> Callable[[int], SimulatorBatch]:
    """step -> batch of windows, cut from latents that are computed here, once."""
    steps = np.arange(max(episode.num_steps for episode in episodes) + 1)
    proprio = np.stack([np.asarray(e.proprio[:])[np.minimum(steps, e.num_steps)] for e in episodes])
    grasps = np.asarray(last_grasps(kinematics, proprio[:, 0], proprio))
    grips = [episode_grips(kinematics, np.asarray(e.proprio[:]), np.asarray(e.actions[:])) for e in episodes]
    closing, holds = (np.stack([np.pad(x, (0, len(steps) - len(x)), "edge") for x in part]) for part in zip(*grips))
    first_images = np.stack([np.asarray(episode.images[0]) for episode in episodes])
    photographs = stack_photographs(config, episodes)
    latents = cache_latents(config, params, episodes)
    encoded = [replace(episode, images=array) for episode, array in zip(episodes, latents)]
    windows = SimulatorWindows(encoded, lambda t: history_steps(t, config.history), config.chunk)
    sampler = BatchSampler(windows, batch_size, seed)

    def batch_fn(step: int) -> SimulatorBatch:
        rows: dict[str, Any] = sampler.batch(step)
        history, future = config.history, 1 + np.arange(config.chunk)
        return SimulatorBatch(
            latents=rows["frames"],
            first_images=first_images[rows["episode"]],
            photographs=None if photographs is None else photographs[rows["episode"]],
            proprio=rows["proprio"][:, :history],
            previous_proprio=rows["previous_proprio"],
            previous_action=rows["previous_action"],
            grasp=grasps[rows["episode"], rows["time"]],
            grip=Grip(closing[rows["episode"], rows["time"]], holds[rows["episode"], rows["time"]]),
            holds=holds[rows["episode"][:, None], np.minimum(rows["time"][:, None] + future, len(steps) - 1)],
            actions=np.asarray(statistics.normalize_action(rows["actions"])),
            camera=Camera(rows["intrinsics"][:, 0], rows["pose"][:, 0]),
            mask=rows["mask"][:, history:],
        )

    return batch_fn


def cache_latents(config: SimulatorConfig, params: Params, episodes: Sequence[Episode]) -> list[np.ndarray]:
    """Latents float32 [T + 1, V, h, w, c] of every episode."""
    encode = jax.jit(lambda frames: encode_frames(config, params, frames))
    frames = np.concatenate([np.asarray(episode.images[:]) for episode in episodes])
    padding = -len(frames) % ENCODE_BATCH
    padded = np.concatenate([frames, np.repeat(frames[:1], padding, axis=0)])
    parts = [np.asarray(encode(jnp.asarray(part))) for part in padded.reshape(-1, ENCODE_BATCH, *frames.shape[1:])]
    latents = np.concatenate(parts)[: len(frames)]
    ends = np.cumsum([episode.num_steps + 1 for episode in episodes])
    return np.split(latents, ends[:-1])
