# SPDX-License-Identifier: Apache-2.0
"""Safetensors checkpoints: one file or shards with an index; read and written one tensor at a time."""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from worldenv_jax.weights.errors import WeightsError
from worldenv_jax.weights.name_tables import Tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_DTYPES |= {"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}
_NAMES = {theirs: ours for ours, theirs in _DTYPES.items()}


def open_safetensors(path: Path) -> Tensors:
    """A file, or a folder with `model.safetensors` or with shards and their index; nothing is read yet.

    Raises: WeightsError where the folder has neither, where the index is damaged or names a file that does not exist
        or lies elsewhere, and where a file is damaged.
    """
    files = [path] if path.is_file() else _files(path)
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise WeightsError(f"safetensors files that do not exist: {', '.join(missing)}")
    entries = {}
    for file in files:
        with _refusing_damage(file):
            entries |= {name: (file, *place) for name, place in _places(file).items()}

    def read(name: str) -> np.ndarray:
        file, dtype, shape, offset = entries[name]
        with _refusing_damage(file):
            return np.fromfile(file, dtype, math.prod(shape), offset=offset).reshape(shape)

    return Tensors({name: shape for name, (_, _, shape, _) in entries.items()}, read)


def _places(file: Path) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
    """Name -> (dtype, shape, offset in the file).

    The library checks the file, but reads through a memory map, whose pages would stay resident: the host would come
    to hold the whole checkpoint.
    """
    with safe_open(file, framework="np"):
        pass
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: (jnp.dtype(_NAMES[entry["dtype"]]), tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


@contextlib.contextmanager
def _refusing_damage(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, LookupError) as error:  # the last: unknown dtypes
        raise WeightsError(f"{file} is not a safetensors file that can be read: {error}") from error


def save_safetensors(path: Path, shapes: Mapping[str, tuple], dtypes: Mapping[str, str], tensors: Iterable) -> None:
    """Writes one file, holding one tensor at a time.

    Args:
        shapes, dtypes: of every tensor, in the order of `tensors`.
        tensors: (name, array) pairs in that order.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = offset + int(np.prod(shape, dtype=np.int64)) * jnp.dtype(dtypes[name]).itemsize
        header[name] = {"dtype": _DTYPES[dtypes[name]], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, array in tensors:
            if tuple(array.shape) != tuple(shapes[name]) or array.dtype.name != dtypes[name]:
                raise ValueError(
                    f"{name}: got {array.dtype.name} {array.shape}, announced {dtypes[name]} {shapes[name]}"
                )
            file.write(array.tobytes())


def _files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise WeightsError(f"{folder} has neither {SINGLE} nor {INDEX}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        elsewhere = [name for name in names if Path(name).name != name or "\0" in name]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index} is damaged: {error!r}") from error
    if elsewhere:
        raise WeightsError(f"{index} names files outside of its folder: {', '.join(map(repr, elsewhere))}")
    return [folder / name for name in names]
