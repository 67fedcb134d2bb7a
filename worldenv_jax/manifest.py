# SPDX-License-Identifier: Apache-2.0
"""`manifest.json` of a workdir: what has to be the same for a run to give the same result."""

import datetime
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from worldenv_jax import files

_PACKAGES = ("worldenv-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def write_manifest(
    workdir: str | Path,
    config: Mapping[str, Any],
    *,
    seed: int,
    dataset_fingerprint: str | None = None,
    protocol_hash: str | None = None,
) -> dict[str, Any]:
    """Writes `<workdir>/manifest.json` atomically and returns it; a restart adds to `starts`.

    Args:
        workdir: the run's folder; made if missing.
        config: JSON dict of the whole experiment.
        seed: the run's seed.
        dataset_fingerprint: hash of the episodes that the run reads.
        protocol_hash: hash of the evaluation protocol.

    Raises:
        WorldEnvError: the file cannot be written, or the one there is not JSON.
    """
    path = Path(workdir) / "manifest.json"
    starts = files.read_json(path)["starts"] if path.is_file() else []
    manifest = {
        "config": dict(config),
        "seed": seed,
        "dataset_fingerprint": dataset_fingerprint,
        "protocol_hash": protocol_hash,
        "starts": [*starts, _environment()],
    }
    if jax.process_index() == 0:
        files.write_json(path, manifest)
    return manifest


def _environment() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "git_commit": git_commit(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "processes": jax.process_count(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the checkout that the package runs from, with `+changes` where it differs; None outside git."""
    folder = Path(__file__).resolve().parent
    try:
        run = lambda *args: subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        commit = run("rev-parse", "HEAD")
        return commit + "+changes" if run("status", "--porcelain", "--untracked-files=no", ".") else commit
    except (OSError, subprocess.SubprocessError):
        return None
