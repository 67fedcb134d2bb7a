# SPDX-License-Identifier: Apache-2.0
"""Config overrides: typed values, nearest names, JSON round trips, and arbitrary text."""

import dataclasses
import json
from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from worldenv_jax.errors import WorldEnvError
from worldenv_jax.overrides import ConfigError, apply_overrides, diff_configs, from_dict, to_dict


@dataclasses.dataclass(frozen=True)
class Policy:
    lora_rank: int = 0
    width: int = 64
    dropout: float = 0.1
    towers: tuple[int, ...] = (2, 3)
    rates: tuple[tuple[str, float], ...] = (("head", 1e-5),)
    window: tuple[int, int] | None = None

    def __post_init__(self):
        if self.width % 2:
            raise ValueError(f"width must be even, got {self.width}")


@dataclasses.dataclass(frozen=True)
class Experiment:
    name: str = "debug"
    policy: Policy = Policy()
    teacher: Policy | None = None
    remat: bool = False
    seed: int | None = 3
    dtype: Literal["float32", "bfloat16"] = "float32"
    clip: float | None = 1.0


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("policy.lora_rank=16", lambda c: c.policy.lora_rank, 16),
        ("policy.lora_rank=1_000", lambda c: c.policy.lora_rank, 1000),
        ("policy.dropout=1e-3", lambda c: c.policy.dropout, 0.001),
        ("policy.dropout=1", lambda c: c.policy.dropout, 1.0),
        ("policy.dropout=.5", lambda c: c.policy.dropout, 0.5),
        ("policy.towers=4,5,6", lambda c: c.policy.towers, (4, 5, 6)),
        ("policy.towers=(4, 5)", lambda c: c.policy.towers, (4, 5)),
        ("policy.towers=", lambda c: c.policy.towers, ()),
        ("policy.window=1,2", lambda c: c.policy.window, (1, 2)),
        ('policy.rates=[["lora", 1e-4], ["head", 1]]', lambda c: c.policy.rates, (("lora", 1e-4), ("head", 1.0))),
        ("name=123", lambda c: c.name, "123"),
        ("name=a=b", lambda c: c.name, "a=b"),
        ("remat=True", lambda c: c.remat, True),
        ("remat=false", lambda c: c.remat, False),
        ("seed=none", lambda c: c.seed, None),
        ("clip=None", lambda c: c.clip, None),
        ("clip=2", lambda c: c.clip, 2.0),
        ("dtype=bfloat16", lambda c: c.dtype, "bfloat16"),
    ],
)
def test_value_takes_the_type_of_its_field(override, read, expected):
    value = read(apply_overrides(Experiment(), [override]))
    assert value == expected
    assert type(value) is type(expected)


def test_later_overrides_win_and_the_result_is_hashable():
    config = apply_overrides(Experiment(), ["policy.width=8", "policy.width=10"])
    assert config.policy.width == 10
    assert hash(config) == hash(apply_overrides(Experiment(), ["policy.width=10"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.lora_rnk=16", "unknown config key 'policy.lora_rnk'; did you mean 'policy.lora_rank'"),
        ("lora_rank=16", "did you mean 'policy.lora_rank'"),
        ("policy.width.x=1", "unknown config key 'policy.width.x'"),
        ("polcy=1", "did you mean 'policy."),
        ("policy=1", "policy is a group of settings; set one of lora_rank, width"),
        ("policy.lora_rank", "has no '='"),
        ("policy.lora_rank=4.5", "policy.lora_rank must be int, got '4.5'"),
        ("policy.lora_rank=none", "policy.lora_rank must be int, got 'none'"),
        ("remat=1", "remat must be bool, got '1'"),
        ("clip=high", "clip must be float or none, got 'high'"),
        ("policy.towers=1,x", "policy.towers[1] must be int, got 'x'"),
        ("policy.window=1,2,3", "policy.window must be tuple[int, int] or none, got '1,2,3'"),
        ("dtype=float16", "dtype must be Literal['float32', 'bfloat16'], got 'float16'"),
        ("policy.width=3", "policy.width: width must be even, got 3"),
    ],
)
def test_bad_override_says_what_is_wrong(override, message):
    with pytest.raises(ConfigError) as raised:
        apply_overrides(Experiment(), [override])
    assert message in str(raised.value)


def test_dict_round_trip_through_json():
    config = apply_overrides(Experiment(teacher=Policy(width=2)), ["policy.window=3,4", "seed=none"])
    assert from_dict(Experiment, json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict(Experiment, {}) == Experiment()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": {"widht": 2}}, "unknown config key 'policy.widht'; did you mean 'width'"),
        ({"policy": {"width": "2"}}, "policy.width must be int, got '2'"),
        ({"policy": 3}, "policy must be Policy, got 3"),
        ({"remat": 1}, "remat must be bool, got 1"),
    ],
)
def test_from_dict_checks_names_and_types(values, message):
    with pytest.raises(ConfigError) as raised:
        from_dict(Experiment, values)
    assert message in str(raised.value)


def test_diff_names_every_difference():
    old = to_dict(Experiment())
    new = to_dict(apply_overrides(Experiment(), ["policy.lora_rank=32", "name=b"]))
    del new["clip"]
    assert diff_configs(old, old) == []
    assert diff_configs(old, new) == ['name: "debug", now "b"', "policy.lora_rank: 0, now 32", "clip: 1.0, now absent"]


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(["", "policy.", "name=", "policy.rates=", "policy.towers=[", "clip="]), st.text(max_size=80))
@example("policy.rates=", "[" * 100_000)
@example("policy.lora_rank=", "9" * 5000)
@example("clip=", "9" * 400)
def test_arbitrary_text_gives_a_config_or_a_config_error(key, text):
    try:
        config = apply_overrides(Experiment(), [key + text])
    except WorldEnvError:
        return
    assert isinstance(config, Experiment)
