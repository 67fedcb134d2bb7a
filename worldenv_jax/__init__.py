# SPDX-License-Identifier: Apache-2.0
"""worldenv_jax: reinforcement-learning post-training of vision-language-action policies inside a learned world.

The names below are the public ones; everything else may move without notice.
"""

from worldenv_jax.loop_ppo import LoopConfig, clipped_loss, groups_with_contrast, leave_one_out_advantages
from worldenv_jax.rollout import RolloutConfig, RolloutParams, imagine_rollout
from worldenv_jax.types import (
    Camera,
    EpisodeSpec,
    Observation,
    PolicyFn,
    PolicyStep,
    Prediction,
    ReflectorFns,
    Rollout,
    SimulatorFns,
    Starts,
    Statistics,
    Text,
)

__version__ = "0.1.0"

__all__ = [
    "Camera",
    "EpisodeSpec",
    "LoopConfig",
    "Observation",
    "PolicyFn",
    "PolicyStep",
    "Prediction",
    "ReflectorFns",
    "Rollout",
    "RolloutConfig",
    "RolloutParams",
    "SimulatorFns",
    "Starts",
    "Statistics",
    "Text",
    "clipped_loss",
    "groups_with_contrast",
    "imagine_rollout",
    "leave_one_out_advantages",
]
