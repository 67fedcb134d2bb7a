# SPDX-License-Identifier: Apache-2.0
"""Runs a policy in an environment, many episodes side by side, and returns what happened.

An episode's result depends on its `EpisodeSpec` and on the policy alone: not on the slot it ran in, nor on the number
of slots, nor on the other episodes. An episode whose world failed (`EpisodeError`) is reported as an error, which is
neither a success nor a failure of the policy.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from worldenv_jax.data.episodes import NOBODY, Episode
from worldenv_jax.envs.base import Environment, EpisodeError, Frames, choose_episode, split_slots
from worldenv_jax.types import ACTION_DIM, EpisodeSpec

# (images uint8 [n, V, H, W, 3], proprio float32 [n, 8], specs, chunk number of each) -> environment actions [n, K, 7]
ActFn = Callable[[np.ndarray, np.ndarray, Sequence[EpisodeSpec], Sequence[int]], np.ndarray]


class Outcome(NamedTuple):
    """The result of one episode."""

    spec: EpisodeSpec
    success: bool | None  # None where the world failed
    steps: int | None  # until the first success, or the limit; None where the world failed
    episode: Episode | None = None  # present when recording
    holds: bool | None = None  # whether the task predicate held at the episode's end
    error: str | None = None  # what the world failed with


@dataclass
class _Running:
    """One episode in its slot."""

    index: int
    spec: EpisodeSpec
    start: dict
    photographs: np.ndarray | None
    frames: list[Frames] = field(default_factory=list)  # without the axis n; all of them when recording, or the last
    actions: list[np.ndarray] = field(default_factory=list)
    chunks: int = 0
    steps: int = 0
    first_success: int | None = None
    holds: bool = False


def run_episodes(
    environment: Environment,
    act: ActFn,
    specs: Sequence[EpisodeSpec],
    *,
    record: bool = False,
    actor: str = "policy",
    noise: float = 0.0,
    after_success: int = 0,
    max_steps: int | None = None,
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
      max_steps: the limit; by default the environment's.
    """
    max_steps = max_steps or environment.max_steps
    waiting, tasks = list(range(len(specs))), [spec.task for spec in specs]
    running: dict[int, _Running] = {}
    starting: dict[int, int] = {}  # slot -> position in specs
    held: dict[int, int] = {}  # slot -> the task of its last episode
    while waiting or starting or running:
        busy = running.keys() | starting.keys()
        free = [slot for slot in range(environment.num_slots) if slot not in busy][: len(waiting)]
        for slot in free:
            starting[slot] = choose_episode(waiting, tasks, slot, held)
            waiting.remove(starting[slot])
            held[slot] = tasks[starting[slot]]
        if free:
            environment.begin(free, [specs[starting[slot]] for slot in free])
        if starting:
            done, failed = _split(environment.begun, not running)
            for slot, frames in done.items():
                index = starting.pop(slot)
                begun = (environment.start_state(slot), environment.photographs(slot)) if record else ({}, None)
                running[slot] = _Running(index, specs[index], *begun, [frames])
            for slot, text in failed.items():
                index = starting.pop(slot)
                yield index, Outcome(specs[index], None, None, error=text)
            if failed or not running:
                continue  # a slot whose start failed takes the next episode at once
        slots = sorted(running)
        newest = [running[slot].frames[-1] for slot in slots]
        images, proprio = (np.stack([leaf[-1] for leaf in leaves]) for leaves in list(zip(*newest))[:2])
        actions = act(images, proprio, [running[s].spec for s in slots], [running[s].chunks for s in slots])
        done, failed = _split(_step, environment, slots, actions, record)
        executed = dict(zip(slots, np.clip(actions, -1.0, 1.0)))
        for slot, text in failed.items():
            lost = running.pop(slot)
            yield lost.index, Outcome(lost.spec, None, None, error=text)
        for slot, frames in done.items():
            _advance(running[slot], frames, executed[slot], max_steps, record)
            if _ended(running[slot], max_steps, after_success):
                ended = running.pop(slot)
                yield ended.index, _outcome(ended, environment, record, actor, noise, after_success, max_steps)


def record_starts(environment: Environment, specs: Sequence[EpisodeSpec]) -> Iterator[tuple[int, Outcome]]:
    """Begins every episode of `specs` and takes no step; yields (position in specs, outcome with its first frame)."""
    waiting, tasks = list(range(len(specs))), [spec.task for spec in specs]
    held: dict[int, int] = {}
    while waiting:
        starting = {}
        for slot in range(min(environment.num_slots, len(waiting))):
            starting[slot] = choose_episode(waiting, tasks, slot, held)
            waiting.remove(starting[slot])
            held[slot] = tasks[starting[slot]]
        environment.begin(list(starting), [specs[index] for index in starting.values()])
        done, failed = _split(environment.begun, True)
        for slot, index in starting.items():
            if slot in failed:
                yield index, Outcome(specs[index], None, None, error=failed[slot])
                continue
            begun = environment.start_state(slot), environment.photographs(slot)
            episode = _episode(_Running(index, specs[index], *begun, [done[slot]]), environment, 0, NOBODY)
            yield index, Outcome(specs[index], None, 0, episode)


def _step(environment: Environment, slots: list[int], actions: np.ndarray, record: bool) -> dict[int, Frames]:
    return split_slots(slots, environment.step(slots, actions, record))


def _split(call: Callable[..., dict[int, Frames]], *arguments) -> tuple[dict[int, Frames], dict[int, str]]:
    """Asks the environment; returns slot -> its frames, and slot -> what went wrong there."""
    try:
        return call(*arguments), {}
    except EpisodeError as error:
        return error.done, error.failed


def _advance(run: _Running, frames: Frames, actions: np.ndarray, max_steps: int, record: bool) -> None:
    inside = frames.success[: max_steps - run.steps]  # a chunk may reach past the limit: what happens there is void
    if run.first_success is None and inside.any():
        run.first_success = run.steps + int(inside.argmax()) + 1
    run.holds = bool(inside[-1])
    run.frames = [*run.frames, frames] if record else [frames]
    run.actions.append(actions)
    run.chunks += 1
    run.steps += len(actions)


def _ended(run: _Running, max_steps: int, after_success: int) -> bool:
    succeeded = run.first_success is not None and run.steps >= run.first_success + after_success
    return succeeded or run.steps >= max_steps


def _outcome(
    run: _Running,
    environment: Environment,
    record: bool,
    actor: str,
    noise: float,
    after_success: int,
    max_steps: int,
) -> Outcome:
    success = run.first_success is not None
    steps = run.first_success if success else max_steps
    if not record:
        return Outcome(run.spec, success, steps, holds=run.holds)
    length = min(steps + after_success, max_steps) if success else max_steps
    return Outcome(run.spec, success, steps, _episode(run, environment, length, actor, noise), run.holds)


def _episode(run: _Running, environment: Environment, length: int, actor: str, noise: float = 0.0) -> Episode:
    join = lambda leaves: np.concatenate(leaves)[: length + 1]
    return Episode(
        images=join([f.images for f in run.frames]),
        proprio=join([f.proprio for f in run.frames]).astype(np.float32),
        actions=np.concatenate([np.zeros((0, ACTION_DIM)), *run.actions])[:length].astype(np.float32),
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
        sample=run.spec.sample,
        photographs=run.photographs,
    )
