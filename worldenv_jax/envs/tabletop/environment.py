# SPDX-License-Identifier: Apache-2.0
"""The tabletop behind the interface of `envs/base.py`: slots are rows of one batched state.

Every jitted function has a fixed batch of `num_slots` rows, so each compiles once per chunk length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.data.episodes import Episode
from worldenv_jax.envs.base import Frames, StartsAtOnce
from worldenv_jax.envs.protocol import SPLITS, check_spec, tabletop_protocol
from worldenv_jax.envs.tabletop import camera
from worldenv_jax.envs.tabletop.chunk import run_chunk
from worldenv_jax.envs.tabletop.config import INSTRUCTIONS, TabletopConfig
from worldenv_jax.envs.tabletop.expert import expert_rollout
from worldenv_jax.envs.tabletop.renderer import render
from worldenv_jax.envs.tabletop.world import TabletopState, proprioception, start_state, success
from worldenv_jax.types import ACTION_DIM, Array, Camera, EpisodeSpec


class TabletopEnvironment(StartsAtOnce):
    """`num_slots` tables that are stepped together; see `envs.base.Environment` for the methods."""

    name = "tabletop"
    instructions = INSTRUCTIONS
    num_views = 1
    restarts = 0

    def __init__(self, config: TabletopConfig | None = None, num_slots: int = 32):
        """Compiles nothing yet.

        Raises:
            ValueError: `num_slots` is not positive.
        """
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}")
        self.config = config or TabletopConfig()
        self.num_slots = num_slots
        self.max_steps = self.config.max_steps
        self.image_size = self.config.image_size
        self._protocol = replace(tabletop_protocol(), max_steps=self.max_steps)
        self.protocol = self._protocol.to_dict() | {"tabletop": asdict(self.config)}
        self._starts = np.full(num_slots, None, object)
        self._begin = jax.jit(partial(_begin, self.config))
        self._step = jax.jit(partial(_step, self.config), static_argnames="every_frame")
        self._expert = jax.jit(partial(_expert_batch, self.config))
        shapes = jax.eval_shape(self._begin, *self._numbers([]))[0]
        self._states = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def reset(self, slots: Sequence[int], specs: Sequence[EpisodeSpec]) -> Frames:
        """Starts one episode per slot; returns the first frames (k = 1, success [n, 1])."""
        slots = self._checked_slots(slots)
        if len(specs) != len(slots):
            raise ValueError(f"got {len(specs)} specs for {len(slots)} slots; give one spec per slot")
        states, images, proprio, done = self._begin(*self._numbers(specs))
        rows = jnp.arange(len(slots))
        self._states = jax.tree.map(lambda old, new: old.at[slots].set(new[rows]), self._states, states)
        host = jax.tree.map(np.asarray, states)
        for row, slot in enumerate(slots):
            self._starts[slot] = {name: leaf[row] for name, leaf in host._asdict().items()}
        return self._frames(images[rows], proprio[rows], done[rows])

    def step(self, slots: Sequence[int], actions: np.ndarray, every_frame: bool) -> Frames:
        """Runs environment actions float32 [n, K, 7]; renders all K frames or only the last (k = K or 1).

        Raises:
            ValueError: wrong shape, NaN, or a slot in which no episode was started.
        """
        slots, actions = self._checked_slots(slots), np.asarray(actions, np.float32)
        shape_fits = actions.ndim == 3 and actions.shape[0] == len(slots) and actions.shape[2] == ACTION_DIM
        if not shape_fits or not actions.size:
            raise ValueError(f"actions must have the shape [{len(slots)}, K, 7], got {list(actions.shape)}")
        if not np.isfinite(actions).all():
            raise ValueError(f"actions must be finite, got NaN or infinity at {np.argwhere(~np.isfinite(actions))[0]}")
        idle = [int(slot) for slot in slots if self._starts[slot] is None]
        if idle:
            raise ValueError(f"no episode was started in slots {idle}; call reset first")
        padded = np.zeros((self.num_slots, *actions.shape[1:]), np.float32)
        padded[slots] = actions
        active = np.zeros(self.num_slots, bool)
        active[slots] = True
        self._states, prediction = self._step(self._states, padded, active, every_frame=every_frame)
        return self._frames(*(np.asarray(leaf)[slots] for leaf in prediction))

    def start_state(self, slot: int) -> dict[str, np.ndarray]:
        """The fields of the `TabletopState` in which the slot's episode began."""
        if self._starts[slot] is None:
            raise ValueError(f"no episode was started in slot {slot}; call reset first")
        return dict(self._starts[slot])

    def photographs(self, slot: int) -> None:
        """None is taken."""

    def expert_episodes(self, specs: Sequence[EpisodeSpec], noise: float, draw: bool = True) -> Iterator[Episode]:
        """Yields one recorded expert episode per spec, cut `aftermath_steps` after the first success; always drawn."""
        if not 0.0 <= noise < np.inf:
            raise ValueError(f"noise must be a finite scale >= 0, got {noise}")
        for begin in range(0, len(specs), self.num_slots):
            batch = list(specs[begin : begin + self.num_slots])
            rollout, images, proprio = jax.tree.map(np.asarray, self._expert(*self._numbers(batch), noise))
            for row, spec in enumerate(batch):
                one = jax.tree.map(lambda leaf, row=row: leaf[row], (rollout, images, proprio))
                yield self._episode(spec, noise, *one)

    def close(self) -> None:
        """Nothing to end: there are no worker processes."""

    def _episode(self, spec: EpisodeSpec, noise: float, rollout, images, proprio) -> Episode:
        length = self.max_steps
        if rollout.success.any():
            length = min(length, int(rollout.success.argmax()) + self.config.aftermath_steps)
        frames = self._frames(images[None, : length + 1], proprio[None, : length + 1], None)
        return Episode(
            images=frames.images[0].copy(),
            proprio=frames.proprio[0].copy(),
            actions=rollout.actions[:length].copy(),
            success=rollout.success[: length + 1].copy(),
            intrinsics=frames.camera.intrinsics[0],
            camera_pose=frames.camera.pose[0],
            instruction=self.instructions[spec.task],
            task=spec.task,
            seed=spec.seed,
            split=spec.split,
            starts=spec.starts,
            actor="perturbed_expert" if noise else "expert",
            noise=float(noise),
            environment={name: leaf[0] for name, leaf in rollout.states._asdict().items()},
        )

    def _frames(self, images, proprio, done) -> Frames:
        leading = (*images.shape[:2], self.num_views)
        intrinsics = np.broadcast_to(camera.intrinsics(self.image_size), (*leading, 3, 3)).copy()
        pose = np.broadcast_to(camera.pose(), (*leading, 4, 4)).copy()
        return Frames(
            *(None if x is None else np.asarray(x) for x in (images, proprio, done)), Camera(intrinsics, pose)
        )

    def _checked_slots(self, slots: Sequence[int]) -> np.ndarray:
        slots = np.asarray(slots, np.int32)
        if len(np.unique(slots)) != len(slots) or ((slots < 0) | (slots >= self.num_slots)).any():
            raise ValueError(f"slots must be different numbers from 0 to {self.num_slots - 1}, got {slots.tolist()}")
        return slots

    def _numbers(self, specs: Sequence[EpisodeSpec]) -> np.ndarray:
        """Task, split and seed, each int32 [num_slots], padded with zeros."""
        numbers = np.zeros((3, self.num_slots), np.int32)
        for row, spec in enumerate(specs):
            check_spec(spec, self._protocol, len(self.instructions))
            numbers[:, row] = spec.task, SPLITS.index(spec.split), spec.seed
        return numbers


