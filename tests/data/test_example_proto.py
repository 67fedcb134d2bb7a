# SPDX-License-Identifier: Apache-2.0
"""tf.train.Example against Google's protobuf runtime."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_generated_pb2 as pb

from worldenv_jax.data.example_proto import parse_example, serialize_example

FEATURES = {
    "bytes": [b"", b"abc", bytes(300)],
    "floats": np.array([0.0, -1.5, np.nan, np.inf, 3e-42], np.float32),
    "ints": np.array([0, 1, 127, 128, 2**40, 2**63 - 1, -1, -(2**63)], np.int64),
    "bools": np.array([True, False, True]),
    "schlüssel": np.zeros((2, 3), np.float32),
    "none": [],
}


def plain(features):
    return {k: [bytes(x) for x in v] if isinstance(v, list) else v.tolist() for k, v in features.items()}


def from_protobuf(data):
    message = pb.Example.FromString(data)
    kinds = {key: (value, value.WhichOneof("kind")) for key, value in message.features.feature.items()}
    return {key: list(getattr(value, kind).value) if kind else [] for key, (value, kind) in kinds.items()}


def check_as_protobuf(message):
    """ValueError, or what protobuf reads."""
    try:
        parsed = parse_example(message)
    except ValueError:
        return
    np.testing.assert_equal(plain(parsed), from_protobuf(message))


def test_protobuf_reads_what_is_written():
    expected = plain({**FEATURES, "schlüssel": np.zeros(6, np.float32)})
    np.testing.assert_equal(from_protobuf(serialize_example(FEATURES)), expected)


def test_reads_what_protobuf_writes():
    message = pb.Example()
    feature = message.features.feature
    feature["bytes"].bytes_list.value.extend(FEATURES["bytes"])
    feature["floats"].float_list.value.extend(FEATURES["floats"])
    feature["ints"].int64_list.value.extend(FEATURES["ints"].tolist())
    feature["unset"].SetInParent()
    parsed = parse_example(message.SerializeToString())
    np.testing.assert_array_equal(parsed["floats"].view(np.int32), FEATURES["floats"].view(np.int32))
    np.testing.assert_array_equal(parsed["ints"], FEATURES["ints"])
    assert [bytes(value) for value in parsed["bytes"]] == FEATURES["bytes"]
    assert len(parsed["unset"]) == 0


def test_unpacked_numbers():
    """Field 1 repeated with a tag each: 0x0d = fixed32, 0x08 = varint (300 = ac 02)."""
    floats = b"\x0d" + np.float32(1).tobytes() + b"\x0d" + np.float32(2).tobytes()
    ints = b"\x08\x01\x08\xac\x02"

    def entry(key, kind, values):
        feature = bytes([kind << 3 | 2, len(values)]) + values
        body = b"\x0a\x01" + key + b"\x12" + bytes([len(feature)]) + feature
        return b"\x0a" + bytes([len(body)]) + body

    entries = entry(b"f", 2, floats) + entry(b"i", 3, ints)
    parsed = parse_example(b"\x0a" + bytes([len(entries)]) + entries)
    assert parsed["f"].tolist() == [1, 2] and parsed["i"].tolist() == [1, 300]


def test_chosen_keys_only():
    assert parse_example(serialize_example(FEATURES), {"bools", "absent"}).keys() == {"bools"}


def test_unsupported_dtype():
    with pytest.raises(TypeError, match="float64, expected float32, int64 or bool"):
        serialize_example({"x": np.zeros(2)})


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_messages(data):
    """Whatever bytes are changed, cut or inserted."""
    message = bytearray(serialize_example(FEATURES))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(message) - 1))
        message[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    check_as_protobuf(bytes(message))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100))
def test_arbitrary_bytes(data):
    check_as_protobuf(data)
