# SPDX-License-Identifier: Apache-2.0
"""A tree of parameters as one safetensors file: what a finished stage hands on, and what the package ships."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

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
    files.write_bytes(path, save(flat))


def load_params(path: str | Path) -> Params:
    """Reads them back as NumPy arrays; half precision becomes float32.

    Raises:
      WorldEnvError: the file is missing, truncated or not a safetensors file.
    """
    path = Path(path)
    try:
        flat = load(path.read_bytes())
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


def _flatten(tree: Params, prefix: str, flat: dict[str, np.ndarray]) -> None:
    for name, value in tree.items():
        if isinstance(value, dict):
            _flatten(value, f"{prefix}{name}{SEPARATOR}", flat)
        else:
            flat[prefix + name] = np.ascontiguousarray(value)
