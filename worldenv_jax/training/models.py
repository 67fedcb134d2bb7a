# SPDX-License-Identifier: Apache-2.0
"""The three models of an experiment as the functions that imagination and the runner take."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from worldenv_jax.configs import ExperimentConfig
from worldenv_jax.data.episodes import Episode
from worldenv_jax.policy import make_policy_fn, tokenize_policy_prompts
from worldenv_jax.reflector import make_reflector_fns, tokenize_reflector_prompts
from worldenv_jax.simulator import Kinematics, SimulatorConfig, check_starts, make_simulator_fns
from worldenv_jax.types import Camera, GeometryFn, PolicyFn, ReflectorFns, SimulatorFns, Starts, Statistics, Text


@dataclass(frozen=True, eq=False)  # compared by identity: programs are compiled once for each `Models`
class Models:
    """Config, statistics and tokenised instructions, and the functions made of them."""

    config: ExperimentConfig
    statistics: Statistics
    kinematics: Kinematics
    policy_prompts: Text  # NumPy, one row per task
    reflector_prompts: Text
    geometry: GeometryFn | None = None  # needed where config.simulator.unet.geometry_width is not 0

    @classmethod
    def make(
        cls,
        config: ExperimentConfig,
        statistics: Statistics,
        kinematics: Kinematics,
        instructions: Sequence[str],
        geometry: GeometryFn | None = None,
    ) -> "Models":
        """Tokenises the instructions of all tasks."""
        names = list(instructions)
        return cls(
            config,
            statistics,
            kinematics,
            tokenize_policy_prompts(config.policy, names),
            tokenize_reflector_prompts(config.reflector, names),
            geometry,
        )

    def policy(self, scale_factor: float = 1.0, deterministic: bool = False) -> PolicyFn:
        """Samples with `scale_factor` times the learned scale, or returns the mean."""
        return make_policy_fn(self.config.policy, self.statistics, scale_factor, deterministic)

    @property
    def simulator(self) -> SimulatorFns:
        """The learned world."""
        return make_simulator_fns(self.config.simulator, self.statistics, self.kinematics, self.geometry)

    @property
    def reflector(self) -> ReflectorFns:
        """The learned judge."""
        return make_reflector_fns(self.config.reflector)

    def starts(self, episodes: Sequence[Episode]) -> Starts:
        """The first frame of each episode as the beginning of imagined trajectories.

        Raises:
          WorldEnvError: frames, proprioception or cameras that the simulator cannot start from.
        """
        task = np.array([episode.task for episode in episodes], np.int32)
        pick = lambda name: np.stack([np.asarray(getattr(episode, name)[0]) for episode in episodes])
        starts = Starts(
            images=pick("images"),
            proprio=pick("proprio"),
            policy_text=jax.tree.map(lambda leaf: np.asarray(leaf)[task], self.policy_prompts),
            reflector_text=jax.tree.map(lambda leaf: np.asarray(leaf)[task], self.reflector_prompts),
            camera=Camera(pick("intrinsics"), pick("camera_pose")),
            task=task,
            photographs=stack_photographs(self.config.simulator, episodes),
        )
        check_starts(self.config.simulator, starts)
        return starts


def stack_photographs(config: SimulatorConfig, episodes: Sequence[Episode]) -> np.ndarray | None:
    """The episodes' photographs uint8 [N, V, H', W', 3]; None where the simulator looks at none or some are missing."""
    photographs = [episode.photographs for episode in episodes]
    if not config.photograph_size or any(own is None for own in photographs):
        return None
    return np.stack(photographs)


def take_rows(tree: Any, rows: np.ndarray) -> Any:
    """Rows of every NumPy leaf [B, ...]."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], tree)


def to_lists(numbers: NamedTuple) -> dict[str, Any]:
    """A NamedTuple of small float arrays as JSON."""
    return {name: np.asarray(leaf, np.float64).tolist() for name, leaf in numbers._asdict().items()}


def from_lists(kind: type, values: dict[str, Any]) -> Any:
    """The inverse of `to_lists`, float32."""
    return kind(**{name: np.asarray(value, np.float32) for name, value in values.items()})
