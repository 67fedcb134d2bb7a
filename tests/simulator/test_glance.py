# SPDX-License-Identifier: Apache-2.0
"""Glances at the hand in a photograph: the squares and the network against NumPy in float64, and where they are cut."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.simulator import Kinematics, SimulatorConfig
from worldenv_jax.simulator.conditioning import make_glance
from worldenv_jax.simulator.glance import FEATURES, Glance, cut_squares, look_around
from worldenv_jax.types import Camera


@pytest.mark.parametrize("centre", [(10.0, 9.0), (12.25, 7.5), (1.25, 19.875), (-60.0, 300.0)])
def test_squares_equal_numpy(centre):
    """Between pixel centres by halves and quarters, over the edge, and far outside."""
    image = np.random.default_rng(0).integers(0, 256, (1, 20, 24, 3), np.uint8)
    got = np.asarray(cut_squares(jnp.asarray(image), jnp.array([[centre]]), 8))[0, 0]
    for i in range(8):
        for j in range(8):
            x, y = (np.clip(c + k + 0.5 - 4, 0.5, n - 0.5) - 0.5 for c, k, n in zip(centre, (j, i), (24, 20)))
            left, top = min(int(x), 22), min(int(y), 18)
            corner = image[0, top : top + 2, left : left + 2].astype(np.float64)
            x, y = x - left, y - top
            row = (1 - x) * corner[:, 0] + x * corner[:, 1]
            np.testing.assert_allclose(got[i, j], (1 - y) * row[0] + y * row[1], atol=1e-3)


def test_glance_equals_numpy():
    rng, glances = np.random.default_rng(0), np.random.default_rng(1).uniform(-1, 1, (2, 3, 16, 16, 6))
    sizes = {"patches": (4, 4 * 4 * 6), "cells": (2, 2 * 2 * FEATURES)}
    params = {
        name: {"kernel": rng.normal(0, 0.2, (inputs, FEATURES)), "bias": rng.normal(0, 0.2, FEATURES)}
        for name, (_, inputs) in sizes.items()
    }
    with jax.default_matmul_precision("highest"):
        got = Glance().apply({"params": params}, glances)
    assert got.shape == (2, 3, 2 * 2 * FEATURES)
    for index in np.ndindex(2, 3):
        hidden = glances[index]
        for name, (size, _) in sizes.items():
            rows = len(hidden) // size
            cells = np.zeros((rows, rows, FEATURES))
            for i in range(rows):
                for j in range(rows):
                    patch = hidden[size * i : size * (i + 1), size * j : size * (j + 1)].ravel()
                    cells[i, j] = patch @ params[name]["kernel"] + params[name]["bias"]
            hidden = cells / (1 + np.exp(-cells))
        np.testing.assert_allclose(got[index], hidden.ravel(), atol=1e-4)


def test_a_glance_shows_the_hand_and_the_place_below_it():
    """A camera that looks along y from 1 m away; 100 px are a metre there, and z points up."""
    lens = np.array([[100.0, 0, 50], [0, 100, 50], [0, 0, 1]], np.float32)
    camera = np.array([[1, 0, 0, 0], [0, 0, 1, -1], [0, -1, 0, 0.2], [0, 0, 0, 1]], np.float32)
    photograph = np.zeros((1, 100, 100, 3), np.uint8)
    photograph[0, 20:30, 60:70] = 255, 0, 0  # x 0.1 to 0.2, z 0.4 to 0.5
    photograph[0, 60:70, 60:70] = 0, 0, 255  # below it, z 0 to 0.1
    glance = look_around(jnp.asarray(photograph), lens[None], camera[None], 0.05, 8)
    got = np.asarray(glance(jnp.array([[[0.15, 0.0, 0.45], [-0.3, 0.0, 0.45]]])))
    assert got.shape == (1, 2, 8, 8, 6)
    np.testing.assert_allclose(got[0, 0], np.broadcast_to([1, -1, -1, -1, -1, 1], (8, 8, 6)), atol=1e-5)
    np.testing.assert_allclose(got[0, 1], -1.0)


def test_glances_are_of_the_first_standing_camera():
    config = SimulatorConfig.libero_debug()
    photographs = np.zeros((1, 2, 128, 128, 3), np.uint8)
    photographs[:, 1 - config.hand_views[0]] = 255
    lens, pose = np.array([[64.0, 0, 32], [0, 64, 32], [0, 0, 1]], np.float32), np.eye(4, dtype=np.float32)
    camera = Camera(np.tile(lens, (1, 2, 1, 1)), np.tile(pose, (1, 2, 1, 1)))
    glance = make_glance(config, jnp.asarray(photographs), camera, Kinematics.osc_pose())
    seen = glance(jnp.array([[[0.0, 0.0, 1.0]]]))
    assert seen.shape == (1, 1, config.glance_size, config.glance_size, 6) and (seen == 1.0).all()
    assert make_glance(dataclasses.replace(config, glance_size=0), None, camera, Kinematics.osc_pose()) is None


def test_bad_glance_sizes_are_named():
    config = SimulatorConfig.libero_debug()
    for size in (12, 136):
        with pytest.raises(ValueError, match=f"glance_size is {size}, photograph_size 128"):
            dataclasses.replace(config, glance_size=size)
