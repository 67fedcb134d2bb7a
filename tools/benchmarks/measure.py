# SPDX-License-Identifier: Apache-2.0
"""What every benchmark needs: compiled programs, times, the machine's own rates, random inputs."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tools.flops import count_flops
from worldenv_jax import mesh as meshes
from worldenv_jax.configs import ExperimentConfig
from worldenv_jax.types import Camera, Starts, Statistics, Text

STATISTICS = Statistics(
    -np.ones(7, np.float32), np.ones(7, np.float32), -np.ones(8, np.float32), np.ones(8, np.float32)
)


class Program(NamedTuple):
    """A compiled function with its arguments."""

    call: Callable
    arguments: tuple[Any, ...]
    compile_seconds: float
    flops: int
    peak_bytes: int


def compile_program(function: Callable, state: Any, *batches: Any) -> Program:
    """Lowers and compiles for concrete arguments on the mesh: `state` by its rules, the rows of `batches` split."""
    mesh = jax.sharding.get_mesh()
    arguments = (meshes.shard_state(state, mesh), *jax.tree.map(lambda leaf: split(leaf, mesh), batches))
    flops = count_flops(function, *arguments)
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return Program(compiled, arguments, seconds, flops, peak - memory.alias_size_in_bytes)


def split(leaf: Any, mesh: jax.sharding.Mesh) -> jax.Array:
    """The array with its leading axis over the devices, where that divides."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = jnp.ndim(leaf) > 0 and leaf.shape[0] % parts == 0
    return jax.device_put(leaf, NamedSharding(mesh, meshes.BATCH if rows else PartitionSpec()))


def median_seconds(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median wall-clock seconds of each call; the calls take turns, so that a disturbance meets all of them."""
    for call in calls:
        jax.block_until_ready(call())
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, taken in zip(calls, seconds):
            began = time.perf_counter()
            jax.block_until_ready(call())
            taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in seconds]


def measure_machine(repeats: int, dtype: str = "float32") -> dict[str, float]:
    """Rates that the mesh's devices reach together: square matmul in `dtype`, reading plus writing 256 MiB."""
    mesh, size = jax.sharding.get_mesh(), 2048 if jax.default_backend() == "cpu" else 8192
    square = jnp.ones((size, size), dtype)
    rows, square = split(square, mesh), jax.device_put(square, NamedSharding(mesh, PartitionSpec()))
    long = split(jnp.ones(2**26, jnp.float32), mesh)
    multiply = jax.jit(jnp.matmul)
    add = jax.jit(lambda x: x + 1.0, donate_argnums=0)  # in place: fresh memory would measure page faults

    def rewrite() -> jax.Array:
        nonlocal long
        long = add(long)
        return long

    matmul, copy = median_seconds([lambda: multiply(rows, square), rewrite], repeats)
    return {
        "matmul_dtype": dtype,
        "matmul_gflops": 2e-9 * size**3 / matmul,
        "bandwidth_gb_per_s": 2e-9 * long.nbytes / copy,
    }


def figures(program: Program, seconds: float, machine: dict[str, float]) -> dict[str, Any]:
    """Time, operations, utilisation and memory of one program."""
    rate = 1e-9 * program.flops / seconds
    return {
        "seconds": seconds,
        "compile_seconds": program.compile_seconds,
        "flops": program.flops,
        "gflops": rate,
        "utilisation": rate / machine["matmul_gflops"],
        "peak_bytes": program.peak_bytes,
    }


def make_starts(config: ExperimentConfig, count: int) -> Starts:
    """Starts with random pictures: first frames, empty prompts, a camera one metre in front of the origin."""
    rng = np.random.default_rng(0)
    views, (height, width) = config.simulator.views, config.simulator.image_size
    text = lambda length: Text(np.ones((count, length), np.int32), np.ones((count, length), bool))
    lens = np.array([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1]], np.float32)
    pose = np.eye(4, dtype=np.float32)
    pose[2, 3] = -1.0
    return Starts(
        images=rng.integers(0, 256, (count, views, height, width, 3), np.uint8),
        proprio=np.zeros((count, 8), np.float32),
        policy_text=text(config.policy.text_length),
        reflector_text=text(config.reflector.text_length),
        camera=Camera(np.tile(lens, (count, views, 1, 1)), np.tile(pose, (count, views, 1, 1))),
        task=np.zeros(count, np.int32),
        photographs=rng.integers(0, 256, (count, *config.simulator.photographs_shape), np.uint8),
    )


def random_params(init: Callable, config: Any, dtype: str) -> Any:
    """Random parameters in the given type, made on the device in one program."""
    cast = lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    return jax.jit(lambda key: jax.tree.map(cast, init(config, key)))(jax.random.key(0))
