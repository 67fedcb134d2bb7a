# SPDX-License-Identifier: Apache-2.0
"""Where numbers go: console, JSON lines, TensorBoard, Weights & Biases; and the progress line. Host 0 only.

Writers survive a restart: rows of steps that the resumed run will do again are removed first.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import jax
import numpy as np
from tqdm import tqdm

from worldenv_jax import files
from worldenv_jax.errors import WorldEnvError

SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal


class Writer(Protocol):
    """A sink for scalar metrics. A resumed run calls `resume` before it writes the steps that follow."""

    def resume(self, step: int) -> None:
        """Drops what was written for steps after `step`; -1: all, that of the state before the first step, 0, too."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of one step (finite or not)."""

    def close(self) -> None:
        """Flushes and frees."""


class ConsoleWriter:
    """One line per `write`, above the progress bar."""

    def __init__(self, name: str):
        self._name = name

    def resume(self, step: int) -> None:
        if step > 0:
            tqdm.write(f"{self._name}: resumed at step {step}")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        shown = "  ".join(f"{key} {_short(value)}" for key, value in metrics.items())
        tqdm.write(f"{self._name} {step}: {shown}")

    def close(self) -> None:
        sys.stdout.flush()


class JsonLinesWriter:
    """One JSON object per line, `{"step": 10, "time": …, "loss": …}`; values that are not finite become null."""

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._file: TextIO | None = None

    def resume(self, step: int) -> None:
        self.close()
        kept = [row for row in read_json_lines(self._path) if row["step"] <= step]
        files.write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        row = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        with files.disk_errors(self._path):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a", encoding="utf-8")
            self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **row}) + "\n")
            self._file.flush()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with files.disk_errors(self._path):
                file.close()


class TensorBoardWriter:
    """Scalars as TensorBoard events.

    Written here and not by tensorboardX's `SummaryWriter`, whose thread dies with a traceback where the disk is full.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        self._events: Any = None

    def resume(self, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        restart = SessionLog(status=SessionLog.START)  # of these steps earlier events are not shown
        self._write([Event(wall_time=time.time(), step=step + 1, session_log=restart)])

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        now = time.time()
        self._write(Event(wall_time=now, step=step, summary=scalar(key, value)) for key, value in metrics.items())

    def close(self) -> None:
        events, self._events = self._events, None
        if events is not None:
            with files.disk_errors(self._folder):
                events.close()

    def _write(self, events: Iterable[Any]) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        with files.disk_errors(self._folder):
            if self._events is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._events = EventsWriter(str(self._folder / "events"))
            for event in events:
                self._events.write_event(event)
            self._events.flush()


class WandbWriter:
    """Weights & Biases, from the extra `wandb`; `run_id` makes a restarted run go on in the same place."""

    def __init__(self, project: str, run_id: str, config: Mapping[str, Any] | None = None):
        import wandb

        self._run = wandb.init(project=project, id=run_id, resume="allow", config=dict(config or {}))

    def resume(self, step: int) -> None:
        pass  # the service ignores rows of steps that it already has

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class Writers:
    """Several writers as one; values may be Python numbers or arrays of one element."""

    def __init__(self, writers: Sequence[Writer]):
        self._writers = tuple(writers)

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.close()
        except WorldEnvError:
            if kind is None:  # else the error under way is the one to show
                raise

    def resume(self, step: int) -> None:
        for writer in self._writers:
            writer.resume(step)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = {key: float(np.asarray(value).item()) for key, value in metrics.items()}
        for writer in self._writers:
            writer.write(step, numbers)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # all are closed, also where one cannot be
            for writer in self._writers:
                stack.callback(writer.close)


def make_writer(folder: str | Path, name: str, *, wandb_project: str | None = None) -> Writers:
    """Console, `<folder>/<name>.jsonl` and `<folder>/tensorboard/<name>`; nothing at all on other hosts than 0."""
    if jax.process_index() != 0:
        return Writers([])
    folder = Path(folder)
    writers = [
        ConsoleWriter(name),
        JsonLinesWriter(folder / f"{name}.jsonl"),
        TensorBoardWriter(folder / "tensorboard" / name),
    ]
    if wandb_project:
        writers.append(WandbWriter(wandb_project, f"{folder.resolve().name}-{name}"))
    return Writers(writers)


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, without a last line that a killed process left unfinished; [] if missing."""
    path = Path(path)
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class Progress:
    """A progress bar with rate and time left; without a terminal, one line at the start and every ten seconds."""

    def __init__(self, name: str, total: int, start: int = 0, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._name, self._total, self._first = name, total, start
        self._quiet = jax.process_index() != 0
        self._terminal = self._stream.isatty()
        self._began = self._printed = time.monotonic()
        hidden = self._quiet or not self._terminal
        self._bar = tqdm(desc=name, total=total, initial=start, disable=hidden, file=self._stream)
        self._print(start)

    def update(self, step: int) -> None:
        """Moves to `step` steps done."""
        self._bar.update(step - self._bar.n)
        if step >= self._total or time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._print(step)

    def close(self) -> None:
        self._bar.close()

    def _print(self, step: int) -> None:
        if self._quiet or self._terminal:
            return
        self._printed = time.monotonic()
        rate = (step - self._first) / max(self._printed - self._began, 1e-9)
        left = f", {rate:.3g} steps/s, {(self._total - step) / rate:.0f} s left" if step > self._first else ""
        print(f"{self._name}: step {step} of {self._total}{left}", file=self._stream, flush=True)


def _short(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.4g}"
