# SPDX-License-Identifier: Apache-2.0
"""`LiberoEnvironment`: a suite of the LIBERO benchmark behind the interface of `envs/base.py`."""

from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from worldenv_jax.data.episodes import Episode
from worldenv_jax.envs.base import EpisodeError, Frames
from worldenv_jax.envs.libero import installation
from worldenv_jax.envs.libero.cameras import CAMERA_NAMES
from worldenv_jax.envs.libero.pool import WorkerPool
from worldenv_jax.envs.protocol import check_spec, libero_protocol
from worldenv_jax.types import ACTION_DIM, EpisodeSpec

VIEWS = dict(zip(("agentview", "wrist"), CAMERA_NAMES))


class LiberoEnvironment:
    """Episodes of one LIBERO suite, each slot a process of its own.

    Images are upright, and mirrored left to right: OpenVLA-OFT and its datasets turn the simulator's bottom-up frames
    by 180 degrees (``policy_frame = raw[::-1, ::-1]``), and so do we, for both views. The cameras describe exactly
    these images (negative horizontal focal length, see `cameras.py`).

    Args:
      suite: "libero_spatial", "libero_object", "libero_goal", "libero_10" or "libero_90".
      image_size: width and height of every view in pixels.
      views: any of "agentview" and "wrist", in the order of the images' V axis; none for physics alone (no GL needed).
      num_slots: processes; each takes 1.3 to 1.9 GB.
      after_success: steps for which the expert's recordings go on after the first success.
      photograph_size: width and height of photographs, the views of every start at this size; 0: none are taken.

    Raises:
      ValueError: unknown suite or view, or photographs without a view.
      WorldEnvError: LIBERO, its assets or a GL library are missing; says what to install.
    """

    def __init__(
        self,
        suite: str = "libero_object",
        image_size: int = 128,
        views: Sequence[str] = tuple(VIEWS),
        num_slots: int = 4,
        after_success: int = 0,
        photograph_size: int = 0,
    ):
        protocol = libero_protocol(suite)
        unknown = [view for view in views if view not in VIEWS]
        if unknown:
            raise ValueError(f"unknown views {unknown}; LIBERO has {', '.join(VIEWS)}")
        if photograph_size and not views:
            raise ValueError("photograph_size: there is no view to photograph")
        self.name = suite
        self.instructions = tuple(map(installation.instruction, installation.task_names(suite)))
        self.max_steps = protocol.max_steps
        self.num_slots, self.image_size, self.num_views = num_slots, image_size, len(views)
        self.views, self.after_success = tuple(views), after_success
        self.gl_backend = installation.gl_backend() if views else None
        self.protocol = protocol.to_dict() | {
            "views": list(views),
            "image_size": image_size,
            "versions": installation.versions(),
            "assets": installation.assets_fingerprint(),
        }
        self._rules = protocol
        self._starts: dict[int, dict[str, np.ndarray]] = {}
        self._photographs: dict[int, np.ndarray | None] = {}
        self._beginning: set[int] = set()  # slots that `begun` has to report
        cameras = ",".join(VIEWS[view] for view in views)
        self._pool = WorkerPool(num_slots, [suite, str(image_size), cameras, str(photograph_size)])

    @property
    def restarts(self) -> int:
        """How many worker processes died and were replaced; their episodes were repeated and are not affected."""
        return self._pool.restarts

    def reset(self, slots: Sequence[int], specs: Sequence[EpisodeSpec]) -> Frames:
        """Starts one episode per slot, settled; returns the first frames (k = 1, success [n, 1]).

        Raises:
          ValueError: a spec that the protocol does not define.
          EpisodeError: the simulator failed in some slots.
        """
        self.begin(slots, specs)
        frames = self._begun(slots, wait=True)
        return _stack(frames, slots)

    def begin(self, slots: Sequence[int], specs: Sequence[EpisodeSpec]) -> None:
        """As `reset`, but does not wait: a new scene takes seconds, in which the other slots can be stepped.

        Raises:
          ValueError: a spec that the protocol does not define.
        """
        for spec in specs:
            check_spec(spec, self._rules, len(self.instructions))
        self._pool.send({slot: ("reset", spec) for slot, spec in zip(slots, specs, strict=True)})
        self._beginning |= set(slots)

    def begun(self, wait: bool) -> dict[int, Frames]:
        """Slots that have begun since the last call -> their first frames; waits for all, or takes what is ready.

        Raises:
          EpisodeError: the simulator failed in some slots.
        """
        return self._begun(self._beginning, wait)

    def _begun(self, slots: Iterable[int], wait: bool) -> dict[int, Frames]:
        done, failed = self._pool.collect(slots, wait)
        self._beginning -= done.keys() | failed.keys()
        self._starts |= {slot: start for slot, (_, start, _) in done.items()}
        self._photographs |= {slot: photographs for slot, (_, _, photographs) in done.items()}
        frames = {slot: Frames(*reply) for slot, (reply, _, _) in done.items()}
        if failed:
            raise EpisodeError(failed, frames)
        return frames

    def step(self, slots: Sequence[int], actions: np.ndarray, every_frame: bool) -> Frames:
        """Runs environment actions float32 [n, K, 7]; renders all K frames or only the last (k = K or 1).

        Goes on after success as before it. Actions are clipped to [-1, 1].

        Raises:
          ValueError: NaN or infinite actions, or a wrong shape.
          EpisodeError: the simulator failed in some slots.
        """
        actions = np.asarray(actions, np.float32)
        if actions.ndim != 3 or actions.shape[::2] != (len(slots), ACTION_DIM):
            raise ValueError(f"actions: got shape {actions.shape}, expected ({len(slots)}, K, {ACTION_DIM})")
        if not np.isfinite(actions).all():
            row, index = np.argwhere(~np.isfinite(actions))[0][:2]
            raise ValueError(f"actions: NaN or infinity for slot {slots[row]}, action {index} of its chunk")
        done, failed = self._pool.call({s: ("step", rows, every_frame) for s, rows in zip(slots, actions)})
        frames = {slot: Frames(*reply) for slot, reply in done.items()}
        if failed:
            raise EpisodeError(failed, frames)
        return _stack(frames, slots)

    def start_state(self, slot: int) -> dict[str, np.ndarray]:
        """Start of the slot's episode before settling.

        Returns:
          `state` float64 [1 + nq + nv] (MuJoCo time, positions, velocities) and `fixtures` float64 [F, 7] (positions
          and quaternions, w first, of the fixtures in alphabetical order).
        """
        return self._starts[slot]

    def photographs(self, slot: int) -> np.ndarray | None:
        """The views at the start of the slot's episode, uint8 [V, photograph_size, photograph_size, 3], or None."""
        return self._photographs[slot]

    def expert_episodes(
        self, specs: Sequence[EpisodeSpec], noise: float, draw: bool = True
    ) -> Iterator[Episode | EpisodeError]:
        """Scripted demonstrations, recorded with every frame, in the order of `specs`, successful or not.

        One that could not be run has an EpisodeError in its place. Running episodes in the slots are lost.

        Args:
          specs: which episodes; an episode's noise is a function of its spec.
          noise: scale of Laplace noise on the six deltas; the recorded actions are the executed ones.
          draw: whether there are pictures; without, images and cameras have no views (V = 0): 4 times faster.

        Raises:
          ValueError: a spec that the protocol does not define.
        """
        for spec in specs:
            check_spec(spec, self._rules, len(self.instructions))
        requests = [("demonstrate", spec, float(noise), self.after_success, draw) for spec in specs]
        replies = self._pool.map(requests, [spec.task for spec in specs])
        for position, (spec, (status, value)) in enumerate(zip(specs, replies)):
            if status == "failed":
                yield EpisodeError({position: value}, {})
                continue
            (images, proprio, success, camera), actions, start, photographs = value
            yield Episode(
                images=images,
                proprio=proprio,
                actions=actions,
                success=success,
                intrinsics=camera.intrinsics,
                camera_pose=camera.pose,
                instruction=self.instructions[spec.task],
                task=spec.task,
                seed=spec.seed,
                split=spec.split,
                starts=spec.starts,
                actor="perturbed_expert" if noise else "expert",
                noise=float(noise),
                environment=start,
                photographs=photographs,
            )

    def close(self) -> None:
        """Ends worker processes."""
        self._pool.close()


def _stack(frames: dict[int, Frames], slots: Sequence[int]) -> Frames:
    """The frames of some slots with an axis n, in the order of the slots."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(frames[slot] for slot in slots))
