# SPDX-License-Identifier: Apache-2.0
"""Checks of what users hand to the simulator: on the host, outside of jit, before anything is computed or written.

Compiled programs cannot look at values. Each function lists everything that is wrong in one `WorldEnvError`.
"""

import numpy as np

from worldenv_jax.errors import WorldEnvError
from worldenv_jax.simulator.config import SimulatorConfig
from worldenv_jax.types import ACTION_DIM, PROPRIO_DIM, Array, Camera, Starts

ACTION_LIMIT = 1.0 + 1e-4  # environment actions lie in [-1, 1]; recordings round
SINGULAR = 1e-6  # of |det| of the intrinsics, in pixels^2
RIGID = 1e-3  # of the entries of R R^T - 1


def check_starts(config: SimulatorConfig, starts: Starts) -> None:
    """First frames uint8 [S, V, H, W, 3], proprioception [S, 8] and cameras, as `types.Starts` has them.

    Raises:
      WorldEnvError: naming every field that is wrong.
    """
    problems = _frame_problems(config, starts.images) + _photographs_problems(config, starts.photographs)
    _raise("simulator starts", problems + _state_problems(config, starts))


def check_episode(
    config: SimulatorConfig,
    name: str,
    images: Array,
    proprio: Array,
    camera: Camera,
    actions: Array,
    photographs: Array | None = None,
) -> None:
    """A recorded episode of T steps; `camera` has leaves [T + 1, V, ...], actions are environment actions [T, 7].

    Photographs, uint8 [V, H', W', 3], are asked for where the configuration has them.

    Raises:
      WorldEnvError: naming the episode by `name`, and every field that is wrong.
    """
    problems = _frame_problems(config, images) + _proprio_problems(proprio) + _camera_problems(config, camera)
    problems += _photographs_problems(config, None if photographs is None else photographs[None])
    _raise(f"episode {name}", problems + _action_problems(actions))


def check_actions(actions: Array) -> None:
    """Environment actions [..., 7]: finite, and in [-1, 1].

    Raises:
      WorldEnvError: with the first wrong entry.
    """
    _raise("simulator actions", _action_problems(actions))


def _raise(what: str, problems: list[str]) -> None:
    if problems:
        raise WorldEnvError(f"{what}: " + "; ".join(problems))


def _state_problems(config: SimulatorConfig, starts: Starts) -> list[str]:
    return _proprio_problems(starts.proprio) + _camera_problems(config, starts.camera)


def _frame_problems(config: SimulatorConfig, images: Array) -> list[str]:
    expected = (config.views, *config.image_size, 3)
    if images.dtype == np.uint8 and images.shape[1:] == expected:
        return []
    got = f"{images.dtype} {list(images.shape)}"
    return [f"images are {got}, expected uint8 [N, {', '.join(map(str, expected))}] with values 0 to 255"]


def _photographs_problems(config: SimulatorConfig, photographs: Array | None) -> list[str]:
    if not config.photograph_size:
        return []
    expected = f"uint8 [N, {', '.join(map(str, config.photographs_shape))}]"
    if photographs is None:
        return [
            f"there are no photographs, expected {expected}: collect with environment.photograph_size, or set both "
            "photograph_size to 0"
        ]
    if photographs.dtype == np.uint8 and photographs.shape[1:] == config.photographs_shape:
        return []
    return [f"photographs are {photographs.dtype} {list(photographs.shape)}, expected {expected}"]


def _proprio_problems(proprio: Array) -> list[str]:
    proprio = np.asarray(proprio)
    if proprio.ndim != 2 or proprio.shape[1] != PROPRIO_DIM:
        return [f"proprio is {list(proprio.shape)}, expected [N, {PROPRIO_DIM}]"]
    return [f"proprio {_first(~np.isfinite(proprio))} is not finite"] if not np.isfinite(proprio).all() else []


def _camera_problems(config: SimulatorConfig, camera: Camera) -> list[str]:
    intrinsics, pose = (np.asarray(leaf, np.float64) for leaf in camera)
    expected = {"camera.intrinsics": (intrinsics, (config.views, 3, 3)), "camera.pose": (pose, (config.views, 4, 4))}
    problems = [
        f"{name} is {list(leaf.shape)}, expected [N, {', '.join(map(str, shape))}]"
        for name, (leaf, shape) in expected.items()
        if leaf.shape[1:] != shape
    ]
    if problems:
        return problems
    with np.errstate(invalid="ignore", over="ignore"):
        focal = np.abs(np.linalg.det(np.nan_to_num(intrinsics)))
        rotation = pose[..., :3, :3]
        error = np.abs(rotation @ rotation.swapaxes(-1, -2) - np.eye(3)).max((-2, -1))
    singular = ~np.isfinite(intrinsics).all((-2, -1)) | ~(focal > SINGULAR)
    bent = ~np.isfinite(pose).all((-2, -1)) | ~(error < RIGID) | (pose[..., 3, :] != (0.0, 0.0, 0.0, 1.0)).any(-1)
    if singular.any():
        problems.append(f"camera.intrinsics {_first(singular)} is missing or singular")
    if bent.any():
        problems.append(f"camera.pose {_first(bent)} is missing or not a rigid motion")
    return problems


def _action_problems(actions: Array) -> list[str]:
    actions = np.asarray(actions)
    if actions.shape[-1:] != (ACTION_DIM,):
        return [f"actions are {list(actions.shape)}, expected [..., {ACTION_DIM}]"]
    wrong = ~(np.abs(actions) <= ACTION_LIMIT)  # NaN too
    if not wrong.any():
        return []
    value = actions[tuple(np.argwhere(wrong)[0])]
    return [f"actions {_first(wrong)} is {value:g}, environment actions lie in [-1, 1]"]


def _first(wrong: np.ndarray) -> str:
    """The index of the first True, like "[3, 0]"."""
    return str(np.argwhere(wrong)[0].tolist())
