# SPDX-License-Identifier: Apache-2.0
"""Rules of the tabletop against hand-computed cases: motion of the hand, grasp, push, fall, rest, success."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from worldenv_jax.envs.tabletop import INSTRUCTIONS, OBJECTS, TabletopConfig, proprioception, start_state, step, success

CONFIG = TabletopConfig()
RED, GREEN, BLUE, BALL, PURPLE = range(5)
PLATE, TRAY = 0, 1
PARKED = [[-0.2, 0.2], [-0.1, 0.2], [0.0, 0.2], [0.1, 0.2], [0.2, 0.2]]
HALF = np.array([thing.half_height for thing in OBJECTS])
OPEN, CLOSE = -1.0, 1.0

_step = jax.jit(lambda state, action: step(CONFIG, state, action))
_start = jax.jit(lambda task, split, seed: start_state(CONFIG, task, split, seed))


def table(hand=(0.0, 0.0, 0.2), objects=(), task=0, finger=0.04, held=-1, offset=(0.0, 0.0, 0.0)):
    """All objects in a far row except those given as (index, x, y[, z]); plate at (-0.15, -0.15), tray opposite."""
    xy, z = np.array(PARKED), HALF.copy()
    for index, x, y, *height in objects:
        xy[index] = x, y
        z[index] = height[0] if height else HALF[index]
    state = start_state(CONFIG, 0, 0, 0)
    return state._replace(
        task=jnp.int32(task),
        hand_position=jnp.array(hand, jnp.float32),
        hand_quaternion=jnp.array([1.0, 0.0, 0.0, 0.0]),
        finger_position=jnp.float32(finger),
        held=jnp.int32(held),
        grip_offset=jnp.array(offset, jnp.float32),
        object_position=jnp.array(np.column_stack([xy, z]), jnp.float32),
        object_yaw=jnp.zeros(5),
        receptacle_position=jnp.array([[-0.15, -0.15], [-0.15, 0.05]]),
    )


def run(state, *commands):
    """Commands are (count, dx, dy, dz, gripper)."""
    for count, dx, dy, dz, gripper in commands:
        for _ in range(count):
            state = _step(state, jnp.array([dx, dy, dz, 0.0, 0.0, 0.0, gripper]))
    return state


def holding(index, hand=(0.0, 0.0, 0.1), others=(), task=0):
    objects = ((index, hand[0], hand[1], hand[2]), *others)
    return table(hand, objects, task, finger=OBJECTS[index].radius, held=index)


def test_hand_moves_three_centimetres_per_command_and_stops_at_the_workspace():
    state = _step(table(), jnp.array([1.0, -1.0, 0.5, 0, 0, 0, OPEN]))
    np.testing.assert_allclose(state.hand_position, [0.03, -0.03, 0.215], atol=1e-6)
    state = run(table(), (20, 1.0, 1.0, 1.0, OPEN))
    np.testing.assert_allclose(state.hand_position, CONFIG.hand_high, atol=1e-6)
    clipped = _step(table(), jnp.array([5.0, 0, 0, 0, 0, 0, OPEN]))
    np.testing.assert_allclose(clipped.hand_position, [0.03, 0.0, 0.2], atol=1e-6)


def test_rotation_is_composed_in_world_axes():
    state, expected = table(), Rotation.from_rotvec([np.pi, 0.0, 0.0])
    for command in ([0.1, 0.3, -0.5], [0.2, -0.1, 1.0], [-0.3, 0.2, 0.4]):
        state = _step(state, jnp.array([0, 0, 0, *command, OPEN]))
        expected = Rotation.from_rotvec(0.3 * np.array(command)) * expected
    actual = Rotation.from_rotvec(np.asarray(proprioception(state)[3:6], np.float64))
    assert (actual * expected.inv()).magnitude() < 1e-4


def test_proprioception_of_a_turned_hand():
    np.testing.assert_allclose(proprioception(table()), [0, 0, 0.2, np.pi, 0, 0, 0.04, -0.04], atol=1e-5)
    turned = _step(table(), jnp.array([0, 0, 0, 0, 0, 1.0, OPEN]))
    expected = np.pi * np.array([np.cos(0.15), np.sin(0.15), 0.0])
    np.testing.assert_allclose(proprioception(turned)[3:6], expected, atol=1e-4)


def test_tilt_is_limited_while_heading_goes_on():
    state = table()
    for _ in range(6):
        state = _step(state, jnp.array([0, 0, 0, 1.0, 0, 0.5, OPEN]))
    rotation = Rotation.from_quat(np.asarray(state.hand_quaternion))
    assert np.arccos(-rotation.as_matrix()[2, 2]) <= CONFIG.tilt_limit + 1e-3
    heading = np.arctan2(rotation.as_matrix()[1, 0], rotation.as_matrix()[0, 0])
    np.testing.assert_allclose(heading, 6 * 0.15, atol=0.08)


def test_fingers_travel_at_limited_speed():
    closing = run(table(), (1, 0, 0, 0, CLOSE))
    np.testing.assert_allclose(closing.finger_position, 0.025, atol=1e-6)
    np.testing.assert_allclose(run(closing, (2, 0, 0, 0, CLOSE)).finger_position, 0.0, atol=1e-6)
    np.testing.assert_allclose(run(closing, (2, 0, 0, 0, OPEN)).finger_position, 0.04, atol=1e-6)


def test_grasp_of_a_centred_object_and_lift():
    state = run(table((0, 0, 0.022), [(RED, 0.0, 0.0)]), (1, 0, 0, 0, CLOSE))
    assert state.held == -1  # 2.5 cm of half opening left, the box needs 2.2
    state = run(state, (1, 0, 0, 0, CLOSE))
    assert state.held == RED
    np.testing.assert_allclose(state.finger_position, 0.022, atol=1e-6)
    state = run(state, (2, 0.5, 0, 1, CLOSE))
    np.testing.assert_allclose(state.object_position[RED], [0.03, 0.0, 0.082], atol=1e-5)


def test_closing_centres_an_object_that_fits_between_the_fingers():
    state = run(table((0, 0, 0.022), [(RED, 0.01, 0.016)]), (3, 0, 0, 0, CLOSE))
    assert state.held == RED
    np.testing.assert_allclose(state.object_position[RED], [0.01, 0.0, 0.022], atol=1e-5)


def test_a_finger_that_lands_on_an_object_pushes_it_out():
    state = run(table((0, 0, 0.11), [(RED, 0.0, 0.024)]), (3, 0, 0, -1, OPEN), (4, 0, 0, 0, CLOSE))
    assert state.held == -1
    assert state.object_position[RED, 1] > 0.04


def test_closing_too_far_along_the_pads_squeezes_the_object_out():
    state = run(table((0, 0, 0.022), [(RED, 0.025, 0.0)]), (4, 0, 0, 0, CLOSE))
    assert state.held == -1
    assert state.object_position[RED, 0] > 0.026


def test_closing_above_an_object_leaves_it_alone():
    state = run(table((0, 0, 0.045), [(RED, 0.0, 0.0)]), (4, 0, 0, 0, CLOSE))
    assert state.held == -1
    np.testing.assert_allclose(state.object_position[RED], [0, 0, 0.022], atol=1e-6)


def test_the_hand_sweeps_objects_aside():
    state = run(table((0, -0.1, 0.025), [(BLUE, 0.0, 0.0)]), (4, 0, 1, 0, OPEN))
    contact = 0.02 + 0.04 + 2 * 0.006 + 0.022  # hand, half opening, thickness of the finger, radius of the object
    np.testing.assert_allclose(state.object_position[BLUE, 1], contact, atol=2e-3)
    high = run(table((0, -0.1, 0.1), [(BLUE, 0.0, 0.0)]), (4, 0, 1, 0, OPEN))
    np.testing.assert_allclose(high.object_position[BLUE, :2], [0, 0], atol=1e-6)


def test_a_carried_object_pushes_others_out_of_the_way():
    state = holding(RED, (-0.1, 0.0, 0.025), [(BLUE, 0.0, 0.0)])
    state = run(state, (3, 1, 0, 0, CLOSE))
    assert state.held == RED
    gap = np.linalg.norm(state.object_position[RED, :2] - state.object_position[BLUE, :2])
    np.testing.assert_allclose(gap, 0.044, atol=2e-3)


def test_a_held_object_slides_up_in_the_grip_where_the_table_stops_it():
    state = run(holding(RED, (0.0, 0.0, 0.05)), (1, 0, 0, -1, CLOSE))
    np.testing.assert_allclose(state.object_position[RED, 2], 0.022, atol=1e-6)
    state = run(state, (1, 0, 0, 1, CLOSE))
    np.testing.assert_allclose(state.object_position[RED, 2], 0.052, atol=1e-5)


def test_a_held_box_turns_with_the_hand():
    state = _step(holding(RED), jnp.array([0, 0, 0, 0, 0, 1.0, CLOSE]))
    np.testing.assert_allclose(state.object_yaw[RED], 0.3, atol=1e-5)


def test_release_and_free_fall():
    state = run(holding(RED, (0.0, 0.0, 0.122)), (2, 0, 0, 0, OPEN))
    assert state.held == -1
    # Semi-implicit Euler at 80 Hz: after 8 substeps g dt^2 (1 + ... + 8).
    np.testing.assert_allclose(state.object_position[RED, 2], 0.122 - 9.81 / 80**2 * 36, atol=1e-5)
    state = run(state, (1, 0, 0, 0, OPEN))
    np.testing.assert_allclose(state.object_position[RED], [0, 0, 0.022], atol=1e-6)
    np.testing.assert_allclose(state.object_velocity[RED], 0.0, atol=1e-6)


def test_an_object_released_in_motion_keeps_its_speed_until_it_lands():
    state = run(holding(RED, (0.0, 0.0, 0.122)), (1, 1, 0, 0, OPEN))
    np.testing.assert_allclose(state.object_velocity[RED, :2], [0.6, 0.0], atol=1e-4)  # 3 cm in 0.05 s
    state = run(state, (1, 0, 0, 0, OPEN))
    np.testing.assert_allclose(state.object_position[RED, 0], 8 * 0.6 / 80, atol=1e-4)
    landed = run(state, (4, 0, 0, 0, OPEN))
    np.testing.assert_allclose(landed.object_velocity[RED], 0.0, atol=0.02)


def test_a_box_comes_to_rest_on_top_of_a_cylinder():
    state = run(holding(RED, (0.0, 0.0, 0.09), [(BLUE, 0.003, 0.0)]), (4, 0, 0, 0.5, OPEN))
    np.testing.assert_allclose(state.object_position[RED, 2], 0.052 + 0.022, atol=1e-5)


def test_the_ball_rolls_when_dropped_from_high_and_stays_when_set_down():
    dropped = run(holding(BALL, (0.0, 0.0, 0.2)), (20, 0, 0, 1, OPEN))
    assert np.linalg.norm(dropped.object_position[BALL, :2]) > 0.015
    np.testing.assert_allclose(dropped.object_velocity[BALL], 0.0, atol=0.02)
    placed = run(holding(BALL, (0.0, 0.0, 0.03)), (5, 0, 0, 1, OPEN))
    np.testing.assert_allclose(placed.object_position[BALL], [0.0, 0.0, 0.024], atol=1e-4)


def test_the_tray_wall_keeps_objects_in_and_out():
    state = run(holding(RED, (-0.15, 0.093, 0.06)), (5, 0, 0, 0.5, OPEN))
    assert abs(state.object_position[RED, 1] - 0.05) <= 0.045 - 0.022 + 1e-4  # inside the wall
    np.testing.assert_allclose(state.object_position[RED, 2], 0.006 + 0.022, atol=1e-5)
    state = run(holding(RED, (-0.08, 0.05, 0.06)), (5, 0, 0, 0.5, OPEN))
    assert state.object_position[RED, 0] >= -0.15 + 0.05 + 0.022 - 1e-4
    np.testing.assert_allclose(state.object_position[RED, 2], 0.022, atol=1e-5)


def test_success_can_be_lost():
    state = run(holding(RED, (-0.15, -0.15, 0.04)), (2, 0, 0, 1, OPEN))
    assert success(state)
    swept = state._replace(hand_position=jnp.array([-0.16, -0.15, 0.03]), finger_position=jnp.float32(0.0))
    swept = run(swept, (4, 1, 0, 0, CLOSE))
    assert not success(swept)
    np.testing.assert_allclose(swept.object_position[RED, 2], 0.022, atol=1e-5)
    grasped = state._replace(hand_position=state.object_position[RED])
    assert not success(run(grasped, (3, 0, 0, 0, CLOSE)))


ON_PLATE, IN_TRAY = 0.008 + 0.022, 0.006 + 0.022


@pytest.mark.parametrize(
    ("task", "objects", "expected"),
    [
        (0, [(RED, -0.15, -0.15, ON_PLATE)], True),
        (0, [(RED, -0.15, -0.1005, ON_PLATE)], True),  # half a millimetre inside the edge
        (0, [(RED, -0.15, -0.0995, ON_PLATE)], False),
        (0, [(RED, -0.15, -0.15, ON_PLATE + 0.01)], False),  # in the air
        (0, [(GREEN, -0.15, -0.15, ON_PLATE)], False),  # another object
        (0, [(RED, -0.15, 0.05, IN_TRAY)], False),  # another receptacle
        (1, [(RED, -0.15, 0.05, IN_TRAY)], True),
        (3, [(GREEN, -0.15, 0.05, IN_TRAY)], True),
        (0, [(GREEN, -0.15, -0.15, ON_PLATE), (RED, -0.15, -0.15, ON_PLATE + 0.044)], False),  # on top of another
    ],
)
def test_success_predicate(task, objects, expected):
    assert bool(success(table(objects=objects, task=task))) is expected


def test_success_needs_release_and_rest():
    state = table(objects=[(RED, -0.15, -0.15, ON_PLATE)])
    assert not success(state._replace(held=jnp.int32(RED)))
    assert success(state._replace(held=jnp.int32(GREEN)))
    assert not success(state._replace(object_velocity=state.object_velocity.at[RED, 0].set(0.05)))


def test_ten_instructions_name_object_and_receptacle():
    assert len(set(INSTRUCTIONS)) == 10
    assert INSTRUCTIONS[0] == "put the red box on the white plate"
    assert INSTRUCTIONS[7] == "put the yellow ball in the brown tray"


def test_starts_repeat_and_differ_between_splits_tasks_and_seeds():
    first = _start(3, 0, 7)
    jax.tree.map(np.testing.assert_array_equal, first, _start(3, 0, 7))
    for other in (_start(3, 1, 7), _start(4, 0, 7), _start(3, 0, 8)):
        assert np.abs(first.object_position - other.object_position).max() > 1e-4


def test_starts_never_overlap_and_never_succeed():
    seeds = jnp.arange(5000)
    draw = jax.jit(jax.vmap(lambda seed, split: start_state(CONFIG, seed % 10, split, seed), in_axes=(0, None)))
    for split in (0, 1):
        states = draw(seeds, split)
        xy, places = np.asarray(states.object_position[..., :2]), np.asarray(states.receptacle_position)
        gaps = np.linalg.norm(xy[:, :, None] - xy[:, None], axis=-1) + np.eye(5)
        assert gaps.min() > 2 * 0.022 + 0.004 - 1e-6
        assert np.abs(xy[:, :, None] - places[:, None]).max(-1).min() > 0.05 + 0.022
        assert np.abs(xy).max() < 0.2
        assert not jax.vmap(success)(states).any()
        settled = jax.vmap(lambda state: step(CONFIG, state, jnp.array([0, 0, 0, 0, 0, 0, OPEN])))(states)
        np.testing.assert_allclose(settled.object_position, states.object_position, atol=1e-6)
