# SPDX-License-Identifier: Apache-2.0
"""EVAC's roll-out over known poses: which rows every chunk reads, and the chain from chunk to chunk."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tools.parity.evac import fixture_config
from worldenv_jax.simulator import decode_latents, init_simulator
from worldenv_jax.simulator.conditioning import encode_images
from worldenv_jax.simulator.memory import memory_slots
from worldenv_jax.simulator.pose_rollout import (
    PosePlan,
    _chunk_rows,
    draw_noise,
    plan_poses,
    resize_image,
    rollout_poses,
)


@pytest.fixture(scope="module")
def config(fixtures_dir):
    sizes = json.loads((fixtures_dir / "evac" / "config.json").read_text())
    config = fixture_config(sizes)
    unet = dataclasses.replace(config.unet, multipliers=(1,), res_blocks=1, attention_levels=())  # compiles fast
    return dataclasses.replace(config, ddim_steps=2, unet=unet)


@pytest.fixture(scope="module")
def plan(config, fixtures_dir):
    with np.load(fixtures_dir / "evac" / "actions_traj_rays.npz") as arrays:
        camera, source = arrays["in_c2w"], tuple(arrays["in_source_hw"])
        return plan_poses(config, arrays["in_action16"], camera, arrays["in_K"], source, stride=3)


def _numbered(rows):
    """A plan whose rows are their own numbers: 10 poses, 3 repeats in front."""
    count = np.arange(rows + 3)
    return PosePlan(
        np.tile(np.arange(1, rows)[:, None], (1, 14)), count[:, None, None, None], count[:, None, None, None]
    )


@pytest.mark.parametrize(
    ("quirks", "chunk", "pictures", "rays", "deltas"),
    [
        (True, 0, [4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4]),
        # Shifted by three, and short at the end of the deltas.
        (True, 1, [8, 9, 10, 11], [0, 2, 5, 7, 8, 9, 10, 11], [8, 9]),
        # The poses have run out: the last is repeated, deltas are zero.
        (True, 2, [12, 12, 12, 12], [0, 4, 8, 11, 12, 12, 12, 12], [0, 0, 0, 0]),
        (False, 1, [8, 9, 10, 11], [0, 2, 5, 7, 8, 9, 10, 11], [5, 6, 7, 8]),
        (False, 2, [12, 12, 12, 12], [0, 4, 8, 11, 12, 12, 12, 12], [9, 0, 0, 0]),
    ],
)
def test_rows_of_a_chunk(config, quirks, chunk, pictures, rays, deltas):
    config = dataclasses.replace(config, reference_quirks=quirks)
    slots = memory_slots(config.history + chunk * config.chunk, config.history)
    got = _chunk_rows(config, _numbered(10), chunk, slots)
    assert got[0].ravel().tolist() == pictures
    assert got[1].ravel().tolist() == rays
    assert got[2][:, 0].tolist() == deltas


def test_quirky_deltas_are_one_row_too_long(config):
    slots = memory_slots(8, 4)
    assert len(_chunk_rows(config, _numbered(40), 1, slots)[2]) == config.chunk + 1


def test_three_chunks(config, plan):
    """The history of every chunk is gathered from all latents so far; later image tokens see the decoded start."""
    shapes, rng = jax.eval_shape(lambda: init_simulator(config, jax.random.key(0))), np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(0.0, 0.1, leaf.shape).astype(leaf.dtype), shapes)
    image = np.random.default_rng(0).random((48, 80, 3)).astype(np.float32)
    chunks = list(rollout_poses(config, params, image, plan, 3, draw_noise(config, jax.random.key(1))))
    first = encode_images(config, params, resize_image(image, config.image_size))
    latents = np.repeat(np.asarray(first)[None], 4, axis=0)
    for chunk in chunks:
        n = len(latents)
        history = latents[[0, n // 3, 2 * n // 3, n - 1]]
        np.testing.assert_allclose(chunk.latents[0, 0, :4], history, atol=1e-5)
        np.testing.assert_allclose(chunk.inputs.image_latents[0, 0, 4:], np.repeat(history[-1:], 4, 0), atol=1e-5)
        assert (np.asarray(chunk.inputs.maps[0, 0, :4]) == 0).all()
        latents = np.concatenate([latents, chunk.latents[0, 0, 4:]])
        expected = decode_latents(config, params, chunk.latents[0, 0, 4:])
        assert np.abs(np.int32(chunk.frames) - np.int32(expected)).max() <= 1
    assert np.abs(chunks[0].image_tokens - chunks[1].image_tokens).max() > 1e-4
    np.testing.assert_allclose(chunks[1].image_tokens, chunks[2].image_tokens, atol=1e-4)


def test_bad_cameras_are_refused(config, fixtures_dir):
    with np.load(fixtures_dir / "evac" / "actions_traj_rays.npz") as arrays:
        poses, camera, intrinsics = arrays["in_action16"], arrays["in_c2w"], arrays["in_K"]
    with pytest.raises(ValueError, match="n \\+ 3 camera poses"):
        plan_poses(config, poses, camera[1:], intrinsics, (480, 640))
    with pytest.raises(ValueError, match="singular"):
        plan_poses(config, poses, camera, np.zeros((3, 3)), (480, 640))


@pytest.mark.parity
def test_resize_equals_torch():
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).random((3, 48, 80)).astype(np.float32)
    for size in ((64, 96), (32, 40)):
        reference = torch.nn.functional.interpolate(
            torch.from_numpy(image)[None], size, mode="bilinear", antialias=True, align_corners=False
        )
        ours = np.asarray(resize_image(image.transpose(1, 2, 0), size)).transpose(2, 0, 1)
        np.testing.assert_allclose(ours, 2 * reference[0].numpy() - 1, atol=2e-6)
