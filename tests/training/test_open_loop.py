# SPDX-License-Identifier: Apache-2.0
"""Frames' quality by camera and stretch, by hand; what cannot be replayed."""

import numpy as np
import pytest

from worldenv_jax.errors import WorldEnvError
from worldenv_jax.training.open_loop import OpenLoop, quality_by_camera, replay_open_loop


def test_rows_by_hand():
    """A success of 4 steps, a failure of 2; the first camera is off by 10, then by 20, the second by 5."""
    truth = np.full((2, 4, 2, 16, 16, 3), 100, np.uint8)
    imagined = truth.copy()
    imagined[:, :2, 0] += 10
    imagined[:, 2:, 0] += 20
    imagined[:, :, 1] += 5
    valid = np.array([[True] * 4, [True, True, False, False]])
    replayed = OpenLoop(truth[:, 0] - 50, truth, imagined, valid, np.array([True, False]))
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


def test_nothing_to_replay():
    with pytest.raises(WorldEnvError, match="no held-out episodes"):
        replay_open_loop(None, {}, [])
