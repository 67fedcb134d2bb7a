# SPDX-License-Identifier: Apache-2.0
"""The host loop of every training stage: resume, step, log, save, stop cleanly.

A batch is a function of the step number alone, and the state carries the key and every counter, so a run that was
stopped anywhere and resumed ends with the same bits as one that was not.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from worldenv_jax.checkpoints import Checkpointer
from worldenv_jax.metrics import Progress, Writers
from worldenv_jax.training.train_state import check_not_diverged

State = TypeVar("State")  # any pytree of arrays; usually a `TrainState`
# (steps done, state) -> metrics to write, or None
Callback = Callable[[int, Any], Mapping[str, Any] | None]


class StopSignal:
    """Inside the block, SIGTERM and Ctrl-C are noted instead of obeyed; a second Ctrl-C interrupts at once.

    On several hosts JAX's preemption service takes SIGTERM, and all hosts agree on the step to stop after.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
        self._handlers = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def received(self, step: int) -> int | None:
        """The signal to stop for after `step`, or None."""
        if jax.process_count() > 1:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
        return self._number

    def _note(self, number: int, _: Any) -> None:
        if self._number == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._number = number
        os.write(2, b"stopping after this step\n")  # print is not safe inside a signal handler


def run_stage(
    name: str,
    state: State,
    train_step: Callable[[State, Any], tuple[State, Mapping[str, Any]]],
    batch_fn: Callable[[int], Any],
    num_steps: int,
    *,
    checkpointer: Checkpointer | None = None,
    writer: Writers | None = None,
    save_every: int = 500,
    log_every: int = 20,
    metadata: Mapping[str, Any] | None = None,
    callbacks: Sequence[tuple[int, Callback]] = (),
    skip_limit: int = 10,
) -> State:
    """Runs steps until `num_steps` are done, counted from the latest checkpoint.

    Args:
        name: shown in the progress line.
        state: the state before the first step. Where a checkpoint exists it gives only shapes and shardings.
        train_step: `(state, batch) -> (state, metrics)`, scalar metrics left on the device; may donate the state.
        batch_fn: step (from 0) -> batch, a pure function of the step.
        num_steps: steps in all.
        checkpointer: where to resume from and to save to; None keeps nothing.
        writer: gets metrics every `log_every` steps and with every save: means since the last row, and the last
            value of integer metrics (counters).
        save_every: steps between checkpoints; the last step is always saved.
        log_every: steps between rows, and between transfers from the device.
        metadata: JSON stored with every checkpoint (statistics, data position).
        callbacks: `(every, callback)`: called after each `every` steps and after the last one, before the save.
        skip_limit: that many skipped steps in a row stop the run.

    Returns:
        The state after `num_steps` steps.

    Raises:
        SystemExit: 143 after SIGTERM, 130 after Ctrl-C, once the step is finished and saved.
        TrainingDiverged: see `skip_limit`.
        CheckpointError: see `Checkpointer`.
    """
    writer = writer or Writers([])
    state, first = _resume(state, checkpointer)
    writer.resume(first)
    progress = Progress(name, num_steps, first)
    pending: list[Mapping[str, Any]] = []
    since, on_cpu = time.monotonic(), jax.default_backend() == "cpu"
    try:
        with StopSignal() as stop:
            for step in range(first + 1, num_steps + 1):
                state, metrics = train_step(state, batch_fn(step - 1))
                # At most two steps are under way: bounded memory, and an honest progress bar. On a CPU one, because
                # programs that overlap on simulated devices can wait for each other forever.
                if pending and not on_cpu:
                    jax.block_until_ready(pending[-1])
                pending.append(jax.block_until_ready(metrics) if on_cpu else metrics)
                progress.update(step)
                last, stopped = step == num_steps, stop.received(step)
                save = last or stopped is not None or step % save_every == 0
                row: dict[str, Any] = {}
                if save or step % log_every == 0:
                    row, rate = _summarise(pending), len(pending) / (time.monotonic() - since)
                    row["steps_per_second"] = rate
                    check_not_diverged(row, skip_limit)
                for every, callback in callbacks:
                    if last or step % every == 0:
                        row |= callback(step, state) or {}
                if row:
                    writer.write(step, row)
                if "steps_per_second" in row:
                    pending, since = [], time.monotonic()
                if save and checkpointer is not None:
                    checkpointer.save(step, state, metadata)
                if stopped is not None:
                    _leave(name, step, num_steps, stopped, checkpointer)
    finally:
        progress.close()
    if checkpointer is not None:
        checkpointer.wait()
    return state


def _resume(state: State, checkpointer: Checkpointer | None) -> tuple[State, int]:
    if checkpointer is None:
        return state, 0
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), state
    )
    restored = checkpointer.restore_latest(abstract)
    return (state, 0) if restored is None else (restored.state, restored.step)


def _summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the rows; integers are counters, of which the last value counts."""
    rows = jax.device_get(list(rows))
    columns = {name: [np.asarray(row[name]) for row in rows if name in row] for row in rows for name in row}
    is_counter = lambda column: np.issubdtype(column[-1].dtype, np.integer)
    return {name: float(c[-1] if is_counter(c) else np.mean(c, dtype=np.float64)) for name, c in columns.items()}


def _leave(name: str, step: int, num_steps: int, number: int, checkpointer: Checkpointer | None) -> None:
    saved = "not saved: it has no checkpoint folder"
    if checkpointer is not None:
        checkpointer.wait()
        saved = "saved; the same command goes on from there"
    if jax.process_index() == 0:
        signal_name = signal.Signals(number).name
        print(f"{name}: {signal_name} after step {step} of {num_steps}, {saved}", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)
