# SPDX-License-Identifier: Apache-2.0
"""Motions of the hand as generators of environment actions: go there, wait, close, back off.

A motion yields one action [7] per control step and reads the scene again after it, so disturbances (exploration noise,
a slipping object) are corrected as they appear. `yield from` returns what the motion reports.
"""

from collections.abc import Callable, Generator

import numpy as np

from worldenv_jax.envs.libero.scene import Scene, rotation_vector

OPEN, CLOSE = -1.0, 1.0
_METRES_PER_UNIT, _RADIANS_PER_UNIT = 0.05, 0.5  # scale of an OSC_POSE command
_GAIN = 1.6  # position command per remaining distance: the controller does not reach its goal within a step
_TURN_LIMIT = 0.6
_PROGRESS = 0.002  # metres (or decimetre-radians) that count as getting nearer

Motion = Generator[np.ndarray, None, None]


class SkillFailed(Exception):
    """A skill cannot go on; the expert decides what to do next."""


def pose_command(
    distance: np.ndarray,
    rotation_error: np.ndarray,
    gripper: float,
    speed: float = 1.0,
    turn_speed: float = _TURN_LIMIT,
    gain: float = _GAIN,
) -> np.ndarray:
    """One action [7] towards a pose, direction kept when a limit is reached.

    Args:
      distance: [3], remaining way in metres.
      rotation_error: [3], remaining rotation as an axis-angle vector.
      gripper: OPEN or CLOSE.
      speed: largest position command, in [0, 1].
      turn_speed: largest rotation command, in [0, 1].
      gain: position command per 5 cm.
    """
    move, turn = gain * distance / _METRES_PER_UNIT, rotation_error / _RADIANS_PER_UNIT
    move = move * min(1.0, speed / max(np.abs(move).max(), 1e-9))
    turn = turn * min(1.0, turn_speed / max(np.abs(turn).max(), 1e-9))
    return np.concatenate([move, turn, [gripper]])


class Hand:
    """The robot's hand in a scene."""

    def __init__(self, scene: Scene):
        self.scene = scene
        self.gripper = OPEN

    def toward(self, position: np.ndarray, rotation: np.ndarray | None, **limits) -> np.ndarray:
        """One action towards a pose; None keeps the rotation free (zero command)."""
        scene = self.scene
        error = np.zeros(3) if rotation is None else rotation_vector(rotation @ scene.hand_rotation.T)
        return pose_command(position - scene.hand, error, self.gripper, **limits)

    def go(
        self,
        position: np.ndarray | Callable[[], np.ndarray],
        rotation: np.ndarray | None = None,
        *,
        near: float = 0.008,
        near_angle: float = 0.06,
        speed: float = 1.0,
        steps: int = 80,
        patience: int = 12,
        gripper: float | None = None,
    ) -> Generator[np.ndarray, None, bool]:
        """Moves to a pose; returns whether it arrived (False: steps or patience used up).

        Args:
          position: [3], or a function that gives it anew every step (to follow an object).
          rotation: [3, 3] or None for any.
          near, near_angle: when it counts as there, m and rad.
          speed: largest position command, in [0, 1].
          steps: after how many steps to stop.
          patience: after how many steps without getting nearer to stop.
          gripper: new gripper command, kept from then on.
        """
        self.gripper = self.gripper if gripper is None else gripper
        history = []
        for _ in range(steps):
            target = position() if callable(position) else position
            distance = np.linalg.norm(target - self.scene.hand)
            angle = 0.0
            if rotation is not None:
                angle = np.linalg.norm(rotation_vector(rotation @ self.scene.hand_rotation.T))
            if distance < near and angle < near_angle:
                return True
            history.append(distance + 0.1 * angle)
            if len(history) > patience and history[-patience] - history[-1] < _PROGRESS:
                return False
            yield self.toward(target, rotation, speed=speed)
        return False

    def wait(self, steps: int, gripper: float | None = None) -> Motion:
        """Stands still."""
        self.gripper = self.gripper if gripper is None else gripper
        for _ in range(steps):
            yield np.array([0.0] * 6 + [self.gripper])

    def close(self, position: np.ndarray, rotation: np.ndarray, steps: int = 14) -> Motion:
        """Closes the fingers at a pose until they stop moving."""
        self.gripper = CLOSE
        before = self.scene.opening
        for step in range(steps):
            yield self.toward(position, rotation, speed=0.3, turn_speed=0.3)
            opening = self.scene.opening
            if step >= 3 and abs(before - opening) < 0.0012:
                break
            before = opening
        yield from self.wait(1)

    def back_off(self, offset: np.ndarray, steps: int = 20, near: float = 0.03) -> Motion:
        """Moves by `offset` [3] from where it is, with open fingers."""
        yield from self.go(self.scene.hand + offset, near=near, steps=steps, gripper=OPEN)
