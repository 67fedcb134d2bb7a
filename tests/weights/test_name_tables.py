# SPDX-License-Identifier: Apache-2.0
"""The name-table engine: layouts, stacked layers, fused parts, shardings, and the one error that lists everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from worldenv_jax.weights import name_tables as nt

ROWS = [
    nt.Row("blocks.{i}.q.weight", "blocks/qkv/kernel", nt.LINEAR, part=(0, 2)),
    nt.Row("blocks.{i}.v.weight", "blocks/qkv/kernel", nt.LINEAR, part=(1, 2)),
    nt.Row("down.{level}.conv.weight", "down_{level}/conv/kernel", nt.CONV2D),
    nt.Row("patch.weight", "patch/kernel", nt.patch_kernel(2)),
    nt.Row("cls_token", "cls", nt.leading_ones(2)),
    nt.Row("absent.weight", "absent/kernel", nt.LINEAR),
]
ABSTRACT = {
    "blocks": {"qkv": {"kernel": jax.ShapeDtypeStruct((3, 4, 10), jnp.float32)}},
    "down_0": {"conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 2, 4), jnp.float32)}},
    "down_1": {"conv": {"kernel": jax.ShapeDtypeStruct((1, 1, 4, 8), jnp.float32)}},
    "patch": {"kernel": jax.ShapeDtypeStruct((12, 5), jnp.float32)},
    "cls": jax.ShapeDtypeStruct((7,), jnp.float32),
}


def foreign_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {f"blocks.{i}.{name}.weight": (5, 4) for i in range(3) for name in "qv"}
    shapes |= {"down.0.conv.weight": (4, 2, 3, 3), "down.1.conv.weight": (8, 4, 1, 1)}
    shapes |= {"patch.weight": (5, 3, 2, 2), "cls_token": (1, 1, 7)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_import_places_every_tensor_where_the_layout_says():
    tensors = foreign_tensors()
    params = nt.import_params(ROWS, ABSTRACT, nt.Tensors.from_arrays(tensors), "a test")
    qkv = np.asarray(params["blocks"]["qkv"]["kernel"])
    np.testing.assert_array_equal(qkv[1, :, :5], tensors["blocks.1.q.weight"].T)
    np.testing.assert_array_equal(qkv[2, :, 5:], tensors["blocks.2.v.weight"].T)
    assert params["down_0"]["conv"]["kernel"][2, 1, 0, 3] == tensors["down.0.conv.weight"][3, 0, 2, 1]
    # Patch pixels in the order row, column, channel: pixel (1, 0), channel 2 is feature (1 * 2 + 0) * 3 + 2 = 8.
    assert params["patch"]["kernel"][8, 4] == tensors["patch.weight"][4, 2, 1, 0]
    np.testing.assert_array_equal(params["cls"], tensors["cls_token"][0, 0])


def test_round_trip_is_byte_identical_also_in_bfloat16():
    tensors = {name: array.astype(jnp.bfloat16) for name, array in foreign_tensors().items()}
    params = nt.import_params(ROWS, ABSTRACT, nt.Tensors.from_arrays(tensors), "a test")
    exported = dict(nt.export_tensors(ROWS, params))
    assert exported.keys() == tensors.keys()
    for name, array in tensors.items():
        assert exported[name].dtype == array.dtype and exported[name].tobytes() == array.tobytes(), name


def test_shards_receive_their_slices_and_each_tensor_is_read_once():
    tensors, reads = foreign_tensors(), []
    source = nt.Tensors.from_arrays(tensors)
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), devices=jax.devices()[:4])
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), ABSTRACT)
    shardings["blocks"]["qkv"]["kernel"] = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))

    def read(name):
        reads.append(name)
        return tensors[name]

    params = nt.import_params(ROWS, ABSTRACT, source._replace(read=read), "a test", shardings)
    whole = nt.import_params(ROWS, ABSTRACT, source, "a test")
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert params["blocks"]["qkv"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert sorted(reads) == sorted(tensors)


def test_one_error_lists_missing_unexpected_and_misshapen_names():
    tensors = foreign_tensors()
    del tensors["blocks.0.q.weight"]
    tensors["stranger"] = np.zeros(3)
    tensors["patch.weight"] = np.zeros((5, 3, 4, 4))
    with pytest.raises(ValueError) as error:
        nt.import_params(ROWS, ABSTRACT, nt.Tensors.from_arrays(tensors), "the file x.safetensors")
    text = str(error.value)
    assert "x.safetensors" in text and "3 names" in text
    assert "missing     blocks.0.q.weight (5, 4)" in text
    assert "unexpected  stranger (3,)" in text
    assert "misshapen   patch.weight: got (5, 3, 4, 4), expected (5, 3, 2, 2)" in text


@pytest.mark.parametrize("rows", [ROWS[1:], [*ROWS, nt.Row("again", "cls")]], ids=["partly unnamed", "named twice"])
def test_a_table_that_does_not_cover_the_model_once_is_an_error(rows):
    with pytest.raises(ValueError, match="does not cover the model exactly once"):
        nt.bind(rows, ABSTRACT)


def test_dtype_converts():
    params = nt.import_params(ROWS, ABSTRACT, nt.Tensors.from_arrays(foreign_tensors()), "a test", dtype="bfloat16")
    assert params["cls"].dtype == jnp.bfloat16
