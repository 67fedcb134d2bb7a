# SPDX-License-Identifier: Apache-2.0
"""Bad frames, cameras, proprioception and actions are refused in one line, good ones pass."""

from dataclasses import replace

import numpy as np
import pytest

from worldenv_jax.errors import WorldEnvError
from worldenv_jax.params_file import check_params
from worldenv_jax.simulator import SimulatorConfig, check_actions, check_episode, check_starts
from worldenv_jax.types import Camera, Starts, Text

CONFIG = SimulatorConfig.debug()


def _camera(count):
    intrinsics = np.tile(np.array([[-32, 0, 16], [0, 32, 16], [0, 0, 1]], np.float32), (count, 1, 1, 1))
    pose = np.array([[0, 1, 0, 0.5], [1, 0, 0, 0], [0, 0, -1, 1], [0, 0, 0, 1]], np.float32)
    return Camera(intrinsics, np.tile(pose, (count, 1, 1, 1)))


def _starts(**changes):
    text = Text(np.zeros((3, 2), np.int32), np.ones((3, 2), bool))
    images = np.zeros((3, 1, 32, 32, 3), np.uint8)
    starts = Starts(images, np.zeros((3, 8), np.float32), text, text, _camera(3), np.zeros(3, np.int32))
    return starts._replace(**changes)


def _with(array, index, value):
    changed = array.copy()
    changed[index] = value
    return changed


CAMERA = _camera(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((3, 1, 64, 64, 3), np.uint8)}, r"images are uint8 \[3, 1, 64, 64, 3\], expected uint8"),
        ({"images": np.zeros((3, 1, 32, 32, 3), np.float32)}, "images are float32 .* values 0 to 255"),
        ({"images": np.zeros((3, 2, 32, 32, 3), np.uint8)}, r"\[3, 2, 32, 32, 3\], expected"),
        ({"proprio": np.full((3, 8), np.nan, np.float32)}, r"proprio \[0, 0\] is not finite"),
        ({"proprio": np.zeros((3, 7), np.float32)}, r"proprio is \[3, 7\], expected \[N, 8\]"),
        ({"camera": Camera(np.zeros((3, 1, 3, 3)), np.zeros((3, 1, 4, 4)))}, "missing or singular; camera.pose"),
        ({"camera": CAMERA._replace(intrinsics=_with(CAMERA.intrinsics, (2, 0, 0, 0), 0.0))}, r"\[2, 0\] is missing "),
        ({"camera": CAMERA._replace(intrinsics=_with(CAMERA.intrinsics, (1, 0, 0, 2), np.nan))}, r"\[1, 0\] is miss"),
        ({"camera": CAMERA._replace(pose=_with(CAMERA.pose, (1, 0, 0, 0), 2.0))}, r"pose \[1, 0\] .* not a rigid"),
        ({"camera": CAMERA._replace(pose=_with(CAMERA.pose, (1, 0, 0, 3), np.inf))}, r"pose \[1, 0\]"),
        ({"camera": CAMERA._replace(pose=CAMERA.pose[:, :, :3])}, r"pose is \[3, 1, 3, 4\], expected \[N, 1, 4, 4\]"),
    ],
)  # fmt: skip
def test_bad_starts_are_named(changes, message):
    with pytest.raises(WorldEnvError, match=message) as error:
        check_starts(CONFIG, _starts(**changes))
    assert "\n" not in str(error.value)


def test_photographs_are_asked_for():
    config = SimulatorConfig.libero_debug()
    size, views = config.photograph_size, lambda camera: Camera(*(np.repeat(leaf, 2, 1) for leaf in camera))
    starts = _starts(images=np.zeros((3, 2, 64, 64, 3), np.uint8), camera=views(CAMERA))
    check_starts(config, starts._replace(photographs=np.zeros((3, 2, size, size, 3), np.uint8)))
    with pytest.raises(WorldEnvError, match="no photographs, expected uint8 .*128, 128.*environment.photograph_size"):
        check_starts(config, starts)
    with pytest.raises(WorldEnvError, match=r"photographs are uint8 \[3, 2, 64, 64, 3\], expected uint8 \[N, 2, 128"):
        check_starts(config, starts._replace(photographs=starts.images))
    steps = np.zeros((2, 7), np.float32)
    recorded = starts.images, starts.proprio, starts.camera, steps
    check_episode(config, "0", *recorded, np.zeros((2, size, size, 3), np.uint8))
    with pytest.raises(WorldEnvError, match="episode 0: there are no photographs"):
        check_episode(config, "0", *recorded)
    with pytest.raises(ValueError, match="photograph_size needs compositor_width"):
        replace(config, hand_views=())


def test_good_inputs_pass():
    """A mirrored camera (negative focal length, as LIBERO's images need) is a good one."""
    check_starts(CONFIG, _starts())
    check_actions(np.array([[1, -1, 0, 0, 0, 0, 1]], np.float32))


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, r"actions \[1, 2\] is nan"), (1.5, "is 1.5, environment actions lie in")]
)
def test_bad_actions_are_named(value, message):
    actions = _with(np.zeros((4, 7), np.float32), (1, 2), value)
    with pytest.raises(WorldEnvError, match=message):
        check_actions(actions)
    arrays = (np.zeros((5, 1, 32, 32, 3), np.uint8), np.zeros((5, 8), np.float32), _camera(5))
    with pytest.raises(WorldEnvError, match="episode 7: .*" + message):
        check_episode(CONFIG, "7", *arrays, actions)
    with pytest.raises(WorldEnvError, match=r"actions are \[4, 6\]"):
        check_actions(actions[:, :6])


def test_parameters_of_another_configuration_are_named():
    expected = {"unet": {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}}
    check_params("simulator", expected, expected)
    other = {"unet": {"kernel": np.zeros((4, 2))}, "extra": np.zeros(1)}
    with pytest.raises(
        WorldEnvError, match=r"another configuration: unet/bias is missing; extra is unknown; .*\[4, 2\]"
    ):
        check_params("simulator", other, expected)
