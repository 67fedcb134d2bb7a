# SPDX-License-Identifier: Apache-2.0
"""True worlds: the embedded tabletop (pure JAX) and the LIBERO simulator (MuJoCo in worker processes)."""

from dataclasses import dataclass
from typing import Literal

from worldenv_jax.envs.base import Environment
from worldenv_jax.errors import WorldEnvError


@dataclass(frozen=True)
class EnvironmentConfig:
    """The true world: where demonstrations come from and where success is measured."""

    name: Literal["tabletop", "libero", "recorded"] = "tabletop"  # recorded: episodes of a robot, no world to act in
    suite: str = "libero_object"  # LIBERO only
    tasks: int = 10  # the first so many tasks
    image_size: int = 64
    views: int = 1  # 1: third person; 2: and the wrist camera
    photograph_size: int = 0  # pixels a side of the photographs that episodes have (not the tabletop's); 0: none
    slots: int = 32  # episodes that run side by side (LIBERO: worker processes)
    starts: Literal["official", "shifted"] = "shifted"  # of the test episodes


def make_environment(config: EnvironmentConfig) -> Environment:
    """Opens the true world. LIBERO starts its worker processes here; call `close` at the end.

    Raises:
      WorldEnvError: there is none; or LIBERO's parts are missing, with what to install.
    """
    if config.name == "recorded":
        raise WorldEnvError("recordings have no world to act in: collect and evaluate on the robot itself")
    if config.name == "tabletop":
        from worldenv_jax.envs.tabletop import TabletopConfig, TabletopEnvironment

        return TabletopEnvironment(TabletopConfig(image_size=config.image_size), num_slots=config.slots)
    from worldenv_jax.envs.libero import LiberoEnvironment

    views = ("agentview", "wrist")[: config.views]
    return LiberoEnvironment(
        config.suite, config.image_size, views, config.slots, photograph_size=config.photograph_size
    )
