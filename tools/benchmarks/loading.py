# SPDX-License-Identifier: Apache-2.0
"""Host memory and time of loading an OpenVLA-OFT checkpoint of random numbers."""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.configs import ExperimentConfig
from worldenv_jax.policy import PolicyConfig
from worldenv_jax.weights import openvla_oft as tables
from worldenv_jax.weights.openvla_folder import load_policy, save_policy

SHARDS = 4


def benchmark_load(config: ExperimentConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Writes a checkpoint in `--dtype`, then loads it in a process of its own, and reports that one's memory.

    On a CPU the parameters themselves lie in the host's memory: `excess_bytes` is the peak without them, and
    `excess_over_largest_shard` divides it by the largest file.
    """
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        _write(folder, config.policy, options.dtype)
        largest = max(path.stat().st_size for path in folder.glob("*.safetensors"))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            loaded = pool.apply(_load, (folder, config.policy))
    on_host = loaded["params_bytes"] if jax.default_backend() == "cpu" else 0
    excess = loaded["peak_bytes"] - loaded["before_bytes"] - on_host
    return {
        "figure": "gb_per_second",
        "gb_per_second": 1e-9 * loaded["params_bytes"] / loaded["seconds"],
        **loaded,
        "largest_shard_bytes": largest,
        "excess_bytes": excess,
        "excess_over_largest_shard": excess / largest,
        "shapes": {"shards": SHARDS, "params": loaded["params"]},
    }


def _write(folder: Path, config: PolicyConfig, dtype: str) -> None:
    """Zeros are as good as anything: nothing is compressed."""
    abstract = tables.abstract_policy(config)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jnp.dtype(dtype)), abstract)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    save_policy(folder, config, params, {}, shard_bytes=total // SHARDS)


def _load(folder: Path, config: PolicyConfig) -> dict[str, Any]:
    """Loads in a fresh process."""
    jnp.zeros(1).block_until_ready()  # the backend's own memory is there before
    before = _memory("VmRSS")
    began = time.perf_counter()
    params = jax.block_until_ready(load_policy(folder, config))
    seconds = time.perf_counter() - began
    leaves = jax.tree.leaves(params)
    return {
        "seconds": seconds,
        "params": sum(leaf.size for leaf in leaves),
        "params_bytes": sum(leaf.nbytes for leaf in leaves),
        "before_bytes": before,
        "peak_bytes": _memory("VmHWM"),
    }


def _memory(field: str) -> int:
    """Resident bytes of this process, now (VmRSS) or at most so far (VmHWM); mapped pages of files count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
