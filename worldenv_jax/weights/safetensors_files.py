# SPDX-License-Identifier: Apache-2.0
"""Safetensors checkpoints: one file or shards with an index; read and written one tensor at a time."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from worldenv_jax.weights.name_tables import Tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_DTYPES |= {"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}


def open_safetensors(path: Path) -> Tensors:
    """A file, or a folder with `model.safetensors` or with shards and their index; nothing is read yet.

    Raises: ValueError where the folder has neither, or the index names a file or tensor that does not exist.
    """
    files = [path] if path.is_file() else _files(path)
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"safetensors files that do not exist: {', '.join(missing)}")
    handles = [safe_open(file, framework="np") for file in files]
    owner = {name: handle for handle in handles for name in handle.offset_keys()}
    shapes = {name: tuple(handle.get_slice(name).get_shape()) for name, handle in owner.items()}
    return Tensors(shapes, lambda name: owner[name].get_tensor(name))


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
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}")
    return [folder / name for name in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))]
