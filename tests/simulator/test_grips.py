# SPDX-License-Identifier: Apache-2.0
"""What a recording says of a hand's grasps, by hand, and that a roll-out counts alike."""

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.simulator.grips import DECIDES, SETTLED, Grip, advance_grip, no_grip, recorded_grips


def _recorded(opening, commands):
    opening = np.asarray(opening, np.float64)
    return recorded_grips(opening, np.asarray(commands), opening > 0.9)


def _episode(end: float, closed: int, after: int = 4):
    """Open for 3 steps, then `closed` commands to close: the fingers close by a tenth per step, down to `end`."""
    commands = np.concatenate([-np.ones(3), np.ones(closed), -np.ones(after)])
    opening = [1.0]
    for command in commands:
        opening.append(max(end, opening[-1] - 0.1) if command > 0 else min(1.0, opening[-1] + 0.2))
    return opening, commands


def test_a_grasp_holds_what_is_left_between_the_fingers():
    for end, outcome in ((0.5, 1), (0.02, -1)):
        grip = _recorded(*_episode(end, 16))
        assert grip.closing.tolist() == [0] * 4 + list(range(1, 17)) + [0] * 4
        first = 3 + DECIDES  # index 3 is the last frame before the closing
        assert not grip.holds[:first].any() and (grip.holds[first : 3 + 16 + 1] == outcome).all()
        opened = np.asarray(_episode(end, 16)[0]) > 0.9
        assert (grip.holds[opened] == 0).all()


def test_a_short_closing_decides_nothing():
    assert not _recorded(*_episode(0.5, SETTLED - 1)).holds.any()
    opening, commands = _episode(0.5, 16, after=0)
    assert _recorded(opening, commands).holds.any()
    assert not _recorded(opening[:-6], commands[:-6]).holds.any()  # the episode ends before it shows


def test_what_slips_is_not_held_any_more():
    opening, commands = _episode(0.5, 20)
    opening[3 + 15 : 3 + 21] = [0.1] * 6
    holds = _recorded(opening, commands).holds
    assert (holds[3 + DECIDES : 3 + 15] == 1).all() and (holds[3 + 15 : 3 + 20] == -1).all()


def test_a_rollout_counts_as_the_recording_does():
    rng = np.random.default_rng(0)
    for end in (0.5, 0.02):
        opening, commands = _episode(end, 14, after=8)
        opening = np.concatenate([opening, np.clip(opening[1:] + 0.01 * rng.random(len(commands)), 0, 1)])
        commands = np.concatenate([commands, commands])
        expected, outcome = _recorded(opening, commands), 1.0 if end == 0.5 else -1.0

        def step(grip, inputs, outcome=outcome):
            grip = advance_grip(grip, *inputs, jnp.full(1, outcome))
            return grip, grip

        inputs = commands[:, None].astype(np.float32), (opening[1:] > 0.9)[:, None]
        _, grips = jax.lax.scan(step, no_grip(1), inputs)
        np.testing.assert_array_equal(grips.closing[:, 0], expected.closing[1:])
        np.testing.assert_array_equal(grips.holds[:, 0], expected.holds[1:])


def test_a_stray_command_to_open_does_not_decide_anew():
    """One command to open is too short: the hand stays closed and holds what it held, whatever is foretold then."""
    opening = [1.0] + [0.5] * 29
    commands = np.ones(29)
    commands[14] = -1.0
    expected = _recorded(opening, commands)
    assert expected.closing[15] == 0 and (expected.holds[DECIDES:] == 1).all()
    grip = no_grip(1)
    for command in commands:
        outcome = 1.0 if grip.closing[0] < 14 and not grip.holds[0] else -1.0
        grip = advance_grip(grip, jnp.full(1, command), jnp.zeros(1, bool), jnp.full(1, outcome))
    assert grip.closing[0] == 14 and grip.holds[0] == 1
    slips = 15 + SETTLED - 3  # while the hand closes for the second time
    opening[slips:] = [0.02] * (len(opening) - slips)
    holds = _recorded(opening, commands).holds
    assert (holds[DECIDES : 15 + SETTLED - 2] == 1).all() and (holds[15 + SETTLED + 1 :] == -1).all()


def test_no_grip_is_that_of_an_open_hand():
    grip = advance_grip(no_grip(2), -np.ones(2), np.ones(2, bool), np.ones(2))
    assert isinstance(grip, Grip) and not np.any(grip.closing) and not np.any(grip.holds)
