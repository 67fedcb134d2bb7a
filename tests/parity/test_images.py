# SPDX-License-Identifier: Apache-2.0
"""Every quantity of the image fixtures."""

import jax

from tools.parity import images


def test_every_quantity_is_within_tolerance(fixtures_dir):
    with jax.default_matmul_precision("highest"):
        results = list(images.check(fixtures_dir / "images"))
    assert len(results) == 25
    assert not [result for result in results if not result.passed]
