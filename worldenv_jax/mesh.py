# SPDX-License-Identifier: Apache-2.0
"""Meshes and shardings: the same program on one device, eight, or a pod.

Axes: `data` splits the batch, `fsdp` splits batch and parameters, `tensor` splits parameters within a layer. All axes
are of the Auto type: arrays carry NamedShardings and the compiler places the collectives.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from worldenv_jax.errors import WorldEnvError

AXES = ("data", "fsdp", "tensor")
# The leading axis of every batch. `fsdp` comes first: XLA 0.10's partitioner groups rows by the axis that the kernel is
# split over and, where that is not the major one, loses the way back, so that gradients of residual layers are wrong
# on meshes with all three axes (tests/devices/test_mesh_devices.py).
BATCH = P(("fsdp", "data"))

# (pattern, axes): the first pattern found in an array's name decides, () replicates. Axes are aligned with the LAST
# axes of the array, so that layers stacked by a scan need no rule of their own.
Rules = Sequence[tuple[str, tuple[str | tuple[str, ...] | None, ...]]]

# Layers into heads or hidden units split their output over `tensor`, those back to the residual stream their input,
# so that a block needs one all-reduce (Megatron-LM, arXiv:1909.08053, section 3). Norms, biases and adapters are small.
DEFAULT_RULES: Rules = (
    (r"(^|/)lora/", ()),
    (r"(^|/)cache/[kv]$", (BATCH[0], None, "tensor", None)),  # [L, B, positions, heads, head_dim]
    (r"embed_tokens$", ("tensor", "fsdp")),
    (r"(^|/)(o_proj|down_proj|fc2|proj|to_out|proj_out|linear_2)/kernel$", ("tensor", "fsdp")),
    (r"kernel$", ("fsdp", "tensor")),
)


def constrain_batch(tree: Any) -> Any:
    """Keeps the leading axis of arrays inside a jitted function split over `fsdp` and `data`, the others whole.

    A gather of rows (a shuffled minibatch, repeated starts) makes the compiler give every device all of them, and
    where a layer's parameters are split it may collect the rows of all devices instead of the parameters; this call
    at the border undoes both. Without a mesh (`with jax.set_mesh(mesh)`) around the call, and on arrays whose rows do
    not divide among the devices, it changes nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if set(AXES) - set(mesh.axis_names):
        return tree
    parts = _parts(mesh, BATCH[0])
    split = lambda leaf: leaf if leaf.shape[0] % parts else jax.lax.with_sharding_constraint(leaf, BATCH)
    return jax.tree.map(split, tree)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one array goes and why."""

    name: str
    shape: tuple[int, ...]
    spec: P
    rule: str | None  # the pattern that took it, if one did
    bytes: int  # in all
    bytes_per_device: int


def make_mesh(data: int = 0, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data`, `fsdp`, `tensor`.

    Args:
        data: devices along the axis; 0 means all that remain.
        fsdp: devices along the axis.
        tensor: devices along the axis.
        devices: the devices to use, all of them by default; on several hosts, all hosts' devices.

    Raises:
        WorldEnvError: the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    data = data or len(devices) // (fsdp * tensor)
    if data * fsdp * tensor != len(devices):
        raise WorldEnvError(
            f"a mesh of data={data} x fsdp={fsdp} x tensor={tensor} needs {data * fsdp * tensor} devices, "
            f"got {len(devices)}: change the axes, or set data=0 to use all that remain"
        )
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def use_every_core() -> None:
    """Makes a device of every core, before the first computation, unless XLA_FLAGS says how many there are.

    XLA:CPU leaves half of a small model's operations on one thread.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jax.config.update("jax_num_cpu_devices", min(8, 1 << (cores.bit_length() - 1)))
        # With as many threads as devices, one that waits for the others' part of a sum can keep them from running.
        os.environ.setdefault("PJRT_NPROC", "16")


def initialize_hosts(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins this process to the others of a run; call it first of all, before any device is touched.

    Without arguments the cluster is read from the environment (TPU pod, SLURM, Open MPI). On CPU the processes talk
    through gloo.

    Args:
        coordinator: `host:port` of process 0.
        processes: how many there are.
        process: the number of this one.

    Raises:
        WorldEnvError: no cluster is found in the environment, or the other processes do not come.
    """
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (ValueError, RuntimeError) as error:
        raise WorldEnvError(
            f"cannot join the other processes of this run: {error} Outside of a TPU pod, SLURM and Open MPI pass "
            "--coordinator=HOST:PORT --processes=N --process=I"
        ) from error


def place(tree: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> list[Placement]:
    """Decides the sharding of every array of a tree, in the tree's order.

    An axis of a rule that does not divide the array's axis is left out. Where an array is part of optimiser state or
    a moving average its name ends like its parameter's, so the same rule takes it.

    Args:
        tree: abstract or real arrays.
        mesh: from `make_mesh`.
        rules: see `Rules`.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [_place_one(jax.tree_util.keystr(path, simple=True, separator="/"), leaf, mesh, rules)
            for path, leaf in leaves]  # fmt: skip


def _place_one(name: str, leaf: Any, mesh: Mesh, rules: Rules) -> Placement:
    axes: list[Any] = [None] * leaf.ndim
    rule, wanted = next(((rule, wanted) for rule, wanted in rules if re.search(rule, name)), (None, ()))
    for axis, mesh_axis in zip(reversed(range(leaf.ndim)), reversed(wanted)):
        if mesh_axis is not None and leaf.shape[axis] % _parts(mesh, mesh_axis) == 0:
            axes[axis] = mesh_axis
    parts = math.prod(_parts(mesh, axis) for axis in axes if axis is not None)
    size = _bytes(leaf)
    return Placement(name, tuple(leaf.shape), P(*axes), rule, size, size // parts)


def _parts(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def _bytes(leaf: Any) -> int:
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def shardings(tree: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """The tree with a NamedSharding at every array: for `jax.jit(out_shardings=...)`, `jax.device_put`, checkpoints."""
    specs = [NamedSharding(mesh, placement.spec) for placement in place(tree, mesh, rules)]
    return jax.tree.unflatten(jax.tree.structure(tree), specs)


def shard_state(tree: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """Puts a state (parameters, optimiser state, averages, caches) on the mesh.

    On several hosts every process holds the whole tree, with the same values.
    """
    return jax.tree.map(_put, tree, shardings(tree, mesh, rules))


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if _is_key(leaf):
        words = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
    rows = np.asarray(leaf)
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def abstract_state(tree: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """The tree as `jax.ShapeDtypeStruct` with shardings: for restoring onto a mesh and for compiling ahead of time."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh, rules),
    )


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays -> global arrays whose leading axis is split over `fsdp` and `data`.

    Args:
        batch: pytree of NumPy arrays [B, ...]; on several hosts each process passes its own rows, see `own_rows`.
        mesh: from `make_mesh`.

    Raises:
        WorldEnvError: the rows do not divide among the devices.
    """
    sharding, parts, own = NamedSharding(mesh, BATCH), _parts(mesh, BATCH[0]), len(_own_parts(mesh))

    def put(rows: Any) -> jax.Array:
        rows = np.asarray(rows)
        total = rows.shape[0] * parts // own
        if rows.shape[0] % own:
            raise WorldEnvError(
                f"a batch of {total} rows cannot be split over {parts} devices (data x fsdp): use a multiple of {parts}"
            )
        return jax.make_array_from_process_local_data(sharding, rows, (total, *rows.shape[1:]))

    return jax.tree.map(put, batch)


def own_rows(batch: Any, mesh: Mesh) -> Any:
    """The rows that this process's devices hold, for `shard_batch`, of a batch that every process has whole.

    Args:
        batch: pytree of NumPy arrays [B, ...].
        mesh: from `make_mesh`.

    Raises:
        WorldEnvError: the rows do not divide among the devices.
    """
    if jax.process_count() == 1:
        return batch
    parts, own = _parts(mesh, BATCH[0]), _own_parts(mesh)

    def cut(rows: Any) -> Any:
        if len(rows) % parts:
            raise WorldEnvError(f"a batch of {len(rows)} rows cannot be split over {parts} devices (data x fsdp)")
        return np.concatenate([np.split(np.asarray(rows), parts)[part] for part in own])

    return jax.tree.map(cut, batch)


def split_rows(batch: Any, mesh: Mesh) -> Any:
    """For results that every process wants whole: rows over the devices of a single host, where they divide.

    On several hosts, and where the rows do not divide among the devices, every process computes all rows itself.
    """
    rows = len(jax.tree.leaves(batch)[0])
    if jax.process_count() > 1 or rows % _parts(mesh, BATCH[0]):
        return batch
    return shard_batch(batch, mesh)


def _own_parts(mesh: Mesh) -> list[int]:
    """Which of the equal parts of a batch lie on this process's devices."""
    indices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((_parts(mesh, BATCH[0]),)).values()
    return sorted({rows.start or 0 for (rows,) in indices})


def report(placements: Sequence[Placement]) -> str:
    """A text table: array, shape, spec, rule, bytes per device; then what is replicated and the sums."""
    width = max((len(p.name) for p in placements), default=4)
    lines = [
        f"{p.name:<{width}}  {list(p.shape)!s:<20} {_show(p.spec):<24} {p.rule or '-':<32} {p.bytes_per_device:>14,}"
        for p in placements
    ]
    whole = [p for p in placements if p.bytes_per_device == p.bytes]
    lines += [
        f"replicated: {len(whole)} of {len(placements)} arrays, {sum(p.bytes for p in whole):,} bytes",
        f"per device: {sum(p.bytes_per_device for p in placements):,} of {sum(p.bytes for p in placements):,} bytes",
    ]
    return "\n".join(lines)


def _show(spec: P) -> str:
    return "(" + ", ".join("+".join(axis) if isinstance(axis, tuple) else axis or "-" for axis in spec) + ")"
