# SPDX-License-Identifier: Apache-2.0
"""Batches read ahead equal those made one by one."""

import itertools

import numpy as np
import pytest
from sample_episodes import sample_episode

from worldenv_jax.data.loader import load_batches
from worldenv_jax.data.rlds import open_episodes, write_episodes
from worldenv_jax.data.windows import BatchSampler, PolicyWindows


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader") / "episodes"
    write_episodes(folder, [sample_episode(i, steps=6) for i in range(3)])
    return BatchSampler(PolicyWindows(open_episodes(folder), chunk=2), batch_size=4, seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_resume(sampler, workers):
    batches = list(itertools.islice(load_batches(sampler, first_step=3, workers=workers), 4))
    for step, batch in enumerate(batches, start=3):
        np.testing.assert_equal(batch, sampler.batch(step))


def test_hosts_share_a_batch(sampler):
    parts = [next(load_batches(sampler, host=host, hosts=2)) for host in range(2)]
    whole = sampler.batch(0)
    np.testing.assert_array_equal(np.concatenate([part["images"] for part in parts]), whole["images"])
    assert parts[0]["instruction"] + parts[1]["instruction"] == whole["instruction"]
    with pytest.raises(ValueError, match="a batch of 4 for 3 hosts"):
        load_batches(sampler, hosts=3)


def test_position_of_the_iterator_is_kept(sampler):
    """grain's own state, for those who store it with their checkpoints."""
    batches = load_batches(sampler)
    next(batches)
    state = batches.get_state()
    expected = next(batches)
    batches.set_state(state)
    np.testing.assert_equal(next(batches), expected)
