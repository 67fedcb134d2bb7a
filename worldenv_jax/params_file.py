# SPDX-License-Identifier: Apache-2.0
"""A tree of parameters as one safetensors file: what a finished stage hands on, and what the package ships."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from worldenv_jax import files
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.types import Params

SEPARATOR = "/"


def save_params(path: str | Path, params: Params, dtype: type | None = None) -> None:
    """Writes nested dicts of arrays atomically; names are joined with "/".

    Args:
      path: the file.
      params: nested dicts with string keys.
      dtype: stores floating-point arrays in this type (float16 halves the size), None as they are.
    """
    flat: dict[str, np.ndarray] = {}
    _flatten(params, "", flat)
    if dtype is not None:
        flat = {k: v.astype(dtype) if np.issubdtype(v.dtype, np.floating) else v for k, v in flat.items()}
    with files.atomic_path(path) as temporary:
        save_file(flat, temporary)


def load_params(path: str | Path) -> Params:
    """Reads them back as NumPy arrays; half precision becomes float32.

    Raises:
      WorldEnvError: the file is missing, truncated or not a safetensors file.
    """
    try:
        with safe_open(path, framework="np") as file:  # knows bfloat16, which safetensors.numpy.load does not
            flat = {name: file.get_tensor(name) for name in file.offset_keys()}
    except (OSError, SafetensorError) as error:
        raise WorldEnvError(f"cannot read parameters from {path}: {error}") from error
    tree: Params = {}
    for name, array in flat.items():
        *folders, last = name.split(SEPARATOR)
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = array.astype(np.float32) if array.dtype == np.float16 else array
    return tree


def check_params(what: str, params: Params, expected: Params) -> None:
    """Compares names and shapes with those that a config asks for.

    Args:
      what: "simulator", say: for the message.
      params: nested dicts of arrays.
      expected: the same, abstract arrays will do (`jax.eval_shape`).

    Raises:
      WorldEnvError: with the first differences; the parameters belong to a model of another config.
    """
    have: dict[str, tuple[int, ...]] = {}
    need: dict[str, tuple[int, ...]] = {}
    _flatten_shapes(params, "", have)
    _flatten_shapes(expected, "", need)
    differences = [f"{name} is missing" for name in need if name not in have]
    differences += [f"{name} is unknown" for name in have if name not in need]
    differences += [
        f"{name} is {list(have[name])}, expected {list(need[name])}"
        for name in need
        if name in have and have[name] != need[name]
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise WorldEnvError(
            f"the {what}'s parameters belong to another configuration: {'; '.join(differences[:3])}{more}"
        )


def _flatten_shapes(tree: Params, prefix: str, flat: dict[str, tuple[int, ...]]) -> None:
    for name, value in tree.items():
        if isinstance(value, dict):
            _flatten_shapes(value, f"{prefix}{name}{SEPARATOR}", flat)
        else:
            flat[prefix + name] = tuple(value.shape)


def _flatten(tree: Params, prefix: str, flat: dict[str, np.ndarray]) -> None:
    for name, value in tree.items():
        if isinstance(value, dict):
            _flatten(value, f"{prefix}{name}{SEPARATOR}", flat)
        else:
            flat[prefix + name] = np.ascontiguousarray(value)
