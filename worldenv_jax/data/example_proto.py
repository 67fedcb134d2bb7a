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
    for number, value in _fields(memoryview(buffer)):
        if number == 1:
            for entry_number, entry in _fields(_message(value)):
                if entry_number == 1:
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
    key, feature = "", memoryview(b"")
    for number, value in _fields(entry):
        if number == 1:
            try:
                key = bytes(_message(value)).decode()
            except UnicodeDecodeError as error:
                raise MalformedExampleError(f"malformed Example: a feature's name is no text: {error}") from error
        elif number == 2:
            feature = _message(value)
    return key, feature


def _parse_feature(feature: memoryview) -> Feature:
    result = []
    for kind, values in _fields(feature):
        result = _parse_values(kind, _message(values))
    return result


def _parse_values(kind: int, values: memoryview) -> Feature:
    if kind == 1:
        return [_message(value) for number, value in _fields(values) if number == 1]
    if kind == 2:
        # One packed run, or unpacked values of four bytes each: the bytes joined are the same.
        parts = [_message(value) for number, value in _fields(values) if number == 1]
        joined = parts[0] if len(parts) == 1 else b"".join(parts)
        if len(joined) % 4:
            raise MalformedExampleError(f"malformed Example: a float list of {len(joined)} bytes")
        return np.frombuffer(joined, "<f4").astype(np.float32)
    if kind == 3:
        runs = [value for number, value in _fields(values) if number == 1]
        arrays = [np.array([v], np.uint64).astype(np.int64) if isinstance(v, int) else _varints(v) for v in runs]
        return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
    raise MalformedExampleError(f"malformed Example: a feature of kind {kind}")


def _fields(buffer: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The (field number, value) pairs of a message; varints as int, everything else as a view."""
    position, end = 0, len(buffer)
    while position < end:
        tag, position = _varint(buffer, position)
        wire = tag & 7
        if wire == _VARINT:
            value, position = _varint(buffer, position)
            yield tag >> 3, value
            continue
        if wire == _LENGTH:
            size, position = _varint(buffer, position)
        elif wire in _FIXED_SIZE:
            size = _FIXED_SIZE[wire]
        else:
            raise MalformedExampleError(f"malformed Example: wire type {wire}")
        if position + size > end:
            raise MalformedExampleError(f"malformed Example: a field of {size} bytes where {end - position} are left")
        yield tag >> 3, buffer[position : position + size]
        position += size


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise MalformedExampleError("malformed Example: a number where a message was expected")
    return value


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
