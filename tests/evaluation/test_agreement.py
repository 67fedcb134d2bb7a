# SPDX-License-Identifier: Apache-2.0
"""Agreement between verdicts and outcomes, counted by hand."""

import numpy as np
import pytest

from worldenv_jax.evaluation.agreement import imagination_agreement


def test_agreement_by_hand():
    imagined = np.array([1, 1, 1, 1, 0, 0], bool)
    true = np.array([1, 1, 1, 0, 0, 1], bool)
    figures = imagination_agreement(imagined, true)
    assert figures["counts"] == {"both_success": 3, "false_success": 1, "false_failure": 1, "both_failure": 1}
    assert figures["agreement"]["mean"] == pytest.approx(4 / 6)
    assert figures["false_successes"]["mean"] == pytest.approx(1 / 4)
    assert figures["false_successes"]["episodes"] == 4
    assert figures["false_failures"]["mean"] == pytest.approx(1 / 2)
    assert figures["by_chance"] == pytest.approx(4 / 6 * 4 / 6 + 2 / 6 * 2 / 6)
    assert figures["correlation"] == pytest.approx(np.corrcoef(imagined, true)[0, 1])
    # Wilson 95 % for 1 of 4, by hand: (0.25 + 0.480182) / 1.960365 -+ 0.327251.
    assert figures["false_successes"]["low"] == pytest.approx(0.0456, abs=2e-4)
    assert figures["false_successes"]["high"] == pytest.approx(0.6994, abs=2e-4)


def test_without_imagined_successes():
    figures = imagination_agreement(np.zeros(3, bool), np.zeros(3, bool))
    assert figures["false_successes"] == {"mean": None, "low": None, "high": None, "episodes": 0}
    assert figures["agreement"]["mean"] == 1.0
    assert figures["by_chance"] == 1.0 and figures["correlation"] is None


def test_probabilities_are_refused():
    with pytest.raises(ValueError, match=r"got float64 \[2\] and bool \[2\]"):
        imagination_agreement(np.array([0.2, 0.9]), np.array([False, True]))
