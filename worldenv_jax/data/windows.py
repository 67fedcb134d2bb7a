# SPDX-License-Identifier: Apache-2.0
"""Training windows cut from episodes, and a sampler without state: a batch is a function of (seed, step).

A windows object is a finite collection: `len` windows, `groups` of window indices to be drawn equally often, and
`window(index, rng)`, one unbatched dict of NumPy arrays. `BatchSampler` shuffles and stacks them.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from worldenv_jax.data.episodes import Episode, summarize_episodes

Window = dict[str, Any]  # arrays, and strings where the key is "instruction"


class Windows(Protocol):
    """What can be sampled."""

    groups: tuple[np.ndarray, ...]  # int [n_g] each: indices of windows; every batch takes equally from each group

    def __len__(self) -> int: ...

    def window(self, index: int, rng: np.random.Generator) -> Window:
        """One window; `rng` serves those that make random choices."""


class _Cuts:
    """All (episode, t) pairs: episode i has `counts[i]` windows, at t = 0, 1, ..."""

    def __init__(self, counts: np.ndarray):
        self.starts = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> tuple[int, int]:
        episode = int(np.searchsorted(self.starts, index, side="right")) - 1
        return episode, int(index - self.starts[episode])

    def of_episodes(self, chosen: np.ndarray) -> np.ndarray:
        """Window indices of the episodes where `chosen` bool [episodes] is True."""
        return np.flatnonzero(np.repeat(chosen, np.diff(self.starts)))


class PolicyWindows:
    """The observation at t and the chunk of K actions from t on.

    Keys: images uint8 [V, H, W, 3], proprio float32 [8], actions float32 [K, 7] (environment actions), task int32,
    instruction str. Only t <= T - K, as in OpenVLA-OFT, unless `pad`; then every t, and the chunk is filled up with
    zero deltas and the gripper held.
    """

    def __init__(self, episodes: Sequence[Episode], chunk: int, pad: bool = False):
        """Raises ValueError where no episode has a window."""
        self._episodes, self._chunk = episodes, chunk
        steps = np.array([summary.num_steps for summary in summarize_episodes(episodes)], np.int64)
        self._cuts = _Cuts(steps if pad else np.maximum(steps - chunk + 1, 0))
        self.groups = (np.arange(len(self._cuts)),)
        if not len(self):
            raise ValueError(f"no windows: {len(episodes)} episodes, none with {chunk} steps; use a shorter chunk")

    def __len__(self) -> int:
        return len(self._cuts)

    def window(self, index: int, rng: np.random.Generator) -> Window:
        """The window `index`; makes no random choice."""
        number, t = self._cuts[index]
        episode = self._episodes[number]
        return {
            "images": episode.images[t],
            "proprio": episode.proprio[t],
            "actions": padded_chunk(episode.actions, t, self._chunk),
            "task": np.int32(episode.task),
            "instruction": episode.instruction,
        }


class SimulatorWindows:
    """Sparse memory of the frames up to t, and the K frames after it with the actions that led there.

    Keys, F history frames before K future ones: episode int32 (its number), time int32 (t), frames uint8
    [F+K, V, H, W, 3], proprio float32 [F+K, 8], previous_proprio float32 [8] (at t - 1; at 0 where t is 0),
    previous_action float32 [7] (environment action of t - 1; zeros where t is 0), intrinsics float32 [F+K, V, 3, 3],
    pose float32 [F+K, V, 4, 4], actions float32 [K, 7] (environment actions t to t + K - 1), mask bool [F+K], False
    where an episode of fewer than K steps was filled up by repeating its last frame. Successful and failed episodes are
    two groups.
    """

    def __init__(self, episodes: Sequence[Episode], history: Callable[[int], np.ndarray], chunk: int):
        """`history` maps a step t to the indices of the F frames that the simulator remembers then, t last."""
        self._episodes, self._history, self._chunk = episodes, history, chunk
        steps, succeeded = _survey(episodes)
        self._cuts = _Cuts(np.maximum(steps - chunk, 0) + 1)
        groups = (self._cuts.of_episodes(~succeeded), self._cuts.of_episodes(succeeded))
        self.groups = tuple(group for group in groups if len(group))

    def __len__(self) -> int:
        return len(self._cuts)

    def window(self, index: int, rng: np.random.Generator) -> Window:
        """The window `index`; makes no random choice."""
        number, t = self._cuts[index]
        episode, K = self._episodes[number], self._chunk
        history = self._history(t)
        frames = np.concatenate([history, t + 1 + np.arange(K)])
        mask = frames <= episode.num_steps
        frames = np.minimum(frames, episode.num_steps)
        return {
            "episode": np.int32(number),
            "time": np.int32(t),
            "frames": episode.images[frames],
            "proprio": episode.proprio[frames],
            "previous_proprio": episode.proprio[max(t - 1, 0)],
            "previous_action": episode.actions[t - 1] if t else np.zeros_like(episode.actions[0]),
            "intrinsics": episode.intrinsics[frames],
            "pose": episode.camera_pose[frames],
            "actions": padded_chunk(episode.actions, t, K),
            "mask": mask,
        }


@dataclass(frozen=True)
class ReflectorWindows:
    """Frames of one episode with the success of the task at each, padded to a fixed length.

    Keys: frames uint8 [L, V, H, W, 3], frame_index int32 [L] (their times, ascending), frame_mask bool [L], labels
    float32 [L], task int32, instruction str. Mode "streaming": the whole episode, or of o_1:t of a longer one the last
    L / 2 frames and as many drawn at random from before. Mode "uniform" (the paper): at most L frames spread evenly
    over o_1:t, one is o_t. t is drawn at random, in successful episodes half of the time after the success. A share
    `negatives` of the windows from successful episodes gets the instruction of another task, and labels 0. Successful
    and failed episodes are two groups.
    """

    episodes: Sequence[Episode]
    length: int
    mode: str = "streaming"
    negatives: float = 0.25

    def __post_init__(self):
        """Raises ValueError on an unknown mode."""
        if self.mode not in ("streaming", "uniform"):
            raise ValueError(f"got mode {self.mode!r}, expected 'streaming' or 'uniform'")

    @functools.cached_property
    def groups(self) -> tuple[np.ndarray, ...]:
        """Failed and successful episodes."""
        succeeded = _survey(self.episodes)[1]
        return tuple(group for group in (np.flatnonzero(~succeeded), np.flatnonzero(succeeded)) if len(group))

    @functools.cached_property
    def _instructions(self) -> tuple[str, ...]:
        return tuple(sorted({summary.instruction for summary in summarize_episodes(self.episodes)}))

    def __len__(self) -> int:
        return len(self.episodes)

    def window(self, index: int, rng: np.random.Generator) -> Window:
        """Episode `index`; draws the frames and the instruction."""
        episode = self.episodes[index]
        frames = self._streamed(episode, rng) if self.mode == "streaming" else self._uniform(episode, rng)
        padding = self.length - len(frames)
        instruction, labels = episode.instruction, episode.success[frames].astype(np.float32)
        others = [other for other in self._instructions if other != instruction]
        if episode.succeeded and others and rng.random() < self.negatives:
            instruction, labels = others[rng.integers(len(others))], np.zeros_like(labels)
        images = episode.images[frames]
        return {
            "frames": np.concatenate([images, np.zeros((padding, *images.shape[1:]), np.uint8)]),
            "frame_index": np.append(frames, frames[-1] + 1 + np.arange(padding)).astype(np.int32),
            "frame_mask": np.arange(self.length) < len(frames),
            "labels": np.pad(labels, (0, padding)),
            "task": np.int32(episode.task),
            "instruction": instruction,
        }

    def _streamed(self, episode: Episode, rng: np.random.Generator) -> np.ndarray:
        if episode.num_steps < self.length:
            return np.arange(episode.num_steps + 1)
        last = self._last(episode, rng)
        if last < self.length:
            return np.arange(last + 1)
        early = last + 1 - self.length // 2
        chosen = np.sort(rng.choice(early, self.length - self.length // 2, replace=False))
        return np.append(chosen, np.arange(early, last + 1))

    def _uniform(self, episode: Episode, rng: np.random.Generator) -> np.ndarray:
        last = self._last(episode, rng)
        return np.unique(np.linspace(0 if self.length > 1 else last, last, self.length).round().astype(int))

    def _last(self, episode: Episode, rng: np.random.Generator) -> int:
        after_success = episode.succeeded and rng.random() < 0.5
        return rng.integers(episode.first_success if after_success else 0, episode.num_steps + 1)


@dataclass(frozen=True)
class BatchSampler:
    """Shuffled batches that depend on nothing but (seed, step): to resume, go on with the next step.

    The rows of all batches form one stream that walks through each group in a new random order per pass and takes
    the groups in turn.
    """

    windows: Windows
    batch_size: int
    seed: int

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, Any]:
        """Batch number `step`, or the rows of it that belong to one host.

        Returns: the keys of a window, arrays with a leading batch axis, strings as lists.
        """
        positions = step * self.batch_size + np.arange(self.batch_size)[rows]
        return stack_windows([self.row(int(position)) for position in positions])

    def row(self, position: int) -> Window:
        """Row number `position` of the stream; row r of batch s is number s * batch_size + r."""
        groups = self.windows.groups
        group, place = position % len(groups), position // len(groups)
        index = groups[group][_shuffled(self.seed, group, len(groups[group]), place)]
        return self.windows.window(int(index), np.random.default_rng([self.seed, position]))


def stack_windows(windows: Sequence[Window]) -> dict[str, Any]:
    """Stacks windows along a new first axis; strings become a list."""
    first = windows[0]
    columns = {key: [window[key] for window in windows] for key in first}
    return {key: c if isinstance(first[key], str) else np.stack(c) for key, c in columns.items()}


def _shuffled(seed: int, group: int, size: int, place: int) -> int:
    return int(_permutation(seed, group, size, place // size)[place % size])


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, group: int, size: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, group, epoch]).permutation(size)


def _survey(episodes: Sequence[Episode]) -> tuple[np.ndarray, np.ndarray]:
    """Number of steps int64 [N] and success bool [N]; raises ValueError where there are no episodes."""
    if not len(episodes):
        raise ValueError("no windows: there are no episodes")
    summaries = summarize_episodes(episodes)
    return np.array([s.num_steps for s in summaries], np.int64), np.array([s.succeeded for s in summaries])


def padded_chunk(actions: np.ndarray, t: int, chunk: int) -> np.ndarray:
    """Actions t .. t+K-1 float32 [K, 7]; past the end zero deltas with the last gripper command."""
    known = actions[t : t + chunk]
    held = np.zeros((chunk - len(known), actions.shape[1]), np.float32)
    held[:, 6] = actions[-1, 6]
    return np.concatenate([known, held])
