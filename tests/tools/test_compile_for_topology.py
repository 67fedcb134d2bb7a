# SPDX-License-Identifier: Apache-2.0
"""The counters of the planning tool, on programs whose numbers are known by hand."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from worldenv_jax import mesh as meshes


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).resolve().parents[2] / "tools" / "compile_for_topology.py"
    spec = importlib.util.spec_from_file_location("compile_for_topology", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_collectives_inside_a_loop_count_once_per_iteration(tool):
    mesh = meshes.make_mesh(8, 1, 1)
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def program(x):
        def body(total, _):
            return total + jax.lax.with_sharding_constraint(jnp.tanh(x * total[0]), whole).sum(0), None

        return jax.lax.scan(body, jnp.ones(16), length=3)[0]

    compiled = jax.jit(program, in_shardings=split, out_shardings=whole).lower(jnp.ones((8, 16))).compile()
    counted = tool.count_collectives(compiled.as_text())
    assert sum(count for count, _ in counted.values()) % 3 == 0
    assert sum(size for _, size in counted.values()) in (3 * 16 * 4, 3 * 8 * 16 * 4)  # the sum, or all rows


def test_layouts_use_every_device_and_divide_the_batch(tool):
    found = list(tool.layouts(8, batch=4))
    assert found[0] == (4, 1, 2)
    assert all(data * fsdp * tensor == 8 and 4 % (data * fsdp) == 0 for data, fsdp, tensor in found)
