# SPDX-License-Identifier: Apache-2.0
"""PSNR and SSIM against hand-computed numbers and a direct scipy computation; open-loop figures by hand."""

import math

import numpy as np
import pytest

from worldenv_jax.evaluation import video_quality

BLACK = np.zeros((16, 16, 3), np.uint8)


def noise_images(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_psnr_by_hand():
    # Every pixel off by 5: 20 log10(255 / 5) = 34.1514 dB.
    assert video_quality.psnr(BLACK, BLACK + 5) == pytest.approx(34.1514, abs=1e-4)
    # One channel of one pixel off by 255 among 768 values: 10 log10(768) = 28.8536 dB.
    one = BLACK.copy()
    one[3, 4, 1] = 255
    assert video_quality.psnr(BLACK, one) == pytest.approx(28.8536, abs=1e-4)


def test_psnr_of_equal_images_is_finite():
    assert video_quality.psnr(BLACK, BLACK) == pytest.approx(10 * math.log10(255**2 * 12))


def test_ssim_of_constant_images_by_hand():
    # No variance: (2 a b + C1) / (a^2 + b^2 + C1), C1 = 2.55^2 = 6.5025, a = 100, b = 120.
    expected = (2 * 100 * 120 + 6.5025) / (100**2 + 120**2 + 6.5025)
    assert video_quality.ssim(BLACK + 100, BLACK + 120) == pytest.approx(expected, abs=1e-12)


def test_ssim_agrees_with_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    x = noise_images(0, 20, 27, 3)
    y = np.clip(x.astype(int) + np.random.default_rng(1).integers(-60, 60, x.shape), 0, 255).astype(np.uint8)
    values = []
    for channel in range(3):
        a, b = x[..., channel].astype(float), y[..., channel].astype(float)
        # truncate = 3.5 gives a radius of 5 pixels, that is 11 taps; the border of 5 pixels is left out.
        blur = lambda image: ndimage.gaussian_filter(image, 1.5, truncate=3.5)[5:-5, 5:-5]
        ma, mb = blur(a), blur(b)
        va, vb, cov = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
        c1, c2 = 2.55**2, 7.65**2
        values.append(((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())
    assert video_quality.ssim(x, y) == pytest.approx(np.mean(values), abs=1e-12)


def test_leading_axes_are_independent():
    x, y = noise_images(0, 7, 11, 2, 12, 13, 3), noise_images(1, 7, 11, 2, 12, 13, 3)
    assert video_quality.ssim(x, y).shape == (7, 11, 2)
    assert video_quality.ssim(x, y)[5, 3, 1] == pytest.approx(video_quality.ssim(x[5, 3, 1], y[5, 3, 1]))
    assert video_quality.psnr(x, y)[5, 3, 1] == pytest.approx(video_quality.psnr(x[5, 3, 1], y[5, 3, 1]))


def test_bad_images_are_refused():
    with pytest.raises(ValueError, match=r"float64 \[16, 16, 3\]"):
        video_quality.psnr(BLACK.astype(float), BLACK)
    with pytest.raises(ValueError, match="11 x 11 pixels, got 8 x 8"):
        video_quality.ssim(BLACK[:8, :8], BLACK[:8, :8])


def fading_episode(levels):
    """Frames [1, N, 1, 16, 16, 3] of the given grey levels."""
    return np.stack([BLACK + level for level in levels])[None, :, None]


def test_open_loop_quality_by_hand():
    context = fading_episode([0, 0])[:, 0].repeat(2, 0)
    truth = fading_episode([5, 10, 20]).repeat(2, 0)
    simulator = fading_episode([5, 11, 25]).repeat(2, 0)
    valid = np.array([[True, True, True], [True, True, False]])
    succeeded = np.array([False, True])
    figures = video_quality.open_loop_quality(context, truth, valid, succeeded, {"simulator": simulator})
    best, one, five = 10 * math.log10(255**2 * 12), 20 * math.log10(255), 20 * math.log10(255 / 5)
    assert figures["failure"]["simulator"]["psnr_per_step"] == pytest.approx([best, one, five])
    assert figures["failure"]["simulator"]["psnr"] == pytest.approx((best + one + five) / 3)
    assert figures["failure"]["simulator"]["drift"] == pytest.approx((best - five) / 2)
    assert figures["success"]["simulator"]["psnr_per_step"] == [pytest.approx(best), pytest.approx(one), None]
    copied = [20 * math.log10(255 / level) for level in (5, 10, 20)]
    assert figures["failure"]["copy_last_frame"]["psnr_per_step"] == pytest.approx(copied)
    assert figures["success"]["copy_last_frame"]["episodes"] == 1


def test_open_loop_quality_without_success_episodes():
    truth = fading_episode([5, 10])
    nobody = np.array([False])
    figures = video_quality.open_loop_quality(truth[:, 0], truth, np.ones((1, 2), bool), nobody, {"simulator": truth})
    assert figures["success"]["simulator"]["psnr"] is None
    assert figures["success"]["simulator"]["episodes"] == 0


def test_open_loop_quality_lists_every_difference():
    truth = fading_episode([5, 10])
    with pytest.raises(ValueError, match="valid: got int64.*succeeded: got bool"):
        video_quality.open_loop_quality(truth[:, 0], truth, np.ones((1, 2), int), np.ones(3, bool), {})


def test_action_sensitivity_by_hand():
    truth = fading_episode([10, 20, 30])
    prediction, other = fading_episode([10, 22, 40]), fading_episode([10, 26, 36])
    figures = video_quality.action_sensitivity(truth, np.ones((1, 3), bool), prediction, other)
    assert figures["change_per_step"] == pytest.approx([0.0, 4.0, 4.0])
    # A tie, a win of the recorded actions, a loss.
    assert figures["preference"] == pytest.approx(0.5)


def test_drift_is_the_slope():
    assert video_quality.drift(np.array([30.0, 28.0, 26.0])) == pytest.approx(2.0)
    assert video_quality.drift(np.array([30.0])) == 0.0
