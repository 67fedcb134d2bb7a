# SPDX-License-Identifier: Apache-2.0
"""Proprioception advanced from actions, against hand-computed motions and recorded ones."""

import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.simulator import Kinematics, advance_proprio, fit_kinematics, proprioception_error
from worldenv_jax.simulator.proprioception import relative_pose

START = np.array([[0.1, 0.2, 0.3, 0.0, 0.0, 0.0, 0.04, -0.04]], np.float32)


def _episodes(count: int = 6, steps: int = 30):
    """A hand with gain 0.04, momentum 0.3, and fingers of 1 cm per step, in float64."""
    rng = np.random.default_rng(0)
    proprios, actions = [], []
    for _ in range(count):
        command = np.zeros((steps, 7))
        command[:, :3] = rng.uniform(-1, 1, (steps, 3))
        command[:, 6] = np.where(np.arange(steps) < steps // 2, -1.0, 1.0)
        position, motion, finger = rng.uniform(-0.1, 0.1, 3), np.zeros(3), 0.04
        rows = [np.r_[position, np.zeros(3), finger, -finger]]
        for action in command:
            motion = 0.04 * action[:3] + 0.3 * motion
            position = position + motion
            finger = np.clip(finger - 0.01 * action[6], 0.0, 0.04)
            rows.append(np.r_[position, np.zeros(3), finger, -finger])
        proprios.append(np.array(rows, np.float32))
        actions.append(command.astype(np.float32))
    return proprios, actions


def test_commanded_motion():
    actions = np.array([[[1, 0, -1, 0, 0, 0.5, 1], [0, 0, 0, 0, 0, 0.5, 1]]], np.float32)
    after = np.asarray(advance_proprio(Kinematics.osc_pose(), START, START, actions))[0]
    np.testing.assert_allclose(after[:, :3], [[0.15, 0.2, 0.25]] * 2, atol=1e-6)
    np.testing.assert_allclose(after[:, 3:6], [[0, 0, 0.25], [0, 0, 0.5]], atol=1e-6)
    np.testing.assert_allclose(after[:, 6:], [[0.03, -0.03], [0.02, -0.02]], atol=1e-6)


def test_rotation_is_applied_in_the_base_frame():
    """A quarter turn about z, then a quarter turn about x, moves the hand's x axis to y and on to z."""
    kinematics = Kinematics.osc_pose()._replace(gain=jnp.full(6, np.pi / 2))
    actions = np.zeros((1, 2, 7), np.float32)
    actions[0, 0, 5] = actions[0, 1, 3] = 1.0
    after = np.asarray(advance_proprio(kinematics, START, START, actions))[0, 1, 3:6]
    # The rotation that maps x -> z, y -> x, z -> y: 120 degrees about (-1, 1, 1) has the other sense.
    angle = np.linalg.norm(after)
    axis = after / angle
    rotated = np.cos(angle) * np.eye(3)[0] + np.sin(angle) * np.cross(axis, np.eye(3)[0])
    rotated += (1 - np.cos(angle)) * axis * axis[0]
    np.testing.assert_allclose(rotated, [0, 0, 1], atol=1e-5)


def test_relative_pose_near_a_half_turn():
    """The hand of LIBERO points down: its axis-angle vector lies near pi and flips sign."""
    before = np.array([0, 0, 0, np.pi - 0.01, 0, 0, 0, 0], np.float32)
    after = np.array([0, 0, 0, -(np.pi - 0.01), 0, 0, 0, 0], np.float32)
    np.testing.assert_allclose(relative_pose(jnp.asarray(after), jnp.asarray(before))[3:], [0.02, 0, 0], atol=1e-4)


def test_fit_recovers_the_recorded_world():
    proprios, actions = _episodes()
    kinematics = fit_kinematics(proprios, actions)
    np.testing.assert_allclose(kinematics.gain[:3], 0.04, rtol=1e-3)
    np.testing.assert_allclose(kinematics.momentum[:3], 0.3, rtol=1e-2)
    np.testing.assert_allclose(kinematics.finger_open, [0.04, -0.04], atol=1e-6)
    assert float(kinematics.finger_speed) == pytest.approx(0.01, rel=1e-3)
    error = proprioception_error(kinematics, proprios, actions, 20)
    assert error["position"] < 1e-3 and error["fingers"] < 1e-4 and error["episodes"] == 6


def test_errors_name_the_lengths():
    with pytest.raises(ValueError, match="T \\+ 1 proprios"):
        fit_kinematics([np.zeros((3, 8))], [np.zeros((3, 7))])
    with pytest.raises(ValueError, match="no episode has 9 steps"):
        proprioception_error(Kinematics.osc_pose(), [np.zeros((3, 8))], [np.zeros((2, 7))], 9)
