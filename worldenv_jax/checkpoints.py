# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: a state pytree with its config, statistics and data position beside it, on Orbax.

Layout of a checkpoint folder (everything appears atomically, by a rename)::

    last/<step>/state       arrays, readable on any mesh
    last/<step>/metadata    JSON: config, and whatever the stage passes (statistics, data position)
    last/<step>/checksums.json
    best/<step>/            the same; metadata also has `score`
    last/corrupt-<step>/    a step that could not be read and was put aside

Orbax finds files that are missing or cut short, but restores a flipped byte in the array data without a word; the
checksums (CRC-32 of every file, written before the rename) find that too.
"""

import contextlib
import json
import logging
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jax.experimental import multihost_utils

from worldenv_jax.errors import WorldEnvError
from worldenv_jax.overrides import diff_configs

_CHECKSUMS = "checksums.json"
_FULL_DISK = ("No space left", "RESOURCE_EXHAUSTED", "File too large", "quota exceeded")


class CheckpointError(WorldEnvError):
    """A checkpoint that cannot be written, read, or used with the present config."""


class Restored(NamedTuple):
    """What `restore_latest` and `restore_best` return."""

    step: int
    state: Any
    metadata: dict[str, Any]


def _is_not_raised_too(record: logging.LogRecord) -> bool:
    """False for the tracebacks that Orbax and its event loop log of a full disk, which is then raised, too."""
    error = record.exc_info and str(record.exc_info[1])
    return not (error and any(words in error for words in _FULL_DISK))


class Checkpointer:
    """Saves and restores the state of one run.

    Args:
        folder: the run's checkpoint folder; made if missing, may be shared by all hosts.
        config: JSON dict stored with every step; a step with another config is refused when restoring. Leave out
            the keys that may change between starts (number of steps, paths).
        keep: number of last steps kept (the best one is kept apart).
        asynchronous: True returns from `save` once the arrays are on the host, and writes in the background.

    On several hosts every process calls every method.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Mapping[str, Any] | None = None,
        *,
        keep: int = 2,
        asynchronous: bool = True,
    ):
        self.folder = Path(folder).resolve()
        self._config = dict(config or {})
        self._asynchronous = asynchronous
        for logger in ("absl", "asyncio"):
            logging.getLogger(logger).addFilter(_is_not_raised_too)
        self._last = _manager(self.folder / "last", keep)
        self._best = _manager(self.folder / "best", 1)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(Exception):  # the error under way is the one to show
            self.close()

    @property
    def latest_step(self) -> int | None:
        """The last step on disk, readable or not."""
        return self._last.latest_step()

    @property
    def best_score(self) -> float | None:
        """The score of the step in the best slot."""
        self.wait()
        step = self._best.latest_step()
        return None if step is None else _read_metadata(self.folder / "best" / str(step))["score"]

    def save(self, step: int, state: Any, metadata: Mapping[str, Any] | None = None) -> None:
        """Writes `state` (any pytree of arrays and PRNG keys, the same on every call) as `step`.

        Raises:
            CheckpointError: the disk is full; earlier steps are untouched and nothing of this one remains. An
                asynchronous save raises at the next `save`, `wait` or `close`.
        """
        self._save(self._last, step, state, metadata or {})

    def save_best(self, step: int, state: Any, score: float, metadata: Mapping[str, Any] | None = None) -> bool:
        """Puts `state` into the best slot if `score` (higher is better) beats the score there; returns whether."""
        best = self.best_score
        if best is not None and score <= best:
            return False
        for later in [s for s in self._best.all_steps() if s >= step]:  # Orbax keeps the highest step, not the newest
            self._best.delete(later)
        self._save(self._best, step, state, {**(metadata or {}), "score": float(score)})
        return True

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """Reads the last readable step, or returns None when there is none at all.

        A corrupt or truncated step is put aside with a warning and the one before it is used.

        Args:
            abstract_state: pytree of `jax.ShapeDtypeStruct` or arrays; where a leaf has a sharding the array is
                restored with it, whatever mesh it was saved from.

        Raises:
            CheckpointError: no step is readable; or the step has another config, structure, shape or dtype (the
                message names the differing keys).
        """
        return self._restore(self._last, abstract_state)

    def restore_best(self, abstract_state: Any) -> Restored | None:
        """As `restore_latest`, from the best slot."""
        return self._restore(self._best, abstract_state)

    def wait(self) -> None:
        """Blocks until every save is on disk; raises what a save in the background met."""
        for manager in (self._last, self._best):
            with _save_errors(manager):
                manager.wait_until_finished()

    def close(self) -> None:
        """Waits for every save and frees the threads."""
        self.wait()
        self._last.close()
        self._best.close()

    def _save(self, manager: ocp.CheckpointManager, step: int, state: Any, metadata: Mapping[str, Any]) -> None:
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            metadata=ocp.args.JsonSave({**metadata, "config": self._config}),
        )
        with _save_errors(manager):
            manager.save(step, args=items, force=True)
        if not self._asynchronous:
            self.wait()

    def _restore(self, manager: ocp.CheckpointManager, abstract_state: Any) -> Restored | None:
        self.wait()
        unreadable = {}
        for step in sorted(manager.all_steps(), reverse=True):
            folder = Path(manager.directory) / str(step)
            try:
                _verify_checksums(folder)
                metadata = _read_metadata(folder)
                self._check_config(folder, metadata)
                _check_structure(folder, _stored_arrays(folder), _by_path(abstract_state))
                arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
                state = manager.restore(step, args=arguments)["state"]
            except CheckpointError:
                raise
            except Exception as error:  # Orbax and TensorStore report damage with many types
                unreadable[step] = _first_line(error)
                continue
            _put_aside(manager, unreadable, step)
            return Restored(step, state, metadata)
        if unreadable:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in unreadable.items())
            raise CheckpointError(f"no readable checkpoint in {manager.directory} ({reasons}); delete it to start anew")
        return None

    def _check_config(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        current = json.loads(json.dumps(self._config))
        differences = diff_configs(metadata["config"], current)
        if differences:
            raise CheckpointError(
                f"the checkpoint {folder} was made with another config: "
                f"{'; '.join(differences)}. Use that config or another workdir."
            )


def load_params(folder: str | Path, abstract_params: Any = None, *, best: bool = True) -> tuple[Any, dict[str, Any]]:
    """Reads only the parameters of a run (moving averages where the run kept them), and the metadata.

    Args:
        folder: a checkpoint folder; the best slot is read first, then the last steps.
        abstract_params: the wanted tree of `jax.ShapeDtypeStruct` (dtype and sharding are applied); None gives
            NumPy arrays as they were saved.
        best: False reads the last step instead.

    Raises:
        CheckpointError: there is no readable checkpoint, or it holds another structure or other shapes.
    """
    reasons = []
    for slot in ("best", "last") if best else ("last",):
        for step in sorted(_steps(Path(folder).resolve() / slot), reverse=True):
            try:
                _verify_checksums(step.path)
                return _read_params(step.path, abstract_params), _read_metadata(step.path)
            except CheckpointError:
                raise
            except Exception as error:  # Orbax and TensorStore report damage with many types
                reasons.append(f"{slot}/{step.number}: {_first_line(error)}")
                absl_logging.warning("checkpoint %s is unreadable: %s", folder, reasons[-1])
    raise CheckpointError(f"no readable checkpoint in {folder}" + (f" ({'; '.join(reasons)})" if reasons else ""))


class _Step(NamedTuple):
    number: int
    path: Path


def _steps(folder: Path) -> list[_Step]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return [_Step(int(path.name), path) for path in paths if path.name.isdigit()]


def _manager(folder: Path, keep: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=lambda: _write_checksums(folder)),
    )
    return ocp.CheckpointManager(folder, options=options)


