# SPDX-License-Identifier: Apache-2.0
"""Sharding rules on abstract trees, and the report, against hand-made tables."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from worldenv_jax import mesh as meshes
from worldenv_jax.errors import WorldEnvError


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


PARAMS = {
    "params": {
        "embed_tokens": array(32, 8),
        "layers": {
            "q_proj": {"kernel": array(4, 8, 16), "bias": array(4, 16)},
            "o_proj": {"kernel": array(4, 16, 8)},
            "input_layernorm": {"scale": array(4, 8)},
        },
        "head": {"kernel": array(8, 7)},
    },
    "lora": {"layers": {"q_proj": {"a": array(4, 8, 2)}}},
}
EXPECTED = {
    "params/embed_tokens": P("tensor", "fsdp"),
    "params/layers/q_proj/kernel": P(None, "fsdp", "tensor"),
    "params/layers/q_proj/bias": P(None, None),
    "params/layers/o_proj/kernel": P(None, "tensor", "fsdp"),
    "params/layers/input_layernorm/scale": P(None, None),
    "params/head/kernel": P("fsdp", None),  # 7 does not divide by 2
    "lora/layers/q_proj/a": P(None, None, None),
}


@pytest.fixture(scope="module")
def mesh():
    return meshes.make_mesh(data=2, fsdp=2, tensor=2)


def test_rules_decide_the_spec_of_every_array(mesh):
    assert {p.name: p.spec for p in meshes.place(PARAMS, mesh)} == EXPECTED


def test_optimiser_state_follows_its_parameters(mesh):
    state = jax.eval_shape(optax.adamw(1e-3).init, PARAMS)
    placed = {p.name: p.spec for p in meshes.place(state, mesh)}
    for name, spec in EXPECTED.items():
        assert placed[f"0/mu/{name}"] == spec
        assert placed[f"0/nu/{name}"] == spec
    assert placed["0/count"] == P()


def test_cache_is_split_by_batch_and_heads(mesh):
    cache = {"cache": {"k": array(4, 8, 100, 2, 16, dtype=jnp.bfloat16)}}
    [placed] = meshes.place(cache, mesh)
    assert placed.spec == P(None, ("fsdp", "data"), None, "tensor", None)
    assert placed.bytes == 4 * 8 * 100 * 2 * 16 * 2
    assert placed.bytes_per_device == placed.bytes // 8


def test_report_counts_bytes_and_names_rules(mesh):
    text = meshes.report(meshes.place({**PARAMS, "key": jax.random.key(0)}, mesh))
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert "(-, fsdp, tensor)" in lines["params/layers/q_proj/kernel"] and "512" in lines["params/layers/q_proj/kernel"]
    assert "(^|/)lora/" in lines["lora/layers/q_proj/a"]
    # Whole: bias 64, scale 32, adapter 64 numbers of 4 bytes, and a key of two words. In four: embedding 256, q and o
    # projections 512 each; in two: head 56.
    whole = 4 * (64 + 32 + 64) + 8
    assert f"replicated: 4 of 8 arrays, {whole:,} bytes" in text
    total, per_device = whole + 4 * (256 + 1024 + 56), whole + 4 * (64 + 256 + 28)
    assert text.endswith(f"per device: {per_device:,} of {total:,} bytes")


def test_mesh_takes_the_devices_that_remain():
    assert dict(meshes.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(meshes.make_mesh(fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert meshes.make_mesh(devices=jax.devices()[:1]).size == 1


def test_mesh_of_the_wrong_size_is_an_error():
    with pytest.raises(WorldEnvError, match="data=3 x fsdp=1 x tensor=2 needs 6 devices, got 8"):
        meshes.make_mesh(data=3, tensor=2)


def test_batch_that_does_not_divide_is_an_error(mesh):
    with pytest.raises(WorldEnvError, match="6 rows cannot be split over 4 devices"):
        meshes.shard_batch({"x": jnp.zeros((6, 2))}, mesh)
