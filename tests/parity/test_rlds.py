# SPDX-License-Identifier: Apache-2.0
"""Every number, text and pixel of the RLDS fixture equals what TFDS decodes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.parity import rlds  # noqa: E402

pytestmark = pytest.mark.parity


def test_rlds_fixture(fixtures_dir):
    results = list(rlds.check(fixtures_dir / "rlds"))
    assert len(results) == 57
    assert [result for result in results if not result.passed] == []
