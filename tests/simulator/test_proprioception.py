# SPDX-License-Identifier: Apache-2.0
"""Proprioception advanced from actions, against hand-computed motions and recorded ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from worldenv_jax.simulator import (
    Kinematics,
    MotionBatch,
    SimulatorConfig,
    advance_proprio,
    arm_motion_loss,
    episode_grips,
    fit_kinematics,
    is_empty,
    last_grasps,
    no_grip,
    proprioception_error,
)
from worldenv_jax.simulator.arm_motion import ArmContext, init_arm_motion
from worldenv_jax.simulator.conditioning import make_glance
from worldenv_jax.simulator.grips import Grip
from worldenv_jax.simulator.proprioception import ground, relative_pose, workspace
from worldenv_jax.types import Camera

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
    after = np.asarray(advance_proprio(Kinematics.osc_pose(), START, START, actions).proprio)[0]
    np.testing.assert_allclose(after[:, :3], [[0.15, 0.2, 0.25]] * 2, atol=1e-6)
    np.testing.assert_allclose(after[:, 3:6], [[0, 0, 0.25], [0, 0, 0.5]], atol=1e-6)
    np.testing.assert_allclose(after[:, 6:], [[0.03, -0.03], [0.02, -0.02]], atol=1e-6)


def test_an_empty_hand_has_a_centimetre_between_its_fingers_at_most():
    """robosuite's open 8 cm apart, and an eighth of that counts as nothing."""
    hands = np.zeros((4, 8), np.float32)
    hands[:, 6] = 0.0, 0.0049, 0.0051, 0.04
    hands[:, 7] = -hands[:, 6]
    assert is_empty(Kinematics.osc_pose(), hands).tolist() == [True, True, False, False]


def test_rotation_is_applied_in_the_base_frame():
    """A quarter turn about z, then a quarter turn about x, moves the hand's x axis to y and on to z."""
    kinematics = Kinematics.osc_pose()._replace(gain=jnp.full(6, np.pi / 2))
    actions = np.zeros((1, 2, 7), np.float32)
    actions[0, 0, 5] = actions[0, 1, 3] = 1.0
    after = np.asarray(advance_proprio(kinematics, START, START, actions).proprio)[0, 1, 3:6]
    # The rotation that maps x -> z, y -> x, z -> y: 120 degrees about (-1, 1, 1) has the other sense.
    angle = np.linalg.norm(after)
    axis = after / angle
    rotated = np.cos(angle) * np.eye(3)[0] + np.sin(angle) * np.cross(axis, np.eye(3)[0])
    rotated += (1 - np.cos(angle)) * axis * axis[0]
    np.testing.assert_allclose(rotated, [0, 0, 1], atol=1e-5)


def test_the_axis_does_not_jump_at_a_half_turn():
    """LIBERO's hand points down, half a turn about x: robosuite's angles go on beyond pi, and so must imagined ones."""
    start = START.copy()
    start[0, 3] = 3.0
    actions = np.zeros((1, 4, 7), np.float32)
    actions[0, :, 3] = 0.1, 0.1, 0.1, -0.2  # 0.5 rad each
    advance = lambda now, actions: np.asarray(advance_proprio(Kinematics.osc_pose(), start, now, actions).proprio)
    one_by_one = [start]
    for step in range(4):
        one_by_one.append(advance(one_by_one[-1], actions[:, step : step + 1])[:, 0])
    at_once = advance(start, actions)[0]
    for after in (at_once, np.concatenate(one_by_one[1:])):
        np.testing.assert_allclose(after[:, 3:6], [[x, 0, 0] for x in (3.05, 3.1, 3.15, 3.05)], atol=1e-5)


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
    assert max(_last_error(kinematics, proprios, actions).values()) < 1e-3


