# SPDX-License-Identifier: Apache-2.0
"""TFRecord files without TensorFlow: framing, checksums, random access, and what is left of a damaged file.

A record is `uint64 length | uint32 masked CRC-32C of the length | payload | uint32 masked CRC-32C of the payload`,
little-endian (tensorflow/core/lib/io/record_writer.h).
"""

import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from worldenv_jax.data.crc32c import masked_crc32c
from worldenv_jax.data.errors import DataError

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")


class TFRecordFile(Sequence[memoryview]):
    """Random access to the records of one file; the payloads are views of the mapped file.

    Opening reads the headers only. A payload's checksum is verified the first time that it is read. The file must
    not be changed in place while it is open: replace it (the mapping keeps the old one).

    Attributes:
        path: the file.
        damage: None, or what is wrong with the framing and where. `len` counts the good records before it.
    """

    cached_episodes = 4096  # a cached episode refers to the mapped file for its images

    def __init__(self, path: Path | str):
        """Indexes the file.

        Raises:
            DataError: the file cannot be opened.
        """
        self.path = Path(path)
        self.damage: str | None = None
        self._data = _map_file(self.path)
        self._spans = list(self._index())
        self._verified: set[int] = set()

    def __reduce__(self):
        return TFRecordFile, (self.path,)  # a mapping cannot be pickled: worker processes map the file again

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> memoryview:
        """The payload of one record.

        Raises:
            DataError: its checksum does not match; names the record and its offset.
        """
        payload = self.unverified(index)
        if index not in self._verified:
            stop = self._spans[index][1]
            if masked_crc32c(payload) != _FOOTER.unpack(self._data[stop : stop + _FOOTER.size])[0]:
                problem = f"{self.where(index)}: corrupt, the checksum of its payload does not match"
                raise DataError(self.path, problem)
            self._verified.add(index)
        return payload

    def unverified(self, index: int) -> memoryview:
        """The payload without a look at its checksum: only the pages that are used are read from the disk."""
        start, stop = self._spans[index]
        return self._data[start:stop]

    def where(self, index: int) -> str:
        """The position of a record in words, for messages."""
        return f"record {index} at byte {self._spans[index][0] - _HEADER.size}"

    def _index(self) -> Iterator[tuple[int, int]]:
        offset, count, end = 0, 0, len(self._data)
        while offset < end:
            start = offset + _HEADER.size
            if start > end:
                self._stop(count, offset, f"truncated, the file ends {start - end} bytes short of its header")
                return
            header = self._data[offset:start]
            length, checksum = _HEADER.unpack(header)
            if masked_crc32c(header[:8]) != checksum:
                self._stop(count, offset, "corrupt, the checksum of its length does not match")
                return
            stop = start + length
            if stop + _FOOTER.size > end:
                missing = stop + _FOOTER.size - end
                self._stop(count, offset, f"truncated, the file ends {missing} bytes short of it")
                return
            yield start, stop
            count, offset = count + 1, stop + _FOOTER.size

    def _stop(self, count: int, offset: int, problem: str) -> None:
        self.damage = f"record {count} at byte {offset}: {problem}; the {count} records before it are good"


def _map_file(path: Path) -> memoryview:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:  # an empty file cannot be mapped
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise DataError(path, f"cannot be read: {error}") from error


class TFRecordWriter:
    """Writes records one after another; the file is on the disk when `close` returns."""

    def __init__(self, path: Path):
        self.path = path
        self.num_bytes = 0
        self.num_records = 0
        self._file = path.open("wb")

    def write(self, payload: bytes) -> None:
        """Appends one record."""
        length = struct.pack("<Q", len(payload))
        parts = (length, _FOOTER.pack(masked_crc32c(length)), payload, _FOOTER.pack(masked_crc32c(payload)))
        self._file.writelines(parts)
        self.num_bytes += len(payload)
        self.num_records += 1

    def close(self) -> None:
        """Flushes the file to the disk and closes it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
