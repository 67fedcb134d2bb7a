# SPDX-License-Identifier: Apache-2.0
"""Every quantity of the EVAC fixture, within the tolerances of its README."""

import jax
import pytest

from tools.parity.evac import check


@pytest.mark.parity
def test_fixture(fixtures_dir):
    with jax.default_matmul_precision("highest"):
        results = list(check(fixtures_dir / "evac"))
    assert len(results) > 80
    assert not [result for result in results if not result.passed]
