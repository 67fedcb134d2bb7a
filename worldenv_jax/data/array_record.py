# SPDX-License-Identifier: Apache-2.0
"""ArrayRecord files behind the interface of `TFRecordFile`."""

from collections.abc import Sequence
from pathlib import Path

from worldenv_jax.data.errors import DataError


class ArrayRecordFile(Sequence[bytes]):
    """Random access to the records of one file. Records are copied when they are read.

    Attributes:
        path: the file.
        damage: None, or why the file cannot be read; `len` is 0 then (the index lies at its end).
    """

    cached_episodes = 64  # a cached episode holds a copy of its encoded images

    def __init__(self, path: Path | str):
        """Opens the file.

        Raises:
            DataError: there is no such file.
        """
        from array_record.python.array_record_module import ArrayRecordReader

        self.path = Path(path)
        self.damage: str | None = None
        self._count = 0
        if not self.path.is_file():
            raise DataError(self.path, "cannot be read: no such file")
        try:
            self._reader = ArrayRecordReader(str(self.path), options="readahead_buffer_size:0")
            self._count = self._reader.num_records()
        except (RuntimeError, ValueError) as error:
            self.damage = f"truncated or corrupt, no record of it can be read: {error}"

    def __reduce__(self):
        return ArrayRecordFile, (self.path,)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> bytes:
        """The payload of one record.

        Raises:
            DataError: it is corrupt.
        """
        try:
            return self._reader.read([index])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise DataError(self.path, f"{self.where(index)}: corrupt: {error}") from error

    def unverified(self, index: int) -> bytes:
        """The same: ArrayRecord verifies what it reads."""
        return self[index]

    def where(self, index: int) -> str:
        """The position of a record in words, for messages."""
        return f"record {index}"
