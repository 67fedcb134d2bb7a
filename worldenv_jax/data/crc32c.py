# SPDX-License-Identifier: Apache-2.0
"""CRC-32C (Castagnoli, RFC 3720 appendix B.4) in NumPy, and TFRecord's masked form.

A CRC is linear over GF(2): long buffers are cut into lanes that advance together, four bytes at a time, and the
lanes' remainders are joined by the operator "append n zero bytes" (32 columns, found by squaring).
"""

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78  # bit-reversed 0x1EDC6F41
_MASK_DELTA = 0xA282EAD8  # tensorflow/core/lib/hash/crc32c.h
_MAX_LANES = 4096  # 16 KiB per step: the lanes stay in the first-level cache
_BITS = np.arange(32, dtype=np.uint32)


def _byte_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table


_TABLE = _byte_table()
_TABLE_LIST = _TABLE.tolist()


def _append_zero_bytes(state: np.ndarray, count: int) -> np.ndarray:
    for _ in range(count):
        state = _TABLE[state & 0xFF] ^ (state >> 8)
    return state


@functools.cache
def _word_tables() -> tuple[np.ndarray, np.ndarray]:
    """What the low and the high half of (state xor word) become after four bytes."""
    half = np.arange(1 << 16, dtype=np.uint32)
    return _append_zero_bytes(half, 4), _append_zero_bytes(half << 16, 4)


def _apply(columns: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Multiplies GF(2) vectors uint32 [n] by the 32 x 32 matrix with the given columns uint32 [32]."""
    return np.bitwise_xor.reduce(((states[:, None] >> _BITS) & 1) * columns, axis=1)


@functools.cache
def _squared_operator(exponent: int) -> np.ndarray:
    """Columns of the operator that appends 2**exponent zero words."""
    if exponent == 0:
        return _append_zero_bytes(np.uint32(1) << _BITS, 4)
    half = _squared_operator(exponent - 1)
    return _apply(half, half)


def _append_zero_words(states: np.ndarray, count: int) -> np.ndarray:
    for exponent in range(count.bit_length()):
        if count >> exponent & 1:
            states = _apply(_squared_operator(exponent), states)
    return states


def _small(data: bytes) -> int:
    state = 0xFFFFFFFF
    for byte in data:
        state = _TABLE_LIST[(state ^ byte) & 0xFF] ^ (state >> 8)
    return state ^ 0xFFFFFFFF


def crc32c(data: bytes | memoryview) -> int:
    """The CRC-32C of a buffer, as an unsigned 32-bit number."""
    size = len(data)
    if size < 512:
        return _small(bytes(data))
    lanes = min(_MAX_LANES, 1 << (size // 64).bit_length() - 1)
    words = -(-size // (4 * lanes))  # per lane; zeros in front leave a zero state zero
    padded = np.zeros(4 * lanes * words, np.uint8)
    padded[-size:] = np.frombuffer(data, np.uint8)
    padded[-size:][:4] ^= 0xFF  # the initial state
    columns = np.ascontiguousarray(padded.view("<u4").reshape(lanes, words).T)
    low, high = _word_tables()
    states = np.zeros(lanes, np.uint32)
    for column in columns:
        halves = (states ^ column).view("<u2").reshape(lanes, 2)
        states = low[halves[:, 0]] ^ high[halves[:, 1]]
    while len(states) > 1:
        states = _append_zero_words(states[0::2], words) ^ states[1::2]
        words *= 2
    return int(states[0]) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | memoryview) -> int:
    """The rotated and shifted CRC that TFRecord stores."""
    value = crc32c(data)
    return ((value >> 15 | value << 17) + _MASK_DELTA) & 0xFFFFFFFF