def _last_error(kinematics, proprios, actions, arm_motion=None, pictures=None):
    """What `proprioception_error` says of the last step of open-loop predictions."""
    truth, commands = np.stack(proprios), np.stack(actions)
    arm = None if arm_motion is None else _arm(arm_motion, pictures)
    predicted = advance_proprio(kinematics, truth[:, 0], truth[:, 0], commands, arm).proprio
    errors = proprioception_error(predicted, truth[:, 1:], np.ones(commands.shape[:2], bool))
    return {name: error[-1] for name, error in errors.items()}


def test_proprioception_error_by_hand():
    recorded = np.zeros((2, 3, 8), np.float32)
    predicted = recorded.copy()
    predicted[0, :, 0] = 0.03  # 3 and 4 cm along two axes, 5 cm
    predicted[0, :, 1] = 0.04
    predicted[1, :, 5] = 0.2
    predicted[0, 0, 6:] = 0.01
    error = proprioception_error(predicted, recorded, np.array([[True, True, False], [True, False, False]]))
    np.testing.assert_allclose(error["position"], [0.025, 0.05, np.nan], atol=1e-6)
    np.testing.assert_allclose(error["rotation"], [0.1, 0.0, np.nan], atol=1e-6)
    np.testing.assert_allclose(error["fingers"], [0.005, 0.0, np.nan], atol=1e-6)


def test_where_the_hand_was_last_open():
    """Fingers of 8 cm: 7 cm is not open, and what is held stays held when they part a little. In two pieces, too."""
    opening = np.array([[0.08, 0.079, 0.07, 0.04, 0.05, 0.04, 0.075, 0.08, 0.06, 0.02], [0.05] * 10], np.float32)
    proprio = np.zeros((2, 10, 8), np.float32)
    proprio[..., 0] = np.arange(10)
    proprio[..., 6] = 0.5 * opening
    proprio[..., 7] = -0.5 * opening
    expected = [[0, 1, 1, 1, 1, 1, 6, 7, 7, 7], [0] * 10]  # never open: where it was at the start
    whole = np.asarray(last_grasps(Kinematics.osc_pose(), proprio[:, 0], proprio))
    np.testing.assert_array_equal(whole[..., 0], expected)
    np.testing.assert_array_equal(whole[0, 5], proprio[0, 1])
    rest = last_grasps(Kinematics.osc_pose(), whole[:, 3], proprio[:, 4:])
    np.testing.assert_array_equal(rest, whole[:, 4:])


def test_the_ground_is_where_hands_have_been_lowest():
    endless = Kinematics.osc_pose()
    assert ground(endless) == 0.0
    assert ground(endless._replace(position_low=np.array([-0.2, -0.3, 0.875], np.float32))) == 0.875


def test_a_workspace_may_be_endless_or_higher_than_a_metre():
    endless = Kinematics.osc_pose()
    np.testing.assert_array_equal(workspace(endless), [[-1.0] * 3, [1.0] * 3])
    corners = np.array([[-1.5, -0.3, 0.9], [0.1, 0.3, 1.25]], np.float32)
    on_table = endless._replace(position_low=corners[0], position_high=corners[1])
    np.testing.assert_array_equal(workspace(on_table), corners)


def test_errors_name_the_lengths():
    with pytest.raises(ValueError, match="T \\+ 1 proprios"):
        fit_kinematics([np.zeros((3, 8))], [np.zeros((3, 7))])


