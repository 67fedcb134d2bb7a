# SPDX-License-Identifier: Apache-2.0
"""The video-diffusion world simulator: next frames from frames and actions (EVAC, World-Env section 1.2)."""

from worldenv_jax.simulator.autoencoder import principal_components
from worldenv_jax.simulator.conditioning import decode_latents, encode_frames
from worldenv_jax.simulator.config import SimulatorConfig
from worldenv_jax.simulator.grips import Grip, no_grip
from worldenv_jax.simulator.input_checks import check_actions, check_episode, check_starts
from worldenv_jax.simulator.losses import (
    CHAIN,
    MotionBatch,
    SimulatorBatch,
    arm_motion_loss,
    autoencoder_loss,
    compositor_loss,
    denoising_loss,
    measure_latent_scale,
)
from worldenv_jax.simulator.memory import history_steps
from worldenv_jax.simulator.proprioception import (
    Kinematics,
    advance_proprio,
    episode_grips,
    fit_kinematics,
    is_empty,
    last_grasps,
    proprioception_error,
)
from worldenv_jax.simulator.world_simulator import (
    SimulatorState,
    extend_params,
    init_simulator,
    make_simulator_fns,
)

__all__ = [
    "CHAIN",
    "Grip",
    "Kinematics",
    "MotionBatch",
    "SimulatorBatch",
    "SimulatorConfig",
    "SimulatorState",
    "advance_proprio",
    "arm_motion_loss",
    "autoencoder_loss",
    "check_actions",
    "check_episode",
    "check_starts",
    "compositor_loss",
    "decode_latents",
    "denoising_loss",
    "encode_frames",
    "episode_grips",
    "extend_params",
    "fit_kinematics",
    "history_steps",
    "init_simulator",
    "is_empty",
    "last_grasps",
    "make_simulator_fns",
    "measure_latent_scale",
    "no_grip",
    "principal_components",
    "proprioception_error",
]
