# SPDX-License-Identifier: Apache-2.0
"""The one interface behind which both worlds stand: the embedded tabletop and the real LIBERO simulator.

An environment has `num_slots` independent places in which an episode can run. The runner (`envs/runner.py`) puts an
episode into a slot with `begin`, advances any subset of the slots by a chunk of actions with `step`, and refills a
slot as soon as its episode has ended; other slots are stepped meanwhile.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from worldenv_jax.data.episodes import Episode
from worldenv_jax.types import Camera, EpisodeSpec


class Frames(NamedTuple):
    """k consecutive frames of n slots."""

    images: np.ndarray  # uint8 [n, k, V, H, W, 3], upright
    proprio: np.ndarray  # float32 [n, k, 8]
    success: np.ndarray  # bool [n, K]: the task predicate after every action, whether or not its frame was rendered
    camera: Camera  # numpy leaves [n, k, V, ...]


class EpisodeError(RuntimeError):
    """Episodes that could not be run: the world failed, not the policy, so they are neither successes nor failures.

    Attributes:
      failed: slot -> what went wrong there. The slot can be used again after the next `reset`.
      done: slot -> result of the same call, for the slots that went well; from `Environment.reset` and `step` these
        are `Frames` without their axis n.
    """

    def __init__(self, failed: dict[int, str], done: dict[int, Any]):
        where, text = next(iter(failed.items()))
        super().__init__(f"{len(failed)} episode(s) could not be run; the first, number {where}:\n{text}")
        self.failed, self.done = failed, done


def choose_episode(waiting: Sequence[int], tasks: Sequence[int], slot: int, held: dict[int, int]) -> int:
    """Which of the waiting episodes a slot takes, such that it changes its task rarely (LIBERO loads a new scene then).

    Args:
      waiting: positions in `tasks`, not empty.
      tasks: the task of every episode.
      slot: who asks.
      held: slot -> the task of its last episode.

    Returns:
      the first episode of the slot's own task, else of a task that no other slot has, else the first.
    """
    others = {task for other, task in held.items() if other != slot}
    own = (position for position in waiting if tasks[position] == held.get(slot))
    free = (position for position in waiting if tasks[position] not in others)
    return next(chain(own, free, waiting))


def split_slots(slots: Sequence[int], frames: Frames) -> dict[int, Frames]:
    """Slot -> its frames, without the axis n; copies, so that the batch can be freed."""
    return {slot: jax.tree.map(lambda leaf, row=row: np.array(leaf[row]), frames) for row, slot in enumerate(slots)}


class StartsAtOnce:
    """`begin` and `begun` of a world whose `reset` takes no time."""

    _beginning: tuple[Sequence[int], Sequence[EpisodeSpec]] = ((), ())

    def begin(self, slots: Sequence[int], specs: Sequence[EpisodeSpec]) -> None:
        """Remembers what to begin."""
        self._beginning = (slots, specs)

    def begun(self, wait: bool) -> dict[int, Frames]:
        """Begins it."""
        (slots, specs), self._beginning = self._beginning, ((), ())
        return split_slots(slots, self.reset(slots, specs)) if slots else {}


class Environment(Protocol):
    """A batch of episodes in a world that is not learned."""

    name: str
    instructions: tuple[str, ...]  # one per task, as a person would say it
    max_steps: int  # an episode that has not succeeded by then has failed
    num_slots: int
    image_size: int
    num_views: int
    protocol: dict  # every number that decides a success rate, JSON-able; its hash is printed beside each score
    restarts: int  # worker processes that died and were replaced; their episodes were repeated, results are the same

    def reset(self, slots: Sequence[int], specs: Sequence[EpisodeSpec]) -> Frames:
        """Starts one episode per slot; returns the first frames (k = 1, success [n, 1]).

        Raises EpisodeError where some slots failed.
        """

    def begin(self, slots: Sequence[int], specs: Sequence[EpisodeSpec]) -> None:
        """As `reset`, but does not wait; `begun` has the first frames. Other slots can be stepped meanwhile."""

    def begun(self, wait: bool) -> dict[int, Frames]:
        """The slots that have begun since the last call -> their first frames, without the axis n.

        Args:
          wait: for all that were told to begin; otherwise takes those that are ready.

        Raises EpisodeError where some slots failed.
        """

    def step(self, slots: Sequence[int], actions: np.ndarray, every_frame: bool) -> Frames:
        """Runs environment actions float32 [n, K, 7]; renders all K frames or only the last (k = K or 1).

        Raises ValueError on NaN or on a wrong shape, EpisodeError where some slots failed. Actions are clipped to
        [-1, 1].
        """

    def start_state(self, slot: int) -> dict[str, np.ndarray]:
        """The true state at the start of the slot's episode: enough to begin it again (`EpisodeSpec` is, too)."""

    def photographs(self, slot: int) -> np.ndarray | None:
        """The first frame of the slot's episode at another resolution, uint8 [V, H', W', 3], where such are taken."""

    def expert_episodes(
        self, specs: Sequence[EpisodeSpec], noise: float, draw: bool = True
    ) -> Iterator[Episode | EpisodeError]:
        """Scripted demonstrations, recorded with every frame, in the order of `specs`, successful or not.

        One that could not be run has an EpisodeError in its place.

        `noise` is the scale of Laplace noise on the six deltas; the recorded actions are the executed ones. Without
        `draw` a world in which drawing is slow leaves images and cameras without views (V = 0).
        """

    def close(self) -> None:
        """Ends worker processes."""
