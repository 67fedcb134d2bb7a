# SPDX-License-Identifier: Apache-2.0
"""TFRecord files: framing, random access, damage."""

import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldenv_jax.data.errors import DataError
from worldenv_jax.data.tfrecord import TFRecordFile, TFRecordWriter

PAYLOADS = [b"", b"a", bytes(range(256)) * 9]
SIZES = [16 + len(payload) for payload in PAYLOADS]


@pytest.fixture
def file(tmp_path):
    writer = TFRecordWriter(tmp_path / "x.tfrecord")
    for payload in PAYLOADS:
        writer.write(payload)
    writer.close()
    return tmp_path / "x.tfrecord"


def test_layout(file):
    """The one record of TensorFlow's documentation: length, masked CRC of the length, data, masked CRC."""
    data = file.read_bytes()
    assert len(data) == sum(SIZES)
    assert struct.unpack("<Q", data[:8]) == (0,)
    assert struct.unpack("<I", data[12:16]) == (0xA282EAD8,)  # the mask of a CRC of 0, that of no bytes


def test_random_access(file):
    records = TFRecordFile(file)
    assert records.damage is None
    assert bytes(records[2]) == PAYLOADS[2] and bytes(records[1]) == b"a"
    assert [bytes(record) for record in records] == PAYLOADS
    assert [bytes(record) for record in pickle.loads(pickle.dumps(records))] == PAYLOADS


def test_every_truncation_is_found(file, tmp_path):
    data = file.read_bytes()
    ends = np.cumsum(SIZES)
    for size in range(len(data)):
        cut = tmp_path / "cut"
        cut.write_bytes(data[:size])
        records = TFRecordFile(cut)
        good = int(np.searchsorted(ends, size, side="right"))
        assert [bytes(record) for record in records] == PAYLOADS[:good]
        whole = size in (0, *ends)
        assert (records.damage is None) == whole
        if not whole:
            offset = 0 if good == 0 else ends[good - 1]
            assert f"record {good} at byte {offset}: truncated" in records.damage
            assert f"the {good} records before it are good" in records.damage


def test_every_flipped_bit_is_found(file, tmp_path):
    data = bytearray(file.read_bytes())
    for position in range(0, len(data), 7):
        data[position] ^= 16
        (tmp_path / "flipped").write_bytes(data)
        data[position] ^= 16
        records = TFRecordFile(tmp_path / "flipped")
        if records.damage is None:
            with pytest.raises(DataError, match=r"flipped: record \d at byte \d+: corrupt"):
                list(records)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="nowhere: cannot be read: .*No such file"):
        TFRecordFile(tmp_path / "nowhere")


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "x"
    path.write_bytes(data)
    records = TFRecordFile(path)
    assert list(records) == []
    assert (records.damage is None) == (data == b"")
