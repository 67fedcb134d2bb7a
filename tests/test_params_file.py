# SPDX-License-Identifier: Apache-2.0
"""Parameters as one file: what is written is read, in full and in half precision; damage is one clear error."""

import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.errors import WorldEnvError
from worldenv_jax.params_file import load_params, save_params

BIAS = np.array([1.5, -2.25], np.float32)
KERNEL = np.arange(6, dtype=np.float32).reshape(2, 3)
TREE = {"tower": {"kernel": KERNEL, "deep": {"bias": BIAS}}, "count": np.array([3], np.int32)}


@pytest.mark.parametrize("dtype", [None, np.float16])
def test_round_trip(tmp_path, dtype):
    save_params(tmp_path / "p.safetensors", TREE, dtype)
    back = load_params(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(back["tower"]["kernel"], TREE["tower"]["kernel"])
    np.testing.assert_array_equal(back["tower"]["deep"]["bias"], [1.5, -2.25])
    assert back["tower"]["kernel"].dtype == np.float32 and back["count"].dtype == np.int32


def test_bfloat16_stays(tmp_path):
    save_params(tmp_path / "p.safetensors", {"kernel": KERNEL.astype(jnp.bfloat16)})
    back = load_params(tmp_path / "p.safetensors")["kernel"]
    assert back.dtype == jnp.bfloat16
    np.testing.assert_array_equal(back.astype(np.float32), KERNEL)


def test_truncated_and_missing_files_are_named(tmp_path):
    path = tmp_path / "p.safetensors"
    save_params(path, TREE)
    path.write_bytes(path.read_bytes()[:-3])
    for broken in (path, tmp_path / "none.safetensors"):
        with pytest.raises(WorldEnvError, match=broken.name):
            load_params(broken)
