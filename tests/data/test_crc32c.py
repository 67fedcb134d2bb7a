# SPDX-License-Identifier: Apache-2.0
"""CRC-32C against the vectors of RFC 3720 and a bit-by-bit division."""

import numpy as np
import pytest

from worldenv_jax.data.crc32c import crc32c, masked_crc32c


def bitwise_crc32c(data: bytes) -> int:
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def test_vectors():
    """RFC 3720 B.4, and the check value of the catalogue of CRCs."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(bytes(reversed(range(32)))) == 0x113FDB5C


@pytest.mark.parametrize("size", [0, 1, 5, 1023, 1024, 1025, 4099, 65535, 65536, 65543, 150_001])
def test_every_way_of_folding(size):
    data = np.random.default_rng(size).bytes(size)
    assert crc32c(data) == crc32c(memoryview(data)) == bitwise_crc32c(data)


def test_mask():
    """Rotate right by 15, add 0xa282ead8: ((0xe3069283 >> 15 | 0xe3069283 << 17) + 0xa282ead8) mod 2**32."""
    assert masked_crc32c(b"123456789") == 0xC78AB0E5
