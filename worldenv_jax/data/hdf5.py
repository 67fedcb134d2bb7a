# SPDX-License-Identifier: Apache-2.0
"""LIBERO demonstrations in HDF5 (Lifelong-Robot-Learning/LIBERO, `create_dataset.py`), one file per task.

Layout: `data/demo_i/{actions [T, 7], states [T, D], obs/{agentview_rgb, eye_in_hand_rgb [T, H, W, 3], ee_states
[T, 6], gripper_states [T, 2], joint_states [T, 7]}}`; images are stored as OpenGL renders them.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from worldenv_jax.data.episodes import Episode, validate_episode
from worldenv_jax.data.errors import DataError

_VIEWS = ("agentview_rgb", "eye_in_hand_rgb")
_ROBOT_JOINTS = slice(1, 8)  # of a MuJoCo state: time, then positions, the arm's seven joints first


def read_demonstrations(path: Path | str, task: int = -1, split: str = "train") -> Iterator[Episode]:
    """Reads the demonstrations of one file, in the order of their numbers.

    LIBERO's published files hold the observation *after* each action, so frame t of an episode is `obs[t]` and its
    action is `actions[t + 1]`; an episode is one action shorter than its recording. OpenVLA's regenerated files
    hold the observation *before* each action; there the last frame is repeated after the last action. Which of the
    two it is, is seen from the joint angles in `states`, which always precede the action.

    Images are turned by 180 degrees, as in `modified_libero_rlds`.

    Args:
        path: a .hdf5 file.
        task: index of the task in its suite.
        split: of the episodes.

    Raises:
        DataError: not such a file, or a demonstration in it is damaged (earlier ones have been yielded).
    """
    path = Path(path)
    try:
        import h5py
    except ImportError as error:
        raise DataError(path, 'reading HDF5 needs the extra: pip install "worldenv-jax[libero]"') from error
    try:
        with h5py.File(path) as file:
            demonstrations = file["data"]
            instruction = _instruction(demonstrations.attrs, path)
            for name in sorted(demonstrations, key=lambda key: int(key.rpartition("_")[2])):
                try:
                    episode = _read_demonstration(demonstrations[name], instruction, task, split)
                    validate_episode(episode)
                except (KeyError, ValueError, IndexError, OSError) as error:
                    raise DataError(path, f"{name}: {error}") from error
                yield episode
    except DataError:
        raise
    except (OSError, KeyError, ValueError) as error:
        raise DataError(path, f"not a LIBERO HDF5 file: {error}") from error


def _instruction(attributes, path: Path) -> str:
    """From the stored problem description, or as OpenVLA does from the file name without its scene prefix."""
    if "problem_info" in attributes:
        return str(json.loads(attributes["problem_info"])["language_instruction"]).strip().lower()
    words = path.stem.removesuffix("_demo")
    return re.sub(r"^.*SCENE\d+_", "", words).replace("_", " ").lower()


def _read_demonstration(demo, instruction: str, task: int, split: str) -> Episode:
    observation = demo["obs"]
    actions = demo["actions"][()].astype(np.float32)
    images = np.stack([observation[view][()] for view in _VIEWS], axis=1)[:, :, ::-1, ::-1]
    state = [observation["ee_states"][()], observation["gripper_states"][()]]
    proprio = np.concatenate(state, axis=1).astype(np.float32)
    finished = _finished(demo, len(actions))
    if _observed_after_action(demo):
        actions, success = actions[1:], finished
    else:
        images = np.concatenate([images, images[-1:]])
        proprio = np.concatenate([proprio, proprio[-1:]])
        success = np.append(False, finished)
    frames, views = images.shape[:2]
    return Episode(
        images=np.ascontiguousarray(images),
        proprio=proprio,
        actions=actions,
        success=success,
        intrinsics=np.zeros((frames, views, 3, 3), np.float32),
        camera_pose=np.zeros((frames, views, 4, 4), np.float32),
        instruction=instruction,
        task=task,
        seed=-1,
        split=split,
        starts="official",
        actor="human",
        environment={"state": demo["states"][0]},
    )


def _finished(demo, steps: int) -> np.ndarray:
    """Whether the task was done after each action, bool [T]; a demonstration always ends done."""
    done = np.asarray(demo["dones"][()], bool) if "dones" in demo else np.zeros(steps, bool)
    done[-1] = True
    return done


def _observed_after_action(demo) -> bool:
    """Compares the observed joints with those of the states before and after each action."""
    joints = demo["obs/joint_states"][()]
    states = demo["states"][:, _ROBOT_JOINTS]
    if len(joints) < 2:
        raise ValueError(f"a demonstration of {len(joints)} steps, expected at least 2")
    after = np.abs(joints[:-1] - states[1:]).mean()
    before = np.abs(joints[:-1] - states[:-1]).mean()
    return bool(after < before)
