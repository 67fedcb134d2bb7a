# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all: written beside their place, flushed to disk, then renamed."""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from worldenv_jax.errors import WorldEnvError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turns an `OSError` inside the block into a one-line `WorldEnvError` that names `path` and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            hint = "no space left on the device; free some and run the same command again"
        else:
            hint = error.strerror or str(error)
        raise WorldEnvError(f"cannot write {path}: {hint}") from error


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path with the same suffix beside `path`; it becomes `path` when the block ends well.

    After an exception the temporary file is removed and `path` is as it was. Missing parent folders are made.

    Raises:
        WorldEnvError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _flush(temporary)
            temporary.replace(path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a new temporary folder beside `path`, which must not exist; it becomes `path` when the block ends well.

    After an exception it is removed. Missing parent folders are made. The files in it are for the caller to flush.

    Raises:
        WorldEnvError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            _flush(temporary)
            temporary.rename(path)
            _flush(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, atomically; numbers that are not finite become null, which JSON has."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file.

    Raises:
        WorldEnvError: the file is missing, or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WorldEnvError(f"cannot read {path}: {error}") from error