def stack_states(states: Sequence[dict[str, np.ndarray]]) -> TabletopState:
    """Recorded start states (`Episode.environment`) as one batched `TabletopState`, for `Starts.environment`."""
    return TabletopState(**{name: jnp.stack([state[name] for state in states]) for name in TabletopState._fields})


def _begin(config: TabletopConfig, task: Array, split: Array, seed: Array):
    states = jax.vmap(partial(start_state, config))(task, split, seed)
    images = jax.vmap(partial(render, config))(states)
    return states, images[:, None], jax.vmap(proprioception)(states)[:, None], jax.vmap(success)(states)[:, None]


def _step(config: TabletopConfig, states: TabletopState, actions: Array, active: Array, every_frame: bool):
    moved, prediction = run_chunk(config, states, actions, every_frame)

    def keep_idle(old, new):
        return jnp.where(active.reshape(active.shape + (1,) * (old.ndim - 1)), new, old)

    return jax.tree.map(keep_idle, states, moved), prediction


def _expert_batch(config: TabletopConfig, task: Array, split: Array, seed: Array, noise: Array):
    """Rollouts with leaves [B, T(+1), ...], images uint8 [B, T + 1, 1, H, W, 3], proprio float32 [B, T + 1, 8]."""
    rollout = jax.vmap(partial(expert_rollout, config), in_axes=(0, 0, 0, None))(task, split, seed, noise)
    by_time = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), rollout.states)
    images = jax.lax.map(jax.vmap(partial(render, config)), by_time)
    return rollout, jnp.moveaxis(images, 0, 1), jax.vmap(jax.vmap(proprioception))(rollout.states)
