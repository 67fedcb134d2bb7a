# SPDX-License-Identifier: Apache-2.0
"""Worker processes that may die without taking an episode with them.

Every slot is one process with one MuJoCo model. Requests to several slots run at the same time. A process that dies
(out of memory, GL crash, SIGKILL) or hangs is replaced and its episode executed again up to the request that failed;
physics is deterministic, so the result is the one that would have been. `restarts` counts these. An exception inside
the simulator is another matter: it would come again, so it is reported as a failed request, and the process, in which
anything may be broken now, is replaced too.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from worldenv_jax.envs.base import choose_episode
from worldenv_jax.types import ACTION_DIM

_TIME_LIMIT = 900.0  # seconds for one request; an episode with every frame takes about a minute on a busy core
_DEATHS_ALLOWED = 3  # per request
_LOOK_AHEAD = 8  # jobs per slot that `map` may run before their turn
_ONE_CORE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class _Slot:
    """One worker process, the request it is busy with, and what is needed to bring a successor to the same point."""

    def __init__(self, arguments: tuple[str, ...]):
        self.arguments = arguments
        self.request: tuple | None = None
        self.deaths = 0
        self.spec, self.actions = None, []  # of the running episode
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "worldenv_jax.envs.libero.worker", str(theirs.fileno()), *self.arguments],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            env=os.environ | _ONE_CORE | {"JAX_PLATFORMS": "cpu"},
        )
        theirs.close()
        self.connection = Connection(ours.detach())

    def stop(self) -> str:
        """Hangs up and waits, kills after 5 s; returns what it last wrote to standard error."""
        self.connection.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.seek(0)
        words = self.errors.read()[-2000:].decode(errors="replace")
        self.errors.close()
        return f"exit code {self.process.returncode}\n{words}"

    def kill(self) -> None:
        """Ends the process at once and starts an idle one."""
        self.process.kill()
        self.stop()
        self.request, self.spec = None, None
        self._start()

    def send(self, request: tuple) -> None:
        """Begins a request."""
        self.request, self.deaths = request, 0
        self._transmit([request])

    def receive(self) -> tuple | None:
        """Reads one reply: ("done" or "failed", value), or None if there is more to wait for."""
        try:
            status, value = self.connection.recv()
        except (EOFError, OSError):
            return self.revive()
        self.replies_due -= 1
        if self.replies_due and status == "done":
            return None
        if status == "failed":
            self.kill()
        else:
            self._remember(self.request)
            self.request = None
        return status, value

    def revive(self) -> tuple | None:
        """Replaces a dead or hanging process and repeats its episode; gives up after several deaths."""
        self.process.kill()
        words = self.stop()
        self._start()
        self.deaths += 1
        if self.deaths > _DEATHS_ALLOWED:
            self.request, self.spec = None, None
            return "failed", f"the worker process died {self.deaths} times; at last with {words}"
        messages = [self.request]
        if self.spec is not None and self.request[0] == "step":
            actions = np.concatenate([np.zeros((0, ACTION_DIM), np.float32), *self.actions])
            messages.insert(0, ("replay", self.spec, actions))
        self._transmit(messages)
        return None

    def _transmit(self, messages: list[tuple]) -> None:
        self.deadline = time.monotonic() + _TIME_LIMIT
        self.replies_due = len(messages)
        try:
            for message in messages:
                self.connection.send(message)
        except OSError:
            pass  # it is dead: reading will tell

    def _remember(self, request: tuple) -> None:
        if request[0] == "step":
            self.actions.append(request[1])
        else:
            self.spec, self.actions = (request[1] if request[0] == "reset" else None), []


class WorkerPool:
    """`size` slots, each with its own process.

    Args:
      size: number of slots.
      arguments: of the worker's command line, without the socket.
    """

    def __init__(self, size: int, arguments: Sequence[str]):
        self.restarts = 0
        self._slots = [_Slot(tuple(arguments)) for _ in range(size)]
        self._replies: dict[int, tuple] = {}  # slot -> what nobody has collected yet

    def process_ids(self) -> list[int]:
        """Process id of every slot."""
        return [slot.process.pid for slot in self._slots]

    def close(self) -> None:
        """Ends all processes; may be called twice."""
        for slot in self._slots:
            slot.connection.close()
        while self._slots:
            self._slots.pop().stop()

    def call(self, requests: Mapping[int, tuple]) -> tuple[dict[int, Any], dict[int, str]]:
        """Sends one request to each of some slots and waits for all.

        Returns:
          slot -> result, for the requests that went well; slot -> traceback, for those that failed.
        """
        self.send(requests)
        return self.collect(requests, wait_for_all=True)

    def send(self, requests: Mapping[int, tuple]) -> None:
        """Sends one request to each of some slots. What a slot was still busy with is given up."""
        for number, request in requests.items():
            self._replies.pop(number, None)
            if self._slots[number].request is not None:
                self._slots[number].kill()
            self._slots[number].send(request)

    def collect(self, slots: Iterable[int], wait_for_all: bool) -> tuple[dict[int, Any], dict[int, str]]:
        """Results of requests that were sent to some slots, as of `call`: of all, or of those that are ready."""
        while missing := set(slots) - self._replies.keys():
            reply = self._next_reply(patient=wait_for_all)
            if reply is None:
                break
            self._replies[reply[0]] = reply[1]
        replies = {slot: self._replies.pop(slot) for slot in set(slots) - missing}
        done = {slot: value for slot, (status, value) in replies.items() if status == "done"}
        return done, {slot: value for slot, (status, value) in replies.items() if status == "failed"}

    def map(self, requests: Sequence[tuple], tasks: Sequence[int]) -> Iterator[tuple[str, Any]]:
        """("done", result) or ("failed", traceback) of independent requests in their order, all slots busy.

        Args:
          requests: what to do.
          tasks: of every request; a slot stays with its task while it can (changing it costs seconds).
        """
        for slot in self._slots:
            if slot.request is not None:
                slot.kill()
        waiting = list(range(len(requests)))
        running, ready, held = {}, {}, {}
        try:
            for index in range(len(requests)):
                while index not in ready:
                    for slot in set(range(len(self._slots))) - running.keys():
                        near = [i for i in waiting if i < index + _LOOK_AHEAD * len(self._slots)]
                        if near:
                            job = choose_episode(near, tasks, slot, held)
                            waiting.remove(job)
                            running[slot], held[slot] = job, tasks[job]
                            self.send({slot: requests[job]})
                    slot, reply = self._next_reply()
                    ready[running.pop(slot)] = reply
                yield ready.pop(index)
        finally:
            for number, slot in enumerate(self._slots):  # none after `close`
                if number in running:
                    slot.kill()

    def _next_reply(self, patient: bool = True) -> tuple[int, tuple] | None:
        """(slot, (status, value)) of the next busy slot to finish; None where none has and we are not `patient`."""
        while True:
            busy = {slot.connection: number for number, slot in enumerate(self._slots) if slot.request is not None}
            readable = wait(list(busy), timeout=1.0 if patient else 0.0)
            late = [c for c, number in busy.items() if time.monotonic() > self._slots[number].deadline]
            for connection in readable or late:
                slot = self._slots[busy[connection]]
                deaths = slot.deaths
                reply = slot.receive() if readable else slot.revive()
                self.restarts += slot.deaths > deaths
                if reply is not None:
                    return busy[connection], reply
            if not (patient or readable or late):
                return None
