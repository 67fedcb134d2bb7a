# SPDX-License-Identifier: Apache-2.0
"""The evaluation protocol: published limits, disjoint splits, the hash, and Wilson's interval by hand."""

import hashlib
import json

import pytest

from worldenv_jax.envs.protocol import (
    LIBERO_SUITES,
    check_spec,
    libero_protocol,
    protocol_hash,
    start_seed,
    tabletop_protocol,
    wilson_interval,
)
from worldenv_jax.types import EpisodeSpec


def test_step_limits_are_the_published_ones():
    limits = {suite: libero_protocol(suite).max_steps for suite in LIBERO_SUITES}
    assert limits == {
        "libero_spatial": 220,
        "libero_object": 280,
        "libero_goal": 300,
        "libero_10": 520,
        "libero_90": 400,
    }
    assert libero_protocol("libero_goal").settle_action[-1] == -1.0


def test_unknown_suite_names_the_known_ones():
    with pytest.raises(ValueError, match="libero_object"):
        libero_protocol("libero_objects")


def test_hash_is_sha256_of_canonical_json_and_sees_every_number():
    protocol = tabletop_protocol().to_dict()
    text = json.dumps(protocol, sort_keys=True, separators=(",", ":"))
    assert protocol_hash(protocol) == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert protocol_hash(dict(reversed(protocol.items()))) == protocol_hash(protocol)
    for name in ("max_steps", "settle_steps", "chunk", "shift_joints"):
        assert protocol_hash(protocol | {name: 7}) != protocol_hash(protocol)


def test_start_seeds_of_the_splits_are_disjoint_and_distinct():
    seeds = {
        split: {
            start_seed("libero_object", EpisodeSpec(task, seed, split, starts), purpose)
            for task in range(10)
            for seed in range(50)
            for starts in ("official", "shifted")
            for purpose in ("", "noise")
        }
        for split in ("train", "test")
    }
    assert not seeds["train"] & seeds["test"]
    assert len(seeds["train"]) == len(seeds["test"]) == 2000


def test_specs_out_of_range_are_refused_with_every_reason():
    protocol = libero_protocol("libero_object")
    check_spec(EpisodeSpec(9, 49, "test", "official"), protocol, 10)
    check_spec(EpisodeSpec(9, 50, "test", "shifted"), protocol, 10)
    check_spec(EpisodeSpec(9, 50, "train", "official"), protocol, 10)
    with pytest.raises(ValueError, match="50 official starts"):
        check_spec(EpisodeSpec(0, 50, "test", "official"), protocol, 10)
    with pytest.raises(ValueError, match=r"task: got 10.*split: got 'val'.*starts: got 'easy'.*seed: got -1"):
        check_spec(EpisodeSpec(10, -1, "val", "easy"), protocol, 10)
    with pytest.raises(ValueError, match="starts"):
        check_spec(EpisodeSpec(0, 0, "test", "official"), tabletop_protocol(), 3)


def test_wilson_interval_matches_published_values():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for successes, trials, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_refuses_impossible_counts():
    for successes, trials in [(0, 0), (3, 2), (-1, 5)]:
        with pytest.raises(ValueError, match="successes"):
            wilson_interval(successes, trials)