def _write_checksums(folder: Path) -> None:
    """Called by Orbax when all files of a step are written and its folder is not yet renamed."""
    if jax.process_index() != 0:
        return
    for step in folder.glob("*.orbax-checkpoint-tmp*"):
        sums = {str(path.relative_to(step)): _crc32(path) for path in _data_files(step)}
        (step / _CHECKSUMS).write_text(json.dumps(sums))


def _data_files(step: Path) -> list[Path]:
    # Orbax writes the other files around the commit; they hold nothing that a restore needs.
    return sorted(path for item in ("state", "metadata") for path in (step / item).rglob("*")
                  if path.is_file() and path.name != "commit_success.txt")  # fmt: skip


def _verify_checksums(step: Path) -> None:
    """Raises ValueError on every host when process 0 finds a file that is not as it was written."""
    bad = _first_damaged(step) if jax.process_index() == 0 else ""
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.int32(bool(bad))):
        bad = bad or "a file"
    if bad:
        raise ValueError(f"{bad} is damaged")


def _first_damaged(step: Path) -> str:
    try:
        sums = json.loads((step / _CHECKSUMS).read_text())
        return next((name for name, crc in sums.items() if _crc32(step / name) != crc), "")
    except (OSError, ValueError, AttributeError) as error:
        return str(error)


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def _put_aside(manager: ocp.CheckpointManager, unreadable: Mapping[int, str], used: int) -> None:
    for step, reason in unreadable.items():
        absl_logging.warning(
            "checkpoint %s/%d is unreadable (%s): using step %d", manager.directory, step, reason, used
        )
        source = Path(manager.directory) / str(step)
        if jax.process_index() == 0:
            aside = source.with_name(f"corrupt-{step}")
            shutil.rmtree(aside, ignore_errors=True)
            source.rename(aside)
    if unreadable:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("corrupt checkpoints put aside")
        manager.reload()


