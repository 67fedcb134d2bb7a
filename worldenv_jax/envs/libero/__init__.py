# SPDX-License-Identifier: Apache-2.0
"""The LIBERO benchmark (robosuite and MuJoCo) in worker processes, with a scripted expert."""

from worldenv_jax.envs.libero.environment import LiberoEnvironment

__all__ = ["LiberoEnvironment"]
