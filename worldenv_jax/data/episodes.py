# SPDX-License-Identifier: Apache-2.0
"""One recorded episode: the schema shared by demonstrations, exploration and imagined trajectories."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import numpy as np

from worldenv_jax.types import ACTION_DIM, PROPRIO_DIM, EpisodeSpec

NOBODY = "nobody"  # of an episode that is only a start: T = 0
ACTORS = ("expert", "perturbed_expert", "policy", "imagined", "human", NOBODY)


@dataclass(frozen=True)
class Episode:
    """T environment actions and the T + 1 frames around them.

    Frame t is seen *before* action t; frame T is seen after the last action. Images are upright RGB, actions
    are environment actions in [-1, 1], cameras follow OpenCV (see `worldenv_jax.types`).
    """

    images: np.ndarray  # uint8 [T+1, V, H, W, 3]
    proprio: np.ndarray  # float32 [T+1, 8]: position (3, m), axis-angle (3, rad), finger positions (2, m)
    actions: np.ndarray  # float32 [T, 7], environment actions
    success: np.ndarray  # bool [T+1], the task predicate at each frame
    intrinsics: np.ndarray  # float32 [T+1, V, 3, 3], in pixels
    camera_pose: np.ndarray  # float32 [T+1, V, 4, 4], camera to world
    instruction: str
    task: int
    seed: int
    split: str  # "train" | "test"
    starts: str  # "official" | "shifted"
    actor: str  # one of ACTORS
    noise: float = 0.0  # exploration scale factor of the actor
    environment: dict[str, np.ndarray] = field(default_factory=dict)  # the true start state; may be empty
    sample: int = 0  # which of several tries from this start
    photographs: np.ndarray | None = None  # uint8 [V, H', W', 3], frame 0 at another resolution

    @property
    def spec(self) -> EpisodeSpec:
        """Its start: what an environment needs to begin it again."""
        return EpisodeSpec(self.task, self.seed, self.split, self.starts, self.sample)

    @property
    def num_steps(self) -> int:
        """T, the number of actions."""
        return self.actions.shape[0]

    @property
    def succeeded(self) -> bool:
        """Whether the task predicate held at any frame."""
        return bool(self.success.any())

    @property
    def first_success(self) -> int | None:
        """Index of the first frame at which the predicate held, or None."""
        return int(self.success.argmax()) if self.succeeded else None


def until_success(episode: Episode) -> Episode:
    """The episode without what follows its first success.

    Raises:
        ValueError: it does not succeed, or begins at its goal: no action would be left.
    """
    end = episode.first_success
    if not end:
        raise ValueError(f"episode {episode.spec} has no action before a success: it succeeds at frame {end}")
    per_frame = ("images", "proprio", "success", "intrinsics", "camera_pose")
    frames = {name: getattr(episode, name)[: end + 1] for name in per_frame}
    return replace(episode, actions=episode.actions[:end], **frames)


class EpisodeSummary(NamedTuple):
    """What is needed to choose episodes; a dataset folder knows it without loading them."""

    num_steps: int
    succeeded: bool
    instruction: str
    task: int
    split: str
    actor: str


def summarize_episodes(episodes: Sequence[Episode]) -> list[EpisodeSummary]:
    """One summary per episode; taken from the sequence where it has `summaries`, as dataset folders do."""
    if hasattr(episodes, "summaries"):
        return episodes.summaries
    return [EpisodeSummary(*(getattr(e, name) for name in EpisodeSummary._fields)) for e in episodes]


class SelectedEpisodes(Sequence[Episode]):
    """Some episodes of a sequence, in its order, loaded when they are indexed."""

    def __init__(self, episodes: Sequence[Episode], keep: Callable[[EpisodeSummary], bool]):
        """Keeps the episodes for whose summary `keep` is True."""
        self._episodes = episodes
        kept = [(i, summary) for i, summary in enumerate(summarize_episodes(episodes)) if keep(summary)]
        self._indices = [i for i, _ in kept]
        self.summaries = [summary for _, summary in kept]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Episode:
        return self._episodes[self._indices[index]]


def validate_episode(episode: Episode) -> None:
    """Checks shapes, dtypes, names and finiteness.

    Raises:
        ValueError: one message that lists every difference as "field: got ..., expected ...".
    """
    frames = episode.num_steps + 1
    views = episode.images.shape[1:2]
    expected = {
        "images": (np.uint8, (frames, *views, *episode.images.shape[2:4], 3)),
        "proprio": (np.float32, (frames, PROPRIO_DIM)),
        "actions": (np.float32, (frames - 1, ACTION_DIM)),
        "success": (np.bool_, (frames,)),
        "intrinsics": (np.float32, (frames, *views, 3, 3)),
        "camera_pose": (np.float32, (frames, *views, 4, 4)),
    }
    acted = episode.num_steps or episode.actor == NOBODY
    problems = [] if acted else ["actions: got 0 steps, expected at least 1"]
    for name, (dtype, shape) in expected.items():
        value = getattr(episode, name)
        if value.dtype != dtype or value.shape != shape:
            got = f"{value.dtype} {list(value.shape)}"
            problems.append(f"{name}: got {got}, expected {np.dtype(dtype)} {list(shape)}")
        elif dtype == np.float32 and not np.isfinite(value).all():
            frame = int(np.argwhere(~np.isfinite(value))[0][0])
            problems.append(f"{name}: got NaN or infinity first at index {frame}, expected finite numbers")
    if episode.photographs is not None:
        dtype, shape = episode.photographs.dtype, episode.photographs.shape
        if dtype != np.uint8 or len(shape) != 4 or shape[:1] != views or shape[3] != 3:
            problems.append(f"photographs: got {dtype} {list(shape)}, expected uint8 [{views[0]}, H', W', 3]")
    if episode.actor not in ACTORS:
        problems.append(f"actor: got {episode.actor!r}, expected one of {ACTORS}")
    if problems:
        raise ValueError(f"invalid episode {episode.instruction!r}: " + "; ".join(problems))


def episodes_equal(left: Episode, right: Episode) -> bool:
    """Whether two episodes agree bit for bit in every field."""
    for item in fields(Episode):
        a, b = getattr(left, item.name), getattr(right, item.name)
        if item.name == "environment":
            if a.keys() != b.keys() or not all(_same_array(a[key], b[key]) for key in a):
                return False
        elif not _same_array(np.asarray(a), np.asarray(b)):
            return False
    return True


def _same_array(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b)
