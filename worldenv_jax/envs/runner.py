# SPDX-License-Identifier: Apache-2.0
"""Runs a policy in an environment, many episodes side by side, and returns what happened.

An episode's result depends on its `EpisodeSpec` and on the policy alone: not on the slot it ran in, nor on the number
of slots, nor on the other episodes.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from worldenv_jax.data.episodes import Episode
from worldenv_jax.envs.base import Environment, Frames
from worldenv_jax.types import EpisodeSpec

# (images uint8 [n, V, H, W, 3], proprio float32 [n, 8], specs, chunk number of each) -> environment actions [n, K, 7]
ActFn = Callable[[np.ndarray, np.ndarray, Sequence[EpisodeSpec], Sequence[int]], np.ndarray]


class Outcome(NamedTuple):
    """The result of one episode."""

    spec: EpisodeSpec
    success: bool
    steps: int  # until the first success, or the limit
    episode: Episode | None  # present when recording


@dataclass
class _Running:
    """One episode in its slot."""

    index: int
    spec: EpisodeSpec
    start: dict
    frames: list[Frames] = field(default_factory=list)  # every entry has one slot, n = 1
    actions: list[np.ndarray] = field(default_factory=list)
    chunks: int = 0
    steps: int = 0
    first_success: int | None = None


def run_episodes(
    environment: Environment,
    act: ActFn,
    specs: Sequence[EpisodeSpec],
    *,
    record: bool = False,
    actor: str = "policy",
    noise: float = 0.0,
    after_success: int = 0,
) -> Iterator[tuple[int, Outcome]]:
    """Runs every episode of `specs` once and yields (position in specs, outcome) as episodes end.

    Args:
      environment: where.
      act: the policy: what to do in each slot, a chunk of K environment actions at a time, executed open loop.
      specs: which episodes.
      record: keep every frame and return `Episode`s; otherwise only the last frame of a chunk is rendered.
      actor: written into recorded episodes.
      noise: the exploration scale factor, written into recorded episodes.
      after_success: steps to go on after the first success (the judge must see what can happen then).
    """
    waiting = deque(enumerate(specs))
    running: dict[int, _Running] = {}
    newest: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # slot -> (images [V, H, W, 3], proprio [8])
    while waiting or running:
        free = [slot for slot in range(environment.num_slots) if slot not in running][: len(waiting)]
        if free:
            fresh = [waiting.popleft() for _ in free]
            frames = environment.reset(free, [spec for _, spec in fresh])
            for row, (slot, (index, spec)) in enumerate(zip(free, fresh)):
                running[slot] = _Running(index, spec, environment.start_state(slot) if record else {})
                running[slot].frames.append(_row(frames, row))
                newest[slot] = (frames.images[row, -1], frames.proprio[row, -1])
        slots = sorted(running)
        images, proprio = (np.stack([newest[slot][part] for slot in slots]) for part in (0, 1))
        actions = act(images, proprio, [running[s].spec for s in slots], [running[s].chunks for s in slots])
        frames = environment.step(slots, actions, every_frame=record)
        for row, slot in enumerate(slots):
            newest[slot] = (frames.images[row, -1], frames.proprio[row, -1])
            _advance(running[slot], _row(frames, row), np.clip(actions[row], -1.0, 1.0), environment.max_steps)
            if _ended(running[slot], environment.max_steps, after_success):
                done = running.pop(slot)
                yield done.index, _outcome(done, environment, record, actor, noise, after_success)


def _row(frames: Frames, row: int) -> Frames:
    """One slot of a batch of frames, copied so that the batch can be freed."""
    take = lambda leaf: np.array(leaf[row])
    camera = type(frames.camera)(*map(take, frames.camera))
    return Frames(take(frames.images), take(frames.proprio), take(frames.success), camera)


def _advance(run: _Running, frames: Frames, actions: np.ndarray, max_steps: int) -> None:
    inside = frames.success[: max_steps - run.steps]  # a chunk may reach past the limit: what happens there is void
    if run.first_success is None and inside.any():
        run.first_success = run.steps + int(inside.argmax()) + 1
    run.frames.append(frames)
    run.actions.append(actions)
    run.chunks += 1
    run.steps += len(actions)


def _ended(run: _Running, max_steps: int, after_success: int) -> bool:
    succeeded = run.first_success is not None and run.steps >= run.first_success + after_success
    return succeeded or run.steps >= max_steps


def _outcome(
    run: _Running, environment: Environment, record: bool, actor: str, noise: float, after_success: int
) -> Outcome:
    success = run.first_success is not None
    steps = run.first_success if success else environment.max_steps
    if not record:
        return Outcome(run.spec, success, steps, None)
    length = min(steps + after_success, environment.max_steps) if success else environment.max_steps
    join = lambda leaves: np.concatenate(leaves)[: length + 1]
    episode = Episode(
        images=join([f.images for f in run.frames]),
        proprio=join([f.proprio for f in run.frames]).astype(np.float32),
        actions=np.concatenate(run.actions)[:length].astype(np.float32),
        success=join([f.success for f in run.frames]),
        intrinsics=join([f.camera.intrinsics for f in run.frames]),
        camera_pose=join([f.camera.pose for f in run.frames]),
        instruction=environment.instructions[run.spec.task],
        task=run.spec.task,
        seed=run.spec.seed,
        split=run.spec.split,
        starts=run.spec.starts,
        actor=actor,
        noise=noise,
        environment=run.start,
    )
    return Outcome(run.spec, success, steps, episode)
