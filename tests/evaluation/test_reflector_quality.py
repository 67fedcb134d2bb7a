# SPDX-License-Identifier: Apache-2.0
"""The figures of a judge against numbers worked out by hand."""

import numpy as np
import pytest

from worldenv_jax.evaluation import reflector_quality as quality

SCORE = np.array([0.9, 0.8, 0.7, 0.6, 0.4, 0.4])
LABEL = np.array([True, False, True, False, True, False])


def test_auroc_counts_pairs():
    # Pairs (positive, negative): 0.9 beats all 3; 0.7 beats 0.6 and 0.4; 0.4 ties with 0.4: (3 + 2 + 0.5) / 9.
    assert quality.auroc(SCORE, LABEL) == pytest.approx(5.5 / 9)
    assert quality.auroc(LABEL.astype(float), LABEL) == 1.0
    assert np.isnan(quality.auroc(SCORE, np.ones(6, bool)))


def test_average_precision_takes_ties_together():
    # Recall steps of 1/3 at precision 1/1 (0.9), 2/3 (0.7), 3/6 (the tie at 0.4).
    assert quality.average_precision(SCORE, LABEL) == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    assert np.isnan(quality.average_precision(SCORE, np.zeros(6, bool)))


def test_error_rates():
    assert quality.error_rates(SCORE, LABEL, 0.5) == pytest.approx((2 / 3, 1 / 3))
    assert quality.error_rates(SCORE, LABEL, 0.8) == pytest.approx((0.0, 2 / 3))  # above, not at, the threshold


def test_calibration_error_with_two_bins():
    # [0, 0.5): 0.4, 0.4 -> confidence 0.4, frequency 0.5. [0.5, 1]: mean 0.75, frequency 0.5.
    confidence, frequency, count = quality.reliability_curve(SCORE, LABEL, 2)
    np.testing.assert_allclose(confidence, [0.4, 0.75])
    np.testing.assert_allclose(frequency, [0.5, 0.5])
    assert count.tolist() == [2, 4]
    assert quality.calibration_error(SCORE, LABEL, 2) == pytest.approx((0.1 * 2 + 0.25 * 4) / 6)
    assert quality.calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0.0


# Success at frame 2: found at 3; alarm at 0; missed; a failed episode with an alarm on padding, one with a real one.
PROBABILITY = np.array([[0.1, 0.2, 0.4, 0.9], [0.6, 0.1, 0.9, 0.9], [0.1] * 4, [0.1, 0.1, 0.1, 0.9], [0.1, 0.7, 0, 0]])
TRUTH = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]], bool)
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]], bool)


def test_detection():
    figures = quality.detection(PROBABILITY, TRUTH, MASK, 0.5)
    expected = {"delay": 1.0, "detected": 1 / 3, "premature": 1 / 3, "false_alarms": 1 / 2}
    assert figures == pytest.approx(expected)


def test_calibration_figures_leave_padding_out():
    figures = quality.calibration_figures(PROBABILITY, TRUTH, MASK, 0.5)
    assert figures["frames"] == 18 and figures["episodes"] == 5
    # 12 failure frames, judged positive: 0.6 and 0.7; 6 success frames, judged negative: 0.4, 0.1, 0.1.
    assert figures["false_positive_rate"] == pytest.approx(2 / 12)
    assert figures["false_negative_rate"] == pytest.approx(3 / 6)
    per_task = quality.figures_per_task([7, 7, 7, 9, 9], PROBABILITY, TRUTH, MASK)
    assert sorted(per_task) == [7, 9]
    assert per_task[9]["false_positive_rate"] == pytest.approx(1 / 6)
    assert np.isnan(per_task[9]["auroc"])


def test_a_clock_knows_task_and_time():
    """Task 3: one of two known episodes is done at the last of 5 steps, the other has only 3; task 7: never done."""
    known = np.array([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    told = quality.clock([7, 3], [3, 3, 7], known, mask, window=1)
    # One done frame of 2 + 1 + 1, and of 1 + 1.
    np.testing.assert_allclose(told, [[0.0] * 5, [0.0, 0.0, 0.0, 1 / 4, 1 / 2]], atol=1e-12)
    whole = quality.clock([3], [3, 3, 7], known, mask, window=8)  # longer than the episodes
    np.testing.assert_allclose(whole, [[1 / 8] * 5])


def test_episodes_are_ranked_by_their_highest_frame():
    label = np.array([[0, 1, 0], [0, 0, 0], [0, 0, 1]], bool)
    mask = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1]], bool)
    probability = np.array([[0.1, 0.6, 0.1], [0.5, 0.3, 0.9], [0.2, 0.4, 0.3]])  # 0.9 is padding
    assert quality.calibration_figures(probability, label, mask)["episode_auroc"] == 0.5


def test_bad_input():
    with pytest.raises(ValueError, match=r"probability \(5, 4\), label \(5, 3\)"):
        quality.calibration_figures(PROBABILITY, TRUTH[:, :3], MASK)
    with pytest.raises(ValueError, match="pass sigmoids"):
        quality.calibration_figures(PROBABILITY * 9, TRUTH, MASK)


def test_threshold_sweep():
    sweep = quality.threshold_sweep(PROBABILITY, TRUTH, MASK, np.array([0.5, 0.65, 0.8]))
    np.testing.assert_allclose(sweep["false_positive_rate"], [2 / 12, 1 / 12, 0.0])
    np.testing.assert_allclose(sweep["premature"], [1 / 3, 0.0, 0.0])
    np.testing.assert_allclose(sweep["detected"], [1 / 3, 2 / 3, 2 / 3])


def test_curves_for_the_report():
    curves = quality.judge_curves(PROBABILITY, TRUTH, MASK)
    assert curves["reliability"]["frames"] == [1, 10, 1, 0, 1, 0, 1, 1, 0, 3]
    assert curves["reliability"]["share"][1] == pytest.approx(2 / 10)  # two of the ten frames judged 0.1
    place = curves["sweep"]["threshold"].index(0.65)
    assert curves["sweep"]["false_positive_rate"][place] == pytest.approx(1 / 12)


def test_threshold_rule():
    assert quality.choose_threshold(PROBABILITY, TRUTH, MASK, 2 / 12) == 0.5
    assert quality.choose_threshold(PROBABILITY, TRUTH, MASK, 1 / 12) == 0.6
    assert quality.choose_threshold(PROBABILITY, TRUTH, MASK, 0.0) == 0.7
    assert quality.choose_threshold(PROBABILITY, TRUTH, MASK, 1.0) == 0.5
    assert quality.choose_threshold(np.ones((1, 2)), np.zeros((1, 2), bool), np.ones((1, 2), bool)) == 0.99


def test_temperature_of_a_known_solution():
    # Logits +-2 of which 3 in 4 are right: the best probability is 3/4, so 2 / T = ln 3.
    logit = np.array([2.0, 2.0, 2.0, 2.0, -2.0, -2.0, -2.0, -2.0])
    label = np.array([1, 1, 1, 0, 0, 0, 0, 1], bool)
    assert quality.fit_temperature(logit, label) == pytest.approx(2.0 / np.log(3.0), rel=1e-6)
    with pytest.raises(ValueError, match="one class only"):
        quality.fit_temperature(logit, np.ones(8, bool))