def _lagging_episodes(count=24, steps=24):
    """An arm of second order that answers a command one step late, and a table at z = 0: float64."""
    rng = np.random.default_rng(0)
    proprios, actions = [], []
    for _ in range(count):
        command = np.repeat(rng.uniform(-1, 1, (steps // 4, 7)), 4, axis=0)
        command[:, 6] = -1.0
        position, speed = np.array([*rng.uniform(-0.1, 0.1, 2), 0.05]), np.zeros(3)
        rows, last = [position], np.zeros(3)
        for action in command:
            speed = 0.5 * speed + 0.005 * last
            last = action[:3]
            position = position + speed
            position[2] = max(position[2], 0.0)
            rows.append(position)
        rest = np.tile([np.pi, 0, 0, 0.04, -0.04], (steps + 1, 1))
        proprios.append(np.concatenate([rows, rest], axis=1).astype(np.float32))
        actions.append(command.astype(np.float32))
    return proprios, actions


PICTURE = 1, 2, 2, 3  # V, h, w, c
NO_GLANCES = SimulatorConfig.debug()


def _arm(params, pictures, previous_action=None, grip=None):
    batch = len(pictures)
    previous_action = np.zeros((batch, 7), np.float32) if previous_action is None else previous_action
    return ArmContext(params, previous_action, pictures, no_grip(batch) if grip is None else grip)


def _motion_batch(kinematics, proprios, actions, pictures):
    """Whole episodes as stretches."""
    grips = [episode_grips(kinematics, *episode) for episode in zip(proprios, actions)]
    holds = np.stack([grip.holds for grip in grips])
    still = np.zeros((len(actions), 7), np.float32)
    grip = no_grip(len(actions))
    return MotionBatch(proprios, actions, proprios[:, 0], still, pictures, grip, holds[:, 1:], camera=None)


def _fresh_arm_motion():
    return init_arm_motion(16, jax.random.key(0), PICTURE)


def _pictures(batch: int, count: int = 1):
    return np.random.default_rng(5).normal(size=(batch, count, *PICTURE)).astype(np.float32)


def _train(params, kinematics, batch, config=NO_GLANCES):
    optimizer = optax.adam(1e-2)

    @jax.jit
    def update(params, state, key):
        gradient = jax.grad(lambda p: arm_motion_loss(config, p, key, batch, kinematics)[0])(params)
        changes, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, changes), state

    state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(2), 300):
        params, state = update(params, state, key)
    return params


def test_untrained_arm_motion_is_the_linear_step():
    proprios, actions = _episodes()
    kinematics = fit_kinematics(proprios, actions)
    start, commands = proprios[0][None, 3], actions[0][None, 3:]
    linear = advance_proprio(kinematics, proprios[0][None, 2], start, commands).proprio
    arm = _arm(_fresh_arm_motion(), _pictures(1), actions[0][None, 2])
    same = advance_proprio(kinematics, proprios[0][None, 2], start, commands, arm).proprio
    np.testing.assert_allclose(same, linear, atol=1e-6)


def test_arm_motion_without_a_recorded_workspace():
    actions = np.ones((1, 3, 7), np.float32)
    params = _fresh_arm_motion()
    params["out"]["kernel"] += 0.01
    arm = _arm(params, _pictures(1, 3))
    assert np.isfinite(advance_proprio(Kinematics.osc_pose(), START, START, actions, arm).proprio).all()


def test_arm_motion_learns_what_the_linear_step_misses():
    proprios, actions = _lagging_episodes(84)
    kinematics = fit_kinematics(proprios, actions)
    stacked, blank = (np.stack(proprios[:80]), np.stack(actions[:80])), np.zeros((80, 1, *PICTURE), np.float32)
    batch = _motion_batch(kinematics, *stacked, blank)
    params = _train(_fresh_arm_motion(), kinematics, batch)
    test = proprios[80:], actions[80:]
    linear, learned = _last_error(kinematics, *test), _last_error(kinematics, *test, params, blank[:4])
    assert learned["position"] < 0.5 * linear["position"] and learned["rotation"] < 1e-2


def test_arm_motion_sees_what_stops_the_fingers():
    """Half of the episodes have something between the fingers; only the picture of the chunk before tells."""
    proprios, actions = _episodes(84)
    pictures = _pictures(84, 3)
    held = np.arange(84) % 2 == 0
    pictures[held, :, 0, 0, 0, 0], pictures[~held, :, 0, 0, 0, 0] = 1.0, -1.0
    stacked = np.stack(proprios), np.stack(actions)
    fingers = stacked[0][..., 6:]
    fingers[held] = np.array([1, -1]) * np.maximum(np.abs(fingers[held]), 0.025)
    kinematics = fit_kinematics(*stacked)
    batch = _motion_batch(kinematics, *(x[:80] for x in stacked), pictures[:80])
    params = _train(_fresh_arm_motion(), kinematics, batch)
    test = [x[80:] for x in stacked]
    error = lambda seen: _last_error(kinematics, *test, params, seen)["fingers"]
    assert error(pictures[80:]) < 0.004 and error(-pictures[80:]) > 0.015


def test_the_grasp_is_foretold_from_a_glance():
    """What the photograph shows where the hand closes decides; beside the hand it shows the opposite."""
    stacked = [np.stack(part) for part in _episodes(84)]
    held = np.arange(84) % 2 == 0
    fingers = stacked[0][..., 6:]
    fingers[held] = np.array([1, -1]) * np.maximum(np.abs(fingers[held]), 0.025)
    kinematics, config = fit_kinematics(*stacked), SimulatorConfig.libero_debug()
    # From 1 m above, 128 px a metre in the photograph; all hands close at the same place.
    camera = Camera(np.array([[64.0, 0, 32], [0, 64, 32], [0, 0, 1]]), np.diag([1.0, -1, -1, 1]))
    camera.pose[2, 3] = 1.0
    camera = Camera(*(np.tile(leaf.astype(np.float32), (84, 2, 1, 1)) for leaf in camera))
    closes = stacked[0][:, 20, :2]
    photographs = np.zeros((84, 2, 128, 128, 3), np.uint8)
    for row, (x, y) in enumerate(64 + 128 * closes * [1, -1]):
        photographs[row, 0, ..., 0] = 0 if held[row] else 255
        photographs[row, 0, int(y) - 12 : int(y) + 12, int(x) - 12 : int(x) + 12, 0] = 255 if held[row] else 0
    blank = np.zeros((84, 1, *PICTURE), np.float32)
    batch = _motion_batch(kinematics, *stacked, blank)._replace(camera=camera, photographs=photographs)
    rows = lambda part: jax.tree.map(lambda leaf: jnp.asarray(leaf)[part], batch)
    fresh = init_arm_motion(16, jax.random.key(0), PICTURE, config.glance_size)
    params = _train(fresh, kinematics, rows(slice(80)), config)
    test = rows(slice(80, None))

    def holds(photographs):
        arm = _arm(params, test.pictures)._replace(glance=make_glance(config, photographs, test.camera, kinematics))
        advance = advance_proprio(kinematics, test.proprio[:, 0], test.proprio[:, 0], test.actions, arm)
        return np.asarray(advance.grip.holds[:, -1])

    np.testing.assert_array_equal(holds(test.photographs), np.where(held[80:], 1, -1))
    swapped = test.photographs.at[..., 0].set(255 - test.photographs[..., 0])
    np.testing.assert_array_equal(holds(swapped), np.where(held[80:], -1, 1))


def test_fingers_in_doubt_do_not_close_halfway():
    """Half of the episodes have something between the fingers and nothing tells which: it is decided, and stays so."""
    stacked = [np.stack(part) for part in _episodes(80)]
    fingers = stacked[0][..., 6:]
    fingers[::2] = np.array([1, -1]) * np.maximum(np.abs(fingers[::2]), 0.025)
    kinematics, blank = fit_kinematics(*stacked), np.zeros((80, 1, *PICTURE), np.float32)
    arm = _arm(_train(_fresh_arm_motion(), kinematics, _motion_batch(kinematics, *stacked, blank)), blank)
    start = stacked[0][:, 0]
    advance = advance_proprio(kinematics, start, start, stacked[1], arm)
    last, holds = advance.proprio[:, -1], advance.grip.holds[:, -1]
    assert (np.abs(holds) == 1).all() and (np.abs(holds - np.sign(advance.grasp_logit[:, 20])) == 0).all()
    np.testing.assert_allclose(last[:, 6] - last[:, 7], np.where(holds > 0, 0.05, 0.0), atol=0.012)
    told = stacked[0][:, 20, 6] > 0.02
    holds = np.tile(np.where(told, 1.0, -1.0)[:, None], 30) * (np.arange(30) >= 20)
    last = advance_proprio(kinematics, start, start, stacked[1], arm._replace(holds=holds)).proprio[:, -1]
    np.testing.assert_allclose(last[:, 6] - last[:, 7], np.where(told, 0.05, 0.0), atol=0.012)


def test_the_loss_doubts_its_labels():
    """Cross-entropy with labels 0.05 and 0.95, in NumPy, where the network says the same of every hand."""
    stacked = [np.stack(part) for part in _episodes(4)]
    stacked[0][::4, :, 6:] = np.array([1, -1]) * np.maximum(np.abs(stacked[0][::4, :, 6:]), 0.025)
    batch = _motion_batch(fit_kinematics(*stacked), *stacked, _pictures(4))
    params = _fresh_arm_motion()
    params["grasp_out"]["bias"] += 1.5
    _, metrics = arm_motion_loss(NO_GLANCES, params, jax.random.key(0), batch, fit_kinematics(*stacked))
    p = 1 / (1 + np.exp(-1.5))
    held, missed = (-t * np.log(p) - (1 - t) * np.log(1 - p) for t in (0.95, 0.05))
    np.testing.assert_allclose(metrics["grasp_loss"], (held + 3 * missed) / 4, rtol=1e-5)
    assert metrics["grasp_accuracy"] == 0.25
    # The closing of a hand that already knows what it holds is no decision.
    holds = np.sign(batch.holds.min(1) + batch.holds.max(1))  # what each episode decides
    known = batch._replace(grip=Grip(np.zeros(4), holds), holds=np.repeat(holds[:, None], batch.holds.shape[1], 1))
    _, metrics = arm_motion_loss(NO_GLANCES, params, jax.random.key(0), known, fit_kinematics(*stacked))
    assert metrics["grasp_loss"] == 0 and np.abs(holds).min() == 1


def test_only_the_grasp_is_dropped_out_and_only_with_a_key():
    stacked = [np.stack(part) for part in _episodes(4)]
    kinematics, start = fit_kinematics(*stacked), stacked[0][:, 0]
    arm = _arm(_perturbed(_fresh_arm_motion()), _pictures(4))
    arm = arm._replace(holds=np.zeros((4, stacked[1].shape[1]), np.float32))
    run = lambda key: advance_proprio(kinematics, start, start, stacked[1], arm._replace(dropout=key))
    plain, *dropped = (run(key) for key in (None, jax.random.key(0), jax.random.key(1)))
    for other in dropped:
        np.testing.assert_allclose(other.proprio, plain.proprio, atol=1e-6)
        assert np.abs(other.grasp_logit - plain.grasp_logit).min() > 1e-4
    assert np.abs(dropped[0].grasp_logit - dropped[1].grasp_logit).min() > 1e-4
    np.testing.assert_array_equal(run(None).grasp_logit, plain.grasp_logit)


def _perturbed(params):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


def test_arm_motion_goes_on_where_a_stretch_ended():
    """Two stretches, the last action handed over, are one stretch: the network sees what came before."""
    proprios, actions = _lagging_episodes(2)
    kinematics = fit_kinematics(proprios, actions)
    params = _perturbed(_fresh_arm_motion())
    start, commands, seen = np.stack(proprios)[:, 0], np.stack(actions), _pictures(2, 3)
    whole = advance_proprio(kinematics, start, start, commands, _arm(params, seen))
    first = advance_proprio(kinematics, start, start, commands[:, :8], _arm(params, seen[:, :1]))
    arm = _arm(params, seen[:, 1:], commands[:, 7], jax.tree.map(lambda leaf: leaf[:, -1], first.grip))
    second = advance_proprio(kinematics, first.proprio[:, -2], first.proprio[:, -1], commands[:, 8:], arm)
    join = lambda *leaves: np.concatenate(leaves, axis=1)
    jax.tree.map(partial(np.testing.assert_allclose, atol=5e-5), jax.tree.map(join, first, second), whole)
