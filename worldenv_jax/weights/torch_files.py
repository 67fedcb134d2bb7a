# SPDX-License-Identifier: Apache-2.0
"""PyTorch `.pt` files without PyTorch: a reader that executes nothing, and a writer.

A `.pt` file is a zip archive with a pickle (`data.pkl`) that refers to raw storages (`data/0`, ...). The reader's
unpickler knows tensors, dictionaries and plain values, and refuses every other global, so that a hostile file can
name no function to call. Source: torch/serialization.py (zip format, little endian).
"""

import collections
import io
import itertools
import math
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from worldenv_jax.weights.errors import WeightsError

_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class _Storage(NamedTuple):
    """Stands in for a torch storage class: only its dtype matters."""

    dtype: str


def load_torch_file(path: Path) -> Any:
    """Reads a `.pt` / `.pth` file: nested dictionaries with NumPy arrays where PyTorch had tensors.

    Raises: WeightsError where the file is no zip archive of PyTorch, or needs anything but tensors and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise WeightsError("it has compressed parts, which PyTorch does not write")  # and may hide gigabytes
            names = {name.split("/", 1)[-1]: name for name in archive.namelist()}
            return _Unpickler(archive, names).load()
    except Exception as error:  # a damaged pickle may raise almost anything, see the documentation of `pickle`
        raise WeightsError(f"{path} is not a PyTorch file of tensors and plain values: {error}") from error


def save_torch_file(path: Path, tensors: Mapping[str, Any]) -> None:
    """Writes arrays by name, dicts of them inside dicts, so that `torch.load(path, weights_only=True)` reads them."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickle_state_dict(tensors))
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(_arrays(tensors)):
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", "3\n")


class _Unpickler(pickle.Unpickler):
    """Resolves three globals and the storage classes; raises on any other."""

    def __init__(self, archive: zipfile.ZipFile, names: dict[str, str]):
        data = archive.read(names["data.pkl"])
        _check_sizes(data)
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._archive, self._names = archive, names

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _Storage(_STORAGES[name])
        allowed = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not allowed")
        return allowed[(module, name)]

    def persistent_load(self, pid: tuple) -> np.ndarray:
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _Storage):
            raise pickle.UnpicklingError(f"unknown persistent object {kind!r}")
        data = self._archive.read(self._names[f"data/{key}"])
        return np.frombuffer(data, jnp.dtype(storage.dtype), count)


def _check_sizes(data: bytes) -> None:
    """Refuses a pickle that makes the unpickler reserve more than the file holds: memo numbers, announced lengths."""
    for opcode, argument, _ in pickletools.genops(data):  # raises where an announced length is not there
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(data):
            raise pickle.UnpicklingError(f"memo {argument} in a pickle of {len(data)} bytes")


def _rebuild_tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    """The strided view that torch describes, bounds checked, as a copy."""
    reach = offset + sum((length - 1) * step for length, step in zip(size, stride)) if 0 not in size else offset
    if min((offset, *size, *stride)) < 0 or reach >= max(storage.size, 1):
        raise pickle.UnpicklingError("a tensor reaches outside its storage")
    if math.prod(size) > storage.size:  # strides of zero: a few bytes could stand for any amount of memory
        raise pickle.UnpicklingError("a tensor has more elements than its storage")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()


def _arrays(tensors: Mapping[str, Any]) -> Iterator[np.ndarray]:
    for value in tensors.values():
        yield from _arrays(value) if isinstance(value, Mapping) else [np.asarray(value)]


def _pickle_state_dict(tensors: Mapping[str, Any]) -> bytes:
    """The pickle of OrderedDicts of contiguous tensors, opcode by opcode: PyTorch's classes are only named."""
    classes = {dtype: name for name, dtype in _STORAGES.items()}
    integer = lambda value: b"\x8a" + bytes([len(_signed(value))]) + _signed(value)
    text = lambda value: b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()
    many = lambda values: b"(" + b"".join(map(integer, values)) + b"t"
    ordered_dict = b"ccollections\nOrderedDict\n)R"
    keys = itertools.count()

    def tensor(array: np.ndarray) -> bytes:
        array, key = np.asarray(array, order="C"), next(keys)
        storage = f"ctorch\n{classes[array.dtype.name]}\n".encode()
        pid = b"(" + text("storage") + storage + text(str(key)) + text("cpu") + integer(array.size) + b"tQ"
        steps = [stride // array.itemsize for stride in array.strides]
        arguments = b"(" + pid + integer(0) + many(array.shape) + many(steps) + b"\x89" + ordered_dict + b"t"
        return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"

    def items(values: Mapping[str, Any]) -> bytes:
        encode = lambda value: items(value) if isinstance(value, Mapping) else tensor(value)
        return ordered_dict + b"(" + b"".join(text(name) + encode(value) for name, value in values.items()) + b"u"

    return b"\x80\x02" + items(tensors) + b"."


def _signed(value: int) -> bytes:
    return value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
