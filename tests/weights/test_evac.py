# SPDX-License-Identifier: Apache-2.0
"""EVAC's name table: every published name at full size, both layouts, both directions, errors."""

import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tools.parity.evac import fixture_config
from worldenv_jax.simulator import SimulatorConfig, init_simulator
from worldenv_jax.weights.evac import evac_rows, export_evac, flatten_checkpoint, is_unused, load_evac
from worldenv_jax.weights.name_tables import bind


@pytest.fixture(scope="module")
def published(fixtures_dir):
    """Name -> shape of the released configuration."""
    lines = (fixtures_dir / "evac" / "evac_full_state_dict.txt").read_text().splitlines()
    pairs = [line.split("\t") for line in lines if not line.startswith("#")]
    return {name: tuple(int(n) for n in shape.strip("()").split(",") if n.strip()) for name, shape in pairs}


@pytest.fixture(scope="module")
def tiny(fixtures_dir):
    """A complete tiny checkpoint and its configuration."""
    import json

    folder = fixtures_dir / "evac"
    config = fixture_config(json.loads((folder / "config.json").read_text()))
    return config, load_file(folder / "weights.safetensors")


def test_all_published_names_map_with_their_shapes(published):
    config = SimulatorConfig()
    abstract = jax.eval_shape(lambda key: init_simulator(config, key), jax.random.key(0))
    entries = bind(evac_rows(config), abstract)
    unused = {name for name in published if is_unused(config, name)}
    assert len(published) == 2310
    assert set(entries).isdisjoint(unused) and set(entries) | unused == set(published)
    assert {name: entry.shape for name, entry in entries.items()} == {n: published[n] for n in entries}


@pytest.mark.parametrize(
    ("prefix", "count"),
    [
        ("model.diffusion_model.", 1_464_484_100),
        ("first_stage_model.", 83_653_863),
        ("cond_stage_model.", 47_245_312),
        ("image_proj_model.", 48_787_456),
    ],
)
def test_full_size_counts(published, prefix, count):
    """Our parameters plus the named unused tensors are the published number."""
    config = SimulatorConfig()
    abstract = jax.eval_shape(lambda key: init_simulator(config, key), jax.random.key(0))
    names = [name for name in bind(evac_rows(config), abstract) if name.startswith(prefix)]
    names += [name for name in published if name.startswith(prefix) and is_unused(config, name)]
    assert sum(math.prod(published[name]) for name in names) == count


@pytest.mark.parametrize("layout", ["lightning", "deepspeed"])
def test_round_trip_is_exact(tiny, layout):
    config, tensors = tiny
    params, unused = load_evac(config, tensors)
    written = export_evac(config, params, unused, layout)
    flat = flatten_checkpoint(written)
    assert set(flat) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(flat[name], tensor, err_msg=name)
    if layout == "deepspeed":
        assert all(name[16:] in tensors for name in written["module"])


def test_wrong_checkpoints_are_named(tiny):
    config, tensors = tiny
    with pytest.raises(ValueError, match="expected model.diffusion_model"):
        flatten_checkpoint({"state_dict": {"encoder.weight": np.zeros(1)}})
    with pytest.raises(ValueError, match="neither 'lightning' nor 'deepspeed'"):
        export_evac(config, {}, {}, "pickle")
    broken = dict(tensors)
    del broken["model.diffusion_model.out.2.bias"]
    broken["cond_stage_model.proj_in.bias"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="(?s)missing.*out.2.bias.*misshapen.*proj_in.bias"):
        load_evac(config, broken)
