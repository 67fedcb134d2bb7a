# SPDX-License-Identifier: Apache-2.0
"""Whether a closed hand holds something: decided once in a closing, and kept until the hand opens again.

A network that predicts the fingers' opening alone answers doubt with half-closed fingers, which then slip: of what
imagined hands had grasped a fifth was lost within twenty steps, of what true ones had a twentieth. So the arm is told
which of the two happens (`ArmMotion.grasps` decides in a roll-out, the recording in training), and moves accordingly.
A stray command to open, too short to open the hand, changes nothing: in LIBERO's recordings it never does.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from worldenv_jax.types import Array

DECIDES = 6  # commands to close in a row, after which it is decided
SETTLED = 12  # ... after which a recording shows what was decided
HELD = 0.125  # share of the fingers' distance from which on something is between them


class Grip(NamedTuple):
    """What is known of a hand's closing."""

    closing: Array  # float32 [...], commands to close in a row
    holds: Array  # float32 [...]: 1 holds something, -1 closed on nothing, 0 open or not decided


def no_grip(*shape: int) -> Grip:
    """Of a hand that has not closed yet."""
    return Grip(jnp.zeros(shape), jnp.zeros(shape))


def advance_grip(grip: Grip, command: Array, is_open: Array, outcome: Array) -> Grip:
    """The grip after a step.

    Args:
        grip: before it.
        command: float [...], the gripper's: above 0 closes.
        is_open: bool [...], the hand after the step.
        outcome: float [...], 1 or -1: what is decided if it is decided now.
    """
    closing = jnp.where(command > 0, grip.closing + 1.0, 0.0)
    decided = jnp.where((closing == DECIDES) & (grip.holds == 0), outcome, grip.holds)
    return Grip(closing, jnp.where(is_open, 0.0, decided))


def recorded_grips(opening: np.ndarray, commands: np.ndarray, is_open: np.ndarray) -> Grip:
    """The grip before every action of an episode and after the last, as the recording shows it.

    Something that slips is not held from then on. A closing that ends before it has `SETTLED` decides nothing.

    Args:
        opening: float [T + 1], share of the fingers' distance.
        commands: float [T], the gripper's.
        is_open: bool [T + 1].

    Returns: NumPy leaves, float32 [T + 1].
    """
    closing, holds = np.zeros(len(opening), np.float32), np.zeros(len(opening), np.float32)
    for t, command in enumerate(commands, 1):
        closing[t] = closing[t - 1] + 1 if command > 0 else 0
        holds[t] = holds[t - 1]
        settled = t + SETTLED - DECIDES
        settles = settled < len(opening) and (commands[t:settled] > 0).all()
        if closing[t] == DECIDES and holds[t] == 0 and settles:
            holds[t] = 1.0 if opening[settled] > HELD else -1.0
        elif closing[t] > SETTLED and holds[t] > 0 and opening[t] <= HELD:
            holds[t] = -1.0
        if is_open[t]:
            holds[t] = 0.0
    return Grip(closing, holds)
