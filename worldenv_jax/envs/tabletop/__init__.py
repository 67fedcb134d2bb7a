# SPDX-License-Identifier: Apache-2.0
"""A small tabletop manipulation world in pure JAX with LIBERO's contract: the world that comes with the package."""

from worldenv_jax.envs.tabletop.as_simulator import oracle_reflector_fns, tabletop_simulator_fns
from worldenv_jax.envs.tabletop.chunk import run_chunk
from worldenv_jax.envs.tabletop.config import INSTRUCTIONS, OBJECTS, RECEPTACLES, TabletopConfig
from worldenv_jax.envs.tabletop.environment import TabletopEnvironment, stack_states
from worldenv_jax.envs.tabletop.expert import ExpertRollout, ExpertStyle, expert_action, expert_rollout, expert_style
from worldenv_jax.envs.tabletop.physics import step
from worldenv_jax.envs.tabletop.renderer import render
from worldenv_jax.envs.tabletop.world import TabletopState, proprioception, start_state, success

__all__ = [
    "INSTRUCTIONS",
    "OBJECTS",
    "RECEPTACLES",
    "ExpertRollout",
    "ExpertStyle",
    "TabletopConfig",
    "TabletopEnvironment",
    "TabletopState",
    "expert_action",
    "expert_rollout",
    "expert_style",
    "oracle_reflector_fns",
    "proprioception",
    "render",
    "run_chunk",
    "stack_states",
    "start_state",
    "step",
    "success",
    "tabletop_simulator_fns",
]
