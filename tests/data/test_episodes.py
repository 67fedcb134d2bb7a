# SPDX-License-Identifier: Apache-2.0
"""Episodes: properties, validation, selection."""

import numpy as np
import pytest
from sample_episodes import sample_episode

from worldenv_jax.data.episodes import SelectedEpisodes, summarize_episodes, until_success, validate_episode


def test_properties():
    failed, solved = sample_episode(steps=4), sample_episode(steps=4, success_at=3)
    assert (failed.num_steps, failed.succeeded, failed.first_success) == (4, False, None)
    assert (solved.num_steps, solved.succeeded, solved.first_success) == (4, True, 3)


def test_until_success_ends_with_the_frame_that_shows_it():
    episode = sample_episode(steps=6, success_at=3)
    short = until_success(episode)
    validate_episode(short)
    assert (short.num_steps, short.first_success) == (3, 3)
    np.testing.assert_array_equal(short.actions, episode.actions[:3])
    np.testing.assert_array_equal(short.images, episode.images[:4])
    for bad in (sample_episode(), sample_episode(success_at=0)):
        with pytest.raises(ValueError, match="no action before a success"):
            until_success(bad)


def test_validation_lists_every_difference():
    actions = sample_episode().actions.astype(np.float64)
    proprio = sample_episode().proprio.copy()
    proprio[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"(?s)proprio: got NaN.*index 2.*actions: got float64.*expected float32"):
        validate_episode(sample_episode(actions=actions, proprio=proprio))
    with pytest.raises(ValueError, match="actor: got 'cat'"):
        validate_episode(sample_episode(actor="cat"))
    with pytest.raises(ValueError, match=r"intrinsics: got float32 \[6, 1, 3, 3\], expected float32 \[6, 2, 3, 3\]"):
        validate_episode(sample_episode(intrinsics=sample_episode().intrinsics[:, :1]))


def test_selection_keeps_order():
    episodes = [sample_episode(i, success_at=2 if i % 2 else None) for i in range(5)]
    solved = SelectedEpisodes(episodes, lambda summary: summary.succeeded)
    assert [episode.seed for episode in solved] == [1, 3]
    assert solved.summaries == summarize_episodes([episodes[1], episodes[3]])
