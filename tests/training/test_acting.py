# SPDX-License-Identifier: Apache-2.0
"""A policy's action depends on its own episode only, to the bit; and hands that try again."""

import jax
import numpy as np
import pytest

from worldenv_jax.configs import get_config
from worldenv_jax.mesh import make_mesh
from worldenv_jax.policy import init_policy, make_policy_fn, tokenize_policy_prompts
from worldenv_jax.training.acting import BATCH, compile_policy, policy_actor, trying_again
from worldenv_jax.types import EpisodeSpec, Statistics

ROWS = BATCH + 3  # more than one batch


@pytest.mark.parametrize("deterministic", [True, False])
def test_an_action_does_not_depend_on_its_neighbours(deterministic):
    config = get_config("debug").policy
    one = lambda size: np.ones(size, np.float32)
    statistics = Statistics(-one(7), one(7), -one(8), one(8))
    policy = make_policy_fn(config, statistics, 1.0, deterministic)
    prompts = tokenize_policy_prompts(config, ["push it", "lift it"])
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    params = init_policy(config, jax.random.key(0))
    act = policy_actor(compile_policy(policy, statistics, prompts), params, jax.random.key(1), mesh)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (ROWS, 1, 32, 32, 3), np.uint8)
    proprio = rng.normal(size=(ROWS, 8)).astype(np.float32)
    specs = [EpisodeSpec(row % 2, row) for row in range(ROWS)]
    chunks = [row % 3 for row in range(ROWS)]
    together = act(images, proprio, specs, chunks)
    assert together.shape == (ROWS, config.chunk, 7) and np.ptp(together, axis=0).max() > 0
    for rows in ([0], [5, 2], [ROWS - 1, 0, 7], list(rng.permutation(ROWS))):
        some = act(images[rows], proprio[rows], [specs[row] for row in rows], [chunks[row] for row in rows])
        np.testing.assert_array_equal(some, together[rows])


def test_an_empty_fist_opens_and_tries_again():
    """Two episodes in changing slots, the first of which may try again; a hand is empty where proprioception is 0."""
    first, second = (EpisodeSpec(0, seed, "train", "shifted") for seed in (1, 2))
    closing = np.full((2, 8, 7), 0.5, np.float32)
    act = trying_again(lambda images, proprio, *_: closing[: len(proprio)], lambda p: p[:, 0] == 0, {first})
    let_go = [0, 0, 0.5, 0, 0, 0, -1]
    mine = [1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 1, 0]
    opens = [2, 3, 5, 10, 11]  # two chunks of 8 each: not again before the second has ended; cut short by a new episode
    chunks = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6]
    for turn, (hand, chunk) in enumerate(zip(mine, chunks)):
        order = [first, second] if turn % 2 else [second, first]
        proprio = np.array([[hand], [0]] if turn % 2 else [[0], [hand]], np.float32)
        actions = dict(zip(order, act(None, proprio, order, [chunk] * 2)))
        assert (actions[second] == 0.5).all()
        assert (actions[first] == (let_go if turn in opens else 0.5)).all(), turn
    assert (closing == 0.5).all()
