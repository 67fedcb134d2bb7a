# SPDX-License-Identifier: Apache-2.0
"""One worker process: one MuJoCo model, one GL context, one episode at a time.

Started by `pool.py` as ``python -m worldenv_jax.envs.libero.worker <socket> <suite> <image size> <cameras>
<photograph size>``. Requests are tuples (name, *arguments), the names being the public methods of `Worker`; replies are
("done", result) or ("failed", traceback). The process ends when its socket closes.
"""

import gc
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection

import numpy as np

from worldenv_jax.envs.libero.expert import Expert
from worldenv_jax.envs.libero.simulation import Simulation, Start
from worldenv_jax.envs.protocol import start_seed
from worldenv_jax.types import Camera, EpisodeSpec


class Recording:
    """Frames of one episode, collected one by one."""

    def __init__(self, simulation: Simulation, draw: bool = True):
        self.simulation, self.views = simulation, simulation.cameras if draw else ()
        self.images, self.proprio, self.success, self.cameras = [], [], [], []

    def frame(self) -> None:
        """Adds the present picture, proprioception and cameras."""
        self.images.append(self.simulation.images(self.views))
        self.proprio.append(self.simulation.proprio())
        self.cameras.append(self.simulation.camera(self.views))

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, Camera]:
        """Images [k, V, H, W, 3], proprio [k, 8], success [K], cameras [k, V, ...]."""
        camera = Camera(*(np.stack(leaf) for leaf in zip(*self.cameras)))
        return np.stack(self.images), np.stack(self.proprio), np.array(self.success, bool), camera


class Worker:
    """What a worker can be asked to do."""

    def __init__(self, suite: str, image_size: int, cameras: tuple[str, ...], photograph_size: int):
        self.suite, self.image_size, self.cameras = suite, image_size, cameras
        self.photograph_size = photograph_size
        self.simulation: Simulation | None = None

    def reset(self, spec: EpisodeSpec):
        """Begins an episode; returns (first frame, start state, photographs or None)."""
        start = self._begin(spec)
        recording = Recording(self.simulation)
        recording.frame()
        recording.success.append(self.simulation.success())
        return recording.arrays(), start._asdict(), self._photographs()

    def replay(self, spec: EpisodeSpec, actions: np.ndarray) -> None:
        """Brings a new process to where a dead one was: begins the episode and executes its actions [n, 7]."""
        self._begin(spec)
        for action in actions:
            self.simulation.step(action)

    def step(self, actions: np.ndarray, every_frame: bool):
        """Executes actions [K, 7]; returns all frames or the last one."""
        recording = Recording(self.simulation)
        for index, action in enumerate(actions):
            recording.success.append(self.simulation.step(action))
            if every_frame or index == len(actions) - 1:
                recording.frame()
        return recording.arrays()

    def demonstrate(self, spec: EpisodeSpec, noise: float, after_success: int, draw: bool):
        """Runs the scripted expert to its first success and `after_success` steps on, or until it gives up.

        Demonstrations may take twice the protocol's step limit, which holds for policies.

        Returns:
          (frames, executed actions float32 [T, 7], start state, photographs or None); frames include the one before
          the first action.
        """
        start = self._begin(spec)
        photographs = self._photographs() if draw else None
        rng = np.random.default_rng(start_seed(self.suite, spec, "expert noise"))
        recording, actions, left = Recording(self.simulation, draw), [], after_success
        recording.frame()
        recording.success.append(self.simulation.success())
        for action in Expert(self.simulation.env).actions():
            action = np.array(action)
            action[:6] += rng.laplace(0.0, noise, 6)
            actions.append(np.clip(action, -1.0, 1.0).astype(np.float32))
            recording.success.append(self.simulation.step(actions[-1]))
            recording.frame()
            left -= any(recording.success)
            if left < 0 or len(actions) == 2 * self.simulation.protocol.max_steps:
                break
        return recording.arrays(), np.array(actions, np.float32).reshape(-1, 7), start._asdict(), photographs

    def _photographs(self) -> np.ndarray | None:
        return self.simulation.photographs(self.photograph_size) if self.photograph_size else None

    def _begin(self, spec: EpisodeSpec) -> Start:
        if self.simulation is None or self.simulation.task != spec.task:
            if self.simulation is not None:
                self.simulation.close()
                self.simulation = None
                gc.collect()  # two models would not fit beside each other
            self.simulation = Simulation(self.suite, spec.task, self.image_size, self.cameras)
        return self.simulation.begin(spec)


def serve(connection: Connection, worker: Worker) -> None:
    """Answers requests until the other side hangs up."""
    while True:
        try:
            name, *arguments = connection.recv()
        except EOFError:
            return
        try:
            reply = ("done", getattr(worker, name)(*arguments))
        except Exception:
            reply = ("failed", traceback.format_exc())
        connection.send(reply)


def main(descriptor: str, suite: str, image_size: str, cameras: str, photograph_size: str) -> None:
    """Serves on an inherited socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the parent, which then closes the socket
    worker = Worker(suite, int(image_size), tuple(filter(None, cameras.split(","))), int(photograph_size))
    serve(Connection(int(descriptor)), worker)
    sys.stderr.flush()
    os._exit(0)  # MuJoCo's GL contexts complain when the interpreter tears them down


if __name__ == "__main__":
    main(*sys.argv[1:])
