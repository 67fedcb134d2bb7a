# SPDX-License-Identifier: Apache-2.0
"""CRC-32C (Castagnoli, RFC 3720 appendix B.4) in NumPy, and TFRecord's masked form.

The remainder of a message does not change when its first words are replaced by what they become after n words of
zeros, added (xor) to the words n places later. Long messages are folded that way, a row of words at a time, until
one row is left.
"""

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78  # bit-reversed 0x1EDC6F41
_MASK_DELTA = 0xA282EAD8  # tensorflow/core/lib/hash/crc32c.h
_ROWS = (4096, 64)  # words per row, a power of two: 16 KiB stay in the first-level cache
_BITS = np.arange(32, dtype=np.uint32)


def _byte_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table


_TABLE = _byte_table()
_TABLE_LIST = _TABLE.tolist()


def _remainder(data: bytes, state: int) -> int:
    for byte in data:
        state = _TABLE_LIST[(state ^ byte) & 0xFF] ^ (state >> 8)
    return state


@functools.cache
def _zero_words(count: int) -> np.ndarray:
    """What each of the 32 bits of a state becomes after `count` zero words, a power of two; uint32 [32]."""
    if count == 1:
        state = np.uint32(1) << _BITS
        for _ in range(4):
            state = _TABLE[state & 0xFF] ^ (state >> 8)
        return state
    half = _zero_words(count // 2)
    return np.bitwise_xor.reduce(((half[:, None] >> _BITS) & 1) * half, axis=1)


@functools.cache
def _half_tables(count: int) -> tuple[np.ndarray, np.ndarray]:
    """What the low and the high 16 bits of a state become after `count` zero words; uint32 [65536] each."""
    tables = []
    for columns in np.split(_zero_words(count), 2):
        table = np.zeros(1, np.uint32)
        for column in columns:
            table = np.concatenate([table, table ^ column])
        tables.append(table)
    return tables[0], tables[1]


def _fold(words: np.ndarray, row: int) -> np.ndarray:
    """A message of `row` words with the remainder of the given one, whose length is a multiple of `row`."""
    low, high = _half_tables(row)
    folded, *rest = words.reshape(-1, row)
    for following in rest:
        halves = folded.view("<u2")
        folded = low[halves[0::2]] ^ high[halves[1::2]] ^ following
    return folded


def crc32c(data: bytes | memoryview) -> int:
    """The CRC-32C of a buffer, as an unsigned 32-bit number."""
    size = len(data)
    rows = [row for row in _ROWS if size >= 16 * row]
    if not rows:
        return _remainder(bytes(data), 0xFFFFFFFF) ^ 0xFFFFFFFF
    padded = np.zeros(-(-size // (4 * rows[0])) * 4 * rows[0], np.uint8)  # zeros in front change nothing
    message = padded[-size:]
    message[:] = np.frombuffer(data, np.uint8)
    message[:4] ^= 0xFF  # the initial state
    words = padded.view("<u4")
    for row in rows:
        words = _fold(words, row)
    return _remainder(words.tobytes(), 0) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | memoryview) -> int:
    """The rotated and shifted CRC that TFRecord stores."""
    value = crc32c(data)
    return ((value >> 15 | value << 17) + _MASK_DELTA) & 0xFFFFFFFF
