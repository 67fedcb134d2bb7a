# SPDX-License-Identifier: Apache-2.0
"""Configs are trees of frozen dataclasses: `--set` overrides, conversion to and from JSON, differences.

Every value is checked against its field's annotation: bool, int, float, str, Literal, tuple, None unions, dataclass.
"""

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from worldenv_jax.errors import WorldEnvError

Config = TypeVar("Config")


class ConfigError(WorldEnvError):
    """A config key that does not exist, or a value of the wrong type."""


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Returns `config` with fields replaced; later overrides win.

    Args:
        config: a frozen dataclass whose fields may be frozen dataclasses.
        overrides: `"dotted.key=value"`. Values: `true`/`false`, numbers, text, `none` where the field allows it;
            tuples as `1,2,4` or as a JSON list (`[["lora", 1e-4]]`).

    Raises:
        ConfigError: an unknown key (the message names the nearest one), or a value of the wrong type.
    """
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"override {override!r} has no '=': write key=value")
        config = _replace(config, key.strip().split("."), text.strip(), key.strip(), config)
    return config


def _replace(config: Any, path: list[str], text: str, key: str, root: Any) -> Any:
    hints = _fields(type(config))
    if path[0] not in hints:
        raise ConfigError(f"unknown config key {key!r}{_nearest(key, _keys(root))}")
    value, hint = getattr(config, path[0]), hints[path[0]]
    if len(path) > 1:
        if not dataclasses.is_dataclass(value):
            raise ConfigError(f"unknown config key {key!r}{_nearest(key, _keys(root))}")
        new = _replace(value, path[1:], text, key, root)
    elif dataclasses.is_dataclass(value) and text.lower() != "none":
        raise ConfigError(f"{key} is a group of settings; set one of {', '.join(_fields(type(value)))} in it")
    else:
        new = _convert(_read(text, hint), hint, key, text)
    return _build(type(config), {**_values(config), path[0]: new}, key)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested dicts of JSON values: tuples become lists, nothing else changes."""
    return {name: _to_json(value) for name, value in _values(config).items()}


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict`. Missing keys take the field's default.

    Raises:
        ConfigError: an unknown key, a missing one without a default, or a value of the wrong type.
    """
    return _from_dict(cls, values, prefix="")


def diff_configs(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One line per key at which two `to_dict` results differ, for example `policy.lora_rank: 16, now 32`."""
    old, new = dict(_flatten(saved)), dict(_flatten(current))
    keys = [*new, *(key for key in old if key not in new)]
    missing = object()
    show = lambda value: "absent" if value is missing else json.dumps(value)
    pairs = [(key, old.get(key, missing), new.get(key, missing)) for key in keys]
    return [f"{key}: {show(a)}, now {show(b)}" for key, a, b in pairs if a is missing or b is missing or a != b]


@functools.lru_cache(maxsize=256)
def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _values(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _fields(type(config))}


def _build(cls: type, values: dict[str, Any], key: str) -> Any:
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:  # a config that checks itself in __post_init__
        raise ConfigError(f"{key}: {error}" if key else str(error)) from error


def _keys(config: Any, prefix: str = "") -> Iterable[str]:
    for name, value in _values(config).items():
        if dataclasses.is_dataclass(value):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _nearest(key: str, keys: Iterable[str]) -> str:
    keys = list(keys)
    found = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    same_name = [other for other in keys if other.rpartition(".")[2] == key.rpartition(".")[2]]
    return f"; did you mean {(same_name or found)[0]!r}?" if keys else ""


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_tuple(hint: Any) -> bool:
    return hint is tuple or typing.get_origin(hint) is tuple


def _read(text: str, hint: Any) -> Any:
    """Text of a `--set` value as the JSON value that its annotation asks for, or the text itself."""
    options = _options(hint)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    if any(_is_tuple(option) for option in options):
        if text.startswith("["):
            return _read_json(text)
        items = [item.strip() for item in text.strip("()").split(",") if item.strip()]
        members = typing.get_args(next(option for option in options if _is_tuple(option)))
        return [_read(item, members[0] if members else str) for item in items]
    literals = [a for option in options if typing.get_origin(option) is typing.Literal for a in typing.get_args(option)]
    if str in options or text in literals:
        return text
    return _read_json(text.lower() if text.lower() in ("true", "false") else text)


def _read_json(text: str) -> Any:
    for reader in (json.loads, int, float):  # int and float also take 1_000, .5 and inf
        try:
            return reader(text)
        except (ValueError, RecursionError):
            continue
    return text


def _convert(value: Any, hint: Any, key: str, shown: Any) -> Any:
    """A JSON value as the Python value of its annotation."""
    for option in _options(hint):
        converted = _try_convert(value, option, key)
        if converted is not _MISMATCH:
            return converted
    raise ConfigError(f"{key} must be {_name(hint)}, got {shown!r}")


_MISMATCH = object()


def _try_convert(value: Any, option: Any, key: str) -> Any:
    if dataclasses.is_dataclass(option):
        return _from_dict(option, value, f"{key}.") if isinstance(value, Mapping) else _MISMATCH
    if _is_tuple(option):
        return _try_tuple(value, typing.get_args(option), key)
    if typing.get_origin(option) is typing.Literal:
        match = [a for a in typing.get_args(option) if type(a) is type(value) and a == value]
        return match[0] if match else _MISMATCH
    if option in (None, type(None)):
        return None if value is None else _MISMATCH
    if option is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            return _MISMATCH
    if option in (bool, int, float, str):
        return value if type(value) is option else _MISMATCH
    raise ConfigError(f"{key}: a config field of type {_name(option)} cannot be set from text")


def _try_tuple(value: Any, members: tuple[Any, ...], key: str) -> Any:
    if not isinstance(value, list | tuple):
        return _MISMATCH
    if not members:
        return tuple(value)
    if len(members) == 2 and members[1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        return _MISMATCH
    items = [_convert(item, member, f"{key}[{i}]", item) for i, (item, member) in enumerate(zip(value, members))]
    return tuple(items)


def _name(hint: Any) -> str:
    plain = lambda option: isinstance(option, type) and not typing.get_args(option)
    names = [option.__name__ if plain(option) else str(option) for option in _options(hint)]
    return " or ".join(name.replace("typing.", "").replace("NoneType", "none") for name in names)


def _from_dict(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    hints = _fields(cls)
    unknown = [name for name in values if name not in hints]
    if unknown:
        nearest = _nearest(str(unknown[0]), hints)
        raise ConfigError(f"unknown config key {prefix + str(unknown[0])!r}{nearest}")
    missing = sorted(_required(cls) - set(values))
    if missing:
        raise ConfigError(f"missing config keys: {', '.join(prefix + name for name in missing)}")
    converted = {name: _convert(value, hints[name], prefix + name, value) for name, value in values.items()}
    return _build(cls, converted, prefix.rstrip("."))


def _required(cls: type) -> set[str]:
    no_default = (dataclasses.MISSING, dataclasses.MISSING)
    return {f.name for f in dataclasses.fields(cls) if f.init and (f.default, f.default_factory) == no_default}


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_to_json(item) for item in value] if isinstance(value, tuple) else value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
