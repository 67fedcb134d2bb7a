# SPDX-License-Identifier: Apache-2.0
"""Speed of the training data's way from disk to batches."""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from worldenv_jax.configs import ExperimentConfig
from worldenv_jax.data.episodes import Episode
from worldenv_jax.data.loader import load_batches
from worldenv_jax.data.rlds import open_episodes, write_episodes
from worldenv_jax.data.windows import BatchSampler, PolicyWindows, ReflectorWindows, SimulatorWindows
from worldenv_jax.simulator import history_steps

READ_AHEAD = 8  # batches that the loader keeps ready: so many are not counted


def benchmark_data(config: ExperimentConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Training windows per second, read from disk, decoded, stacked and prefetched by the loader.

    "undecoded" windows are the policy's without their images. Under `taskset -c 0` the figures are one core's.
    """
    batch = options.batch or config.denoiser.batch_size
    with tempfile.TemporaryDirectory() as scratch:
        written = lambda: write_episodes(
            Path(scratch) / "episodes", synthetic_episodes(config, options.episodes), encoding=options.encoding
        )
        folder = options.folder or written()
        began = time.perf_counter()
        episodes = open_episodes(folder)
        opening = time.perf_counter() - began
        began = time.perf_counter()
        longest = max(summary.num_steps for summary in episodes.summaries) + 1
        surveying = time.perf_counter() - began
        windows = {
            "undecoded": PolicyWindows(Undecoded(episodes), config.policy.chunk),
            "policy": PolicyWindows(episodes, config.policy.chunk),
            "simulator": SimulatorWindows(
                episodes, lambda t: history_steps(t, config.simulator.history), config.simulator.chunk
            ),
            "reflector": ReflectorWindows(episodes, longest),
        }
        rates = {}
        for name, cuts in windows.items():
            batches = load_batches(BatchSampler(cuts, batch, seed=0), ahead=READ_AHEAD)
            for _ in range(READ_AHEAD):
                next(batches)
            began = time.perf_counter()
            for _ in range(READ_AHEAD * options.repeats):
                next(batches)
            rates[name] = READ_AHEAD * options.repeats * batch / (time.perf_counter() - began)
        shape = list(episodes[0].images.shape)
    return {
        "figure": "simulator_windows_per_second",
        **{f"{name}_windows_per_second": rate for name, rate in rates.items()},
        "open_seconds": opening,
        "summaries_seconds": surveying,
        "shapes": {"batch": batch, "episodes": len(episodes), "episode_images": shape},
        "source": str(options.folder or f"synthetic episodes, {options.encoding}"),
    }


class Undecoded(Sequence):
    """Episodes with blank images in the place of theirs."""

    def __init__(self, episodes: Sequence[Episode]):
        self.episodes, self.summaries = episodes, episodes.summaries

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, index: int) -> Episode:
        episode = self.episodes[index]
        return replace(episode, images=np.broadcast_to(np.uint8(0), episode.images.shape))


def synthetic_episodes(config: ExperimentConfig, count: int, steps: int = 48) -> Iterator[Episode]:
    """Episodes of a square that moves over a shaded ground; every second one succeeds."""
    views, (height, width) = config.simulator.views, config.simulator.image_size
    shade = np.linspace(60, 200, height * width * 3).reshape(height, width, 3).astype(np.uint8)
    for seed in range(count):
        images = np.tile(shade, (steps + 1, views, 1, 1, 1))
        for t in range(steps + 1):
            left = (t + 3 * seed) % (width - width // 8)
            images[t, :, height // 3 : height // 2, left : left + width // 8] = (200, 40, 40)
        yield Episode(
            images=images,
            proprio=np.zeros((steps + 1, 8), np.float32),
            actions=np.zeros((steps, 7), np.float32),
            success=(np.arange(steps + 1) > steps - 4) & (seed % 2 == 0),
            intrinsics=np.tile(np.eye(3, dtype=np.float32), (steps + 1, views, 1, 1)),
            camera_pose=np.tile(np.eye(4, dtype=np.float32), (steps + 1, views, 1, 1)),
            instruction="move the square",
            task=0,
            seed=seed,
            split="train",
            starts="shifted",
            actor="expert",
        )