@contextlib.contextmanager
def _save_errors(manager: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not any(phrase in str(error) for phrase in _FULL_DISK):
            raise
        for half_written in Path(manager.directory).glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(half_written, ignore_errors=True)
        raise CheckpointError(
            f"cannot write a checkpoint to {manager.directory}: no space left on the device; "
            "free some and run the same command again to resume from the step before"
        ) from error


def _read_metadata(step: Path) -> dict[str, Any]:
    return json.loads((step / "metadata" / "metadata").read_text(encoding="utf-8"))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _stored_arrays(step: Path) -> dict[tuple[str, ...], Any]:
    """Path -> array metadata (shape, dtype) of everything in a step."""
    return _by_path(ocp.PyTreeCheckpointHandler().metadata(step / "state").tree)


def _by_path(tree: Any) -> dict[tuple[str, ...], Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in leaves}


def _as_stored(leaf: Any) -> Any:
    """PRNG keys are stored as their uint32 words."""
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf


def _check_structure(step: Path, stored: Mapping, wanted: Mapping, dtypes: bool = True) -> None:
    found = [(name, "is not in the checkpoint") for name in wanted if name not in stored]
    found += [(name, "is only in the checkpoint") for name in stored if name not in wanted]
    for name in wanted.keys() & stored.keys():
        old, new = stored[name], _as_stored(wanted[name])
        if tuple(old.shape) != tuple(new.shape) or (dtypes and old.dtype != new.dtype):
            found.append((name, f"is {old.dtype}{list(old.shape)}, now {new.dtype}{list(new.shape)}"))
    if found:
        lines = [f"{'.'.join(name)} {what}" for name, what in sorted(found)]
        more = f" and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise CheckpointError(f"the checkpoint {step} holds another state: {'; '.join(lines[:8])}{more}")


def _read_params(step: Path, abstract_params: Any) -> Any:
    stored = _stored_arrays(step)
    params = {path[1:]: leaf for path, leaf in stored.items() if path[0] == "params"}
    if abstract_params is None:
        wanted = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in params.items()}
    else:
        wanted = _by_path(abstract_params)
        _check_structure(step, params, wanted, dtypes=False)
    sources = {path: (("ema" if ("ema", *path) in stored else "params"), *path) for path in wanted}
    item = _nested({source: wanted[path] for path, source in sources.items()})
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    arguments = ocp.args.PyTreeRestore(item, jax.tree.map(_restore_args, item), partial_restore=True)
    arrays = _by_path(reader.restore(step / "state", args=arguments))
    if abstract_params is None:
        return _nested({path: arrays[source] for path, source in sources.items()})
    leaves = [arrays[sources[path]] for path in wanted]
    return jax.tree.unflatten(jax.tree.structure(abstract_params), leaves)


def _restore_args(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=leaf.sharding, global_shape=leaf.shape)


def _nested(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*folders, last), leaf in flat.items():
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree
