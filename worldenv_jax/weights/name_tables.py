# SPDX-License-Identifier: Apache-2.0
"""The engine under every name table: rows (foreign name, our path, transform) bound to an abstract model.

A row names one foreign tensor, or many through numbered placeholders:

    Row("layers.{i}.mlp.fc1.weight", "params/layers/fc1/kernel", LINEAR)

A placeholder that the path has too selects another parameter; one that only the name has is an index into the
parameter's leading (scan) axes, in the order of the name. `part=(1, 3)` says that the tensor is the second third of
the parameter's last axis (separate queries, keys and values in one fused kernel). Rows that match no parameter of
the model at hand are skipped, so one table serves all variants of a model.

`bind` resolves the rows against shapes; `import_params` and `export_tensors` walk the result, one tensor at a time.
"""

import itertools
import math
import re
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from worldenv_jax.types import Params


class Transform(NamedTuple):
    """A reversible change of layout; both functions take and return one array, and work on NumPy and JAX arrays."""

    to_ours: Callable[[Any], Any]
    to_foreign: Callable[[Any], Any]


IDENTITY = Transform(lambda x: x, lambda x: x)
LINEAR = Transform(lambda x: x.T, lambda x: x.T)  # (out, in) <-> [in, out]
CONV1D = Transform(lambda x: x.transpose(2, 1, 0), lambda x: x.transpose(2, 1, 0))  # (O, I, W) <-> [W, I, O]
CONV2D = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
CONV3D = Transform(lambda x: x.transpose(2, 3, 4, 1, 0), lambda x: x.transpose(4, 3, 0, 1, 2))  # OITHW <-> THWIO


def leading_ones(count: int) -> Transform:
    """(1, ..., 1, *shape) <-> [*shape]: foreign tensors with `count` leading axes of length one."""
    return Transform(lambda x: x.reshape(x.shape[count:]), lambda x: x.reshape((1,) * count + x.shape))


def patch_kernel(patch: int, channels: int = 3) -> Transform:
    """(O, channels, patch, patch) <-> [patch * patch * channels, O]: a patch convolution as a linear layer."""
    return Transform(
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
        lambda x: x.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1),
    )


class Row(NamedTuple):
    """One line of a name table; see the module's docstring."""

    name: str  # foreign, "blocks.{i}.attn.qkv.weight"
    path: str  # ours, "params/dino/blocks/qkv/kernel"
    transform: Transform = IDENTITY
    part: tuple[int, int] = (0, 1)  # (index, count) of equal parts of the parameter's last axis


class Entry(NamedTuple):
    """One foreign tensor and the region of the parameter it fills."""

    path: tuple[str, ...]
    region: tuple[slice, ...]
    stacked: int  # leading axes of the parameter that the tensor lacks
    transform: Transform
    shape: tuple[int, ...]  # of the foreign tensor


class Tensors(NamedTuple):
    """Where foreign tensors are read from."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Tensors":
        """Tensors that are in memory already."""
        return cls({name: tuple(array.shape) for name, array in arrays.items()}, arrays.__getitem__)


def bind(rows: list[Row], abstract: Params) -> dict[str, Entry]:
    """Resolves a table against a model.

    Args:
        rows: the table.
        abstract: nested dict of anything with a shape, as from `jax.eval_shape`.

    Returns: foreign name -> Entry, ordered parameter by parameter.

    Raises: ValueError listing every parameter that the rows leave (partly) unnamed or name twice.
    """
    leaves = {"/".join(path): tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(abstract).items()}
    entries, filled = {}, dict.fromkeys(leaves, 0)
    for row in rows:
        pattern = re.compile(_pattern(row.path))
        for path, shape in leaves.items():
            if match := pattern.fullmatch(path):
                for name, entry in _expand(row, path, shape, match.groupdict()):
                    entries[name] = entry
                    filled[path] += math.prod(part.stop - part.start for part in entry.region)
    sizes = {path: math.prod(shape) for path, shape in leaves.items()}
    wrong = [f"{path}: {filled[path]} of {sizes[path]} elements" for path in leaves if filled[path] != sizes[path]]
    if wrong:
        raise ValueError("the name table does not cover the model exactly once:\n  " + "\n  ".join(wrong))
    order = {tuple(path.split("/")): position for position, path in enumerate(leaves)}
    return dict(sorted(entries.items(), key=lambda item: order[item[1].path]))


def name_differences(expected: Mapping[str, tuple], found: Mapping[str, tuple]) -> list[str]:
    """One line for every foreign name that is missing, unexpected or misshapen; both map names to shapes."""
    lines = [f"missing     {name} {tuple(expected[name])}" for name in sorted(set(expected) - set(found))]
    lines += [f"unexpected  {name} {tuple(found[name])}" for name in sorted(set(found) - set(expected))]
    return lines + [
        f"misshapen   {name}: got {tuple(found[name])}, expected {tuple(expected[name])}"
        for name in sorted(set(expected) & set(found))
        if tuple(found[name]) != tuple(expected[name])
    ]


def check_names(expected: Mapping[str, tuple], found: Mapping[str, tuple], source: str) -> None:
    """Compares foreign names and shapes.

    Raises: ValueError with all `name_differences` at once.
    """
    if lines := name_differences(expected, found):
        raise ValueError(f"{source} does not fit the configured model ({len(lines)} names):\n  " + "\n  ".join(lines))


def import_params(
    rows: list[Row],
    abstract: Params,
    tensors: Tensors,
    source: str,
    shardings: Params | None = None,
    dtype: str | None = None,
) -> Params:
    """Reads a model, one foreign tensor at a time, straight into its place on the devices.

    Args:
        rows: the name table.
        abstract: the parameters' nested dict of shapes.
        tensors: where to read.
        source: what to call it in errors.
        shardings: nested dict of `jax.sharding.Sharding` like `abstract`; None: the default device.
        dtype: of the parameters; None: as stored.

    Returns: nested dict of jax.Array. The host holds one foreign tensor and this host's shards of one parameter.

    Raises: ValueError listing every name and shape that does not fit.
    """
    entries = bind(rows, abstract)
    check_names({name: entry.shape for name, entry in entries.items()}, tensors.shapes, source)
    shapes = traverse_util.flatten_dict(abstract)
    placements = traverse_util.flatten_dict(shardings) if shardings is not None else {}
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    loaded = {}
    for path, group in itertools.groupby(entries.items(), key=lambda item: item[1].path):
        sharding = placements.get(path, default)
        loaded[path] = _load_parameter(list(group), tuple(shapes[path].shape), sharding, tensors.read, dtype)
    return traverse_util.unflatten_dict(loaded)


def export_tensors(rows: list[Row], params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (foreign name, contiguous array) for every tensor; the host holds one parameter at a time."""
    flat = traverse_util.flatten_dict(params)
    for path, group in itertools.groupby(bind(rows, params).items(), key=lambda item: item[1].path):
        parameter = np.asarray(flat[path])
        for name, entry in group:
            ours = parameter[entry.region]
            ours = ours.reshape(ours.shape[entry.stacked :])
            yield name, np.asarray(entry.transform.to_foreign(ours), order="C")


def _pattern(template: str) -> str:
    """`a/{i}/b` as a regular expression in which the placeholder is a named number."""
    return "".join(
        re.escape(text) + (rf"(?P<{field}>\d+)" if field else "")
        for text, field, _, _ in string.Formatter().parse(template)
    )


def _expand(row: Row, path: str, shape: tuple[int, ...], numbers: dict[str, str]) -> Iterator[tuple[str, Entry]]:
    """All entries of a row for one parameter: one per index of its stacked axes."""
    fields = [field for _, field, _, _ in string.Formatter().parse(row.name) if field]
    stacked = [field for field in fields if field not in numbers]
    index, count = row.part
    inner = list(shape[len(stacked) :])
    region = [slice(0, length) for length in inner]
    if count > 1:
        inner[-1] //= count
        region[-1] = slice(index * inner[-1], (index + 1) * inner[-1])
    probe = jax.eval_shape(row.transform.to_foreign, jax.ShapeDtypeStruct(inner, np.float32))
    for position in itertools.product(*(range(length) for length in shape[: len(stacked)])):
        name = row.name.format(**numbers, **dict(zip(stacked, position)))
        leading = [slice(i, i + 1) for i in position]
        where = (*leading, *region)
        yield name, Entry(tuple(path.split("/")), where, len(stacked), row.transform, tuple(probe.shape))


def _load_parameter(
    entries: list[tuple[str, Entry]],
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    read: Callable[[str], np.ndarray],
    dtype: str | None,
) -> jax.Array:
    """Fills this host's distinct shards of one parameter, reading every foreign tensor once."""
    devices = {
        device: tuple(slice(*part.indices(length)[:2]) for part, length in zip(index, shape))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    shards: dict[tuple, np.ndarray] = {}
    for name, entry in entries:
        tensor = entry.transform.to_ours(read(name))
        tensor = tensor.reshape((1,) * entry.stacked + tensor.shape)
        for index in {_key(index): index for index in devices.values()}.values():
            if _key(index) not in shards:
                extent = [part.stop - part.start for part in index]
                shards[_key(index)] = np.empty(extent, dtype or tensor.dtype)
            _copy_overlap(shards[_key(index)], index, tensor, entry.region)
    arrays = [jax.device_put(shards[_key(index)], device) for device, index in devices.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _key(index: tuple[slice, ...]) -> tuple:
    return tuple((part.start, part.stop) for part in index)


def _copy_overlap(target: np.ndarray, target_index: tuple, source: np.ndarray, source_index: tuple) -> None:
    """Copies the part of `source` that lies in `target`; both know their place in the whole parameter."""
    bounds = [
        (max(t.start, s.start), min(t.stop, s.stop), t.start, s.start) for t, s in zip(target_index, source_index)
    ]
    if all(low < high for low, high, _, _ in bounds):
        into = tuple(slice(low - t, high - t) for low, high, t, _ in bounds)
        out_of = tuple(slice(low - s, high - s) for low, high, _, s in bounds)
        target[into] = source[out_of]
