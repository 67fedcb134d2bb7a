# SPDX-License-Identifier: Apache-2.0
"""Small random episodes."""

import numpy as np

from worldenv_jax.data.episodes import Episode


def sample_episode(seed: int = 0, steps: int = 5, success_at: int | None = None, views: int = 2, **fields) -> Episode:
    """An episode of noise, 6 x 8 pixels; the predicate holds from frame `success_at` on."""
    rng = np.random.default_rng(seed)
    frames = steps + 1
    values = {
        "images": rng.integers(0, 256, (frames, views, 6, 8, 3), np.uint8),
        "proprio": rng.normal(size=(frames, 8)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (steps, 7)).astype(np.float32),
        "success": np.arange(frames) >= (frames if success_at is None else success_at),
        "intrinsics": rng.normal(size=(frames, views, 3, 3)).astype(np.float32),
        "camera_pose": rng.normal(size=(frames, views, 4, 4)).astype(np.float32),
        "instruction": "pick up the red block",
        "task": 3,
        "seed": seed,
        "split": "train",
        "starts": "shifted",
        "actor": "policy",
        "noise": 0.3,
        "environment": {"qpos": rng.normal(size=4), "step": np.arange(2)},
    }
    return Episode(**{**values, **fields})
