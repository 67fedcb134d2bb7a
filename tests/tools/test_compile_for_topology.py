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
from worldenv_jax.policy import init_policy


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


def test_table_shows_what_fits_and_what_is_missing(tool):
    fits = {"topology": "v5e:8x8", "program": "update", "layout": [8, 1, 8], "memory_gib": 16.0, "beside_gib": 0.5}
    fits |= {"argument_gib": 3.49, "temporary_gib": 3.97, "output_gib": 2.68, "gradients_gib": 0.25, "fits": True}
    fits["collectives"] = {"all-gather": {"count": 3, "gib": 1.0}, "all-reduce": {"count": 1, "gib": 2.5}}
    error = "Ran out of memory on HBM, the total memory required for HLO temporaries (42.44G) exceeds available HBM"
    other = {"topology": "v5e:8x8", "program": "rollout", "layout": [8, 1, 8], "memory_gib": 16.0, "beside_gib": 0.1}
    _, line, first, second = tool.table([fits, other | {"error": error, "fits": False}]).splitlines()
    assert line.count("|") == first.count("|") == second.count("|") == 11
    assert first == "| update | v5e:8x8, 16.0 GiB | 8 x 1 x 8 | 3.49 | 3.97 | 2.68 | 0.50 | 3.5 | 0.25 | yes |"
    assert second == "| rollout | v5e:8x8, 16.0 GiB | 8 x 1 x 8 |  |  |  | 0.10 |  |  | no, needs 42.44 |"
    error = "Ran out of memory in memory space hbm. Used 15.97G of 15.75G hbm. Exceeded hbm capacity by 223.20M."
    assert tool.table([other | {"error": error, "fits": False}]).endswith("| no, needs 15.97 |")


def test_gradients_are_those_of_the_trained_parameters(tool, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tool", "--preset=debug", "--starts=4", "--samples=2", "--chunks=2"])
    plan, mesh = tool.Plan(tool.parse_arguments()), meshes.make_mesh(8, 1, 1)
    params = plan.arguments_of("update", mesh)[1].params
    assert tool.gradient_bytes(plan, mesh) == sum(leaf.size * 4 for leaf in jax.tree.leaves(params))  # no adapters: all
    simulator = plan.arguments_of("rollout", mesh)[1].simulator
    assert tool.beside(plan, "update", mesh) > sum(leaf.size * 2 for leaf in jax.tree.leaves(simulator))


def test_shapes_alone_give_the_bytes_of_the_update(tool, monkeypatch):
    arguments = ["tool", "--preset=debug", "--starts=2", "--samples=4", "--chunks=2", "--chunks-at-once=0"]
    monkeypatch.setattr("sys.argv", arguments)
    plan = tool.Plan(tool.parse_arguments())
    one, eight = (tool.update_shapes(plan, layout) for layout in ((1, 1, 1), (8, 1, 1)))
    params = jax.eval_shape(lambda: init_policy(plan.policy, jax.random.key(0)))
    params = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert one["parameters_gib"] == eight["parameters_gib"] == round(4 * params / 2**30, 3)
    assert one["optimizer_gib"] == pytest.approx(2 * one["parameters_gib"], abs=2e-3)  # two moments
    assert one["gradients_gib"] == one["parameters_gib"]
    assert one["rollout_gib"] == pytest.approx(8 * eight["rollout_gib"], abs=5e-3)
