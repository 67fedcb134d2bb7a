# SPDX-License-Identifier: Apache-2.0
"""Frames' quality by camera and stretch, by hand; what cannot be replayed."""

import numpy as np
import pytest

from worldenv_jax.errors import WorldEnvError
from worldenv_jax.training.open_loop import OpenLoop, hand_quality, quality_by_camera, replay_open_loop


def test_rows_by_hand():
    """A success of 4 steps, a failure of 2; the first camera is off by 10, then by 20, the second by 5."""
    truth = np.full((2, 4, 2, 16, 16, 3), 100, np.uint8)
    imagined = truth.copy()
    imagined[:, :2, 0] += 10
    imagined[:, 2:, 0] += 20
    imagined[:, :, 1] += 5
    valid = np.array([[True] * 4, [True, True, False, False]])
    hand = np.zeros((2, 4, 8), np.float32), np.zeros((2, 4, 8), np.float32), np.zeros((2, 4), bool)
    replayed = OpenLoop(truth[:, 0] - 50, truth, imagined, valid, np.array([True, False]), *hand)
    rows = {(row["outcome"], row["camera"]): row for row in quality_by_camera(replayed, stretch=2)}
    assert len(rows) == 6 and all(row["episodes"] == 1 for row in rows.values())
    db = lambda error: 20 * np.log10(255 / error)
    first = rows["success", 0]["simulator"]
    np.testing.assert_allclose(first["psnr_by_stretch"], [db(10), db(20)])
    np.testing.assert_allclose(first["psnr"], (db(10) + db(20)) / 2)
    np.testing.assert_allclose(rows["success", None]["simulator"]["psnr_by_stretch"][0], (db(10) + db(5)) / 2)
    np.testing.assert_allclose(rows["failure", 0]["copy_last_frame"]["psnr"], db(50))
    assert rows["failure", 1]["simulator"]["psnr_by_stretch"] == [pytest.approx(db(5)), None]
    assert 0 < rows["success", 1]["simulator"]["ssim"] <= 1
    imagined[:, ::2] = 0  # with a stride of 2 not frames of their own
    of_two = quality_by_camera(replayed._replace(frame_stride=2), stretch=2)
    (row,) = (row for row in of_two if (row["outcome"], row["camera"]) == ("success", 0))
    np.testing.assert_allclose(row["simulator"]["psnr_by_stretch"], [db(10), db(20)])


def test_hand_and_grasps_by_hand():
    """Five episodes close the hand at step 2, two of them on something; the last but one opens it again too soon."""
    frames, steps = np.zeros((5, 1, 1, 16, 16, 3), np.uint8), 20
    true, imagined, closing = np.zeros((5, steps, 8)), np.zeros((5, steps, 8)), np.zeros((5, steps), bool)
    closing[:, 2:] = True
    closing[3, 10:] = False
    true[:, 14, 6:] = np.array([0.02, 0.015, 0.001, 0.02, 0.0])[:, None] * [1, -1]
    imagined[:, 14, 6:] = np.array([0.02, 0.005, 0.01, 0.0, 0.0])[:, None] * [1, -1]
    imagined[:, 9, 2] = 0.03
    replayed = OpenLoop(
        frames[:, 0], frames, frames, np.ones((5, steps), bool), np.ones(5, bool), true, imagined, closing
    )
    quality = hand_quality(replayed, stretch=10)
    np.testing.assert_allclose(quality["position"], [0.03, 0.0], atol=1e-6)
    assert quality["grasps"] == 4 and quality["held"] == 0.5
    assert quality["grasp_auroc"] == 0.75  # held 0.04, 0.01 against 0.02, 0.0: three of four pairs in order
    all_held = replayed._replace(true_proprio=true + np.array([0.0] * 6 + [0.02, -0.02]))
    assert hand_quality(all_held)["held"] == 1.0 and hand_quality(all_held)["grasp_auroc"] is None  # JSON has no NaN
    cut = replayed._replace(valid=np.arange(steps) < np.full((5, 1), 14))
    assert hand_quality(cut)["grasps"] == 0 and hand_quality(cut)["grasp_auroc"] is None


def test_nothing_to_replay():
    with pytest.raises(WorldEnvError, match="no held-out episodes"):
        replay_open_loop(None, {}, [])
