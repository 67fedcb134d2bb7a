# SPDX-License-Identifier: Apache-2.0
"""`tf.train.Example` in protobuf's wire format, read and written without protobuf or TensorFlow.

    message Example   { Features features = 1; }
    message Features  { map<string, Feature> feature = 1; }
    message Feature   { oneof kind { BytesList bytes_list = 1; FloatList float_list = 2; Int64List int64_list = 3; } }
    message BytesList { repeated bytes value = 1; }      // FloatList: float, Int64List: int64, both packed

(tensorflow/core/example/feature.proto; the wire format: protobuf.dev/programming-guides/encoding.)
"""

from collections.abc import Collection, Iterator, Mapping

import numpy as np

from worldenv_jax.data.errors import MalformedExampleError

Feature = list[memoryview] | np.ndarray  # BytesList, or float32 [n], or int64 [n]

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZE = {_FIXED64: 8, _FIXED32: 4}
Field = tuple[int, int, int | memoryview]  # number, wire type, value: varints as int, everything else as a view


def parse_example(buffer: bytes | memoryview, keys: Collection[str] | None = None) -> dict[str, Feature]:
    """Reads an Example.

    Args:
        buffer: the serialised message.
        keys: read only these features; the others are stepped over without being touched.

    Returns:
        Per key a list of byte views into `buffer`, a float32 array or an int64 array, in the order of the message.

    Raises:
        MalformedExampleError: the buffer is not an Example.
    """
    features = {}
    for field in _fields(memoryview(buffer)):
        if field[0] == 1:
            for entry in _fields(_message(field)):
                if entry[0] == 1:
                    key, feature = _split_entry(_message(entry))
                    if keys is None or key in keys:
                        features[key] = _parse_feature(feature)
    return features


def serialize_example(features: Mapping[str, list[bytes] | np.ndarray]) -> bytes:
    """Writes an Example with its keys in sorted order.

    Args:
        features: per key a list of byte strings, or a float32, int64 or bool array (flattened in C order).

    Raises:
        TypeError: an array has another dtype.
    """
    entries = []
    for key in sorted(features):
        feature = _serialize_feature(features[key])
        entries.append(_delimited(1, _delimited(1, key.encode()) + _delimited(2, feature)))
    return _delimited(1, b"".join(entries))


def _split_entry(entry: memoryview) -> tuple[str, memoryview]:
    fields = list(_fields(entry))
    by_number = {field[0]: _message(field) for field in fields}
    if len(by_number) < len(fields) or not by_number.keys() <= {1, 2}:
        raise MalformedExampleError(f"malformed Example: an entry with the fields {[field[0] for field in fields]}")
    try:
        key = bytes(by_number.get(1, b"")).decode()
    except UnicodeDecodeError as error:
        raise MalformedExampleError(f"malformed Example: a feature's name is no text: {error}") from error
    return key, by_number.get(2, memoryview(b""))


def _parse_feature(feature: memoryview) -> Feature:
    result = []
    for field in _fields(feature):
        result = _parse_values(field[0], _message(field))
    return result


def _parse_values(kind: int, values: memoryview) -> Feature:
    fields = [field for field in _fields(values) if field[0] == 1]
    if kind == 1:
        return [_message(field) for field in fields]
    if kind == 2:
        # One packed run, or unpacked values of four bytes each: the bytes joined are the same.
        parts = [_message(field, or_wire=_FIXED32) for field in fields]
        joined = parts[0] if len(parts) == 1 else b"".join(parts)
        if len(joined) % 4:
            raise MalformedExampleError(f"malformed Example: a float list of {len(joined)} bytes")
        return np.frombuffer(joined, "<f4").astype(np.float32)
    if kind == 3:
        arrays = [
            np.array([field[2]], np.uint64).astype(np.int64) if field[1] == _VARINT else _varints(_message(field))
            for field in fields
        ]
        return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
    raise MalformedExampleError(f"malformed Example: a feature of kind {kind}")


def _fields(buffer: memoryview) -> Iterator[Field]:
    """The fields of a message."""
    position, end = 0, len(buffer)
    while position < end:
        tag, position = _varint(buffer, position)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise MalformedExampleError(f"malformed Example: a field of number {number}")
        if wire == _VARINT:
            value, position = _varint(buffer, position)
            yield number, wire, value
            continue
        if wire == _LENGTH:
            size, position = _varint(buffer, position)
        elif wire in _FIXED_SIZE:
            size = _FIXED_SIZE[wire]
        else:
            raise MalformedExampleError(f"malformed Example: wire type {wire}")
        if position + size > end:
            raise MalformedExampleError(f"malformed Example: a field of {size} bytes where {end - position} are left")
        yield number, wire, buffer[position : position + size]
        position += size


def _message(field: Field, or_wire: int = _LENGTH) -> memoryview:
    """The bytes of a delimited field, or of one of wire type `or_wire`."""
    if field[1] not in (_LENGTH, or_wire):
        raise MalformedExampleError("malformed Example: a number where a message was expected")
    return field[2]


def _varint(buffer: memoryview, position: int) -> tuple[int, int]:
    result = 0
    for shift in range(0, 70, 7):
        if position >= len(buffer):
            raise MalformedExampleError("malformed Example: it ends inside a number")
        byte = buffer[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result & 0xFFFFFFFFFFFFFFFF, position
    raise MalformedExampleError("malformed Example: a number of more than ten bytes")


def _varints(packed: memoryview) -> np.ndarray:
    """All numbers of a packed run, int64 [n]."""
    octets = np.frombuffer(packed, np.uint8)
    last = octets < 0x80
    if last.all():
        return octets.astype(np.int64)
    if not last[-1]:
        raise MalformedExampleError("malformed Example: it ends inside a number")
    stops = np.flatnonzero(last) + 1
    starts = np.concatenate([[0], stops[:-1]])
    place = np.arange(len(octets)) - np.repeat(starts, stops - starts)
    if place.max() > 9:
        raise MalformedExampleError("malformed Example: a number of more than ten bytes")
    shifted = (octets & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.bitwise_or.reduceat(shifted, starts).astype(np.int64)


def _serialize_feature(values: list[bytes] | np.ndarray) -> bytes:
    if isinstance(values, list):
        return _delimited(1, b"".join(_delimited(1, value) for value in values))
    if values.dtype == np.float32:
        return _delimited(2, _delimited(1, values.astype("<f4").tobytes()))
    if values.dtype in (np.int64, np.bool_):
        packed = b"".join(_encode_varint(int(value)) for value in values.ravel())
        return _delimited(3, _delimited(1, packed))
    raise TypeError(f"got an array of {values.dtype}, expected float32, int64 or bool")


def _delimited(number: int, payload: bytes) -> bytes:
    return _encode_varint(number << 3 | _LENGTH) + _encode_varint(len(payload)) + payload


def _encode_varint(value: int) -> bytes:
    value &= 0xFFFFFFFFFFFFFFFF  # negative numbers are two's complement in ten bytes
    octets = bytearray()
    while value >= 0x80:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)
