# SPDX-License-Identifier: Apache-2.0
"""The public names exist; the commands of README and results name scripts, tools and presets that exist."""

import re
from pathlib import Path

import worldenv_jax
from worldenv_jax.configs import PRESETS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PROSE = README + (ROOT / "experiments" / "results.md").read_text()


def test_public_names_exist():
    assert sorted(worldenv_jax.__all__) == worldenv_jax.__all__
    assert all(hasattr(worldenv_jax, name) for name in worldenv_jax.__all__)


def test_readme_commands_name_existing_files():
    named = set(re.findall(r"(?:experiments|tools|notebooks)/\w+\.(?:py|sh|md)", PROSE))
    assert named and not [name for name in named if not (ROOT / name).is_file()]


def test_readme_presets_and_targets_exist():
    presets = set(re.findall(r"--config=(\w+)", PROSE))
    assert presets <= set(PRESETS)
    targets = set(re.findall(r"(?:^|`)make ([\w-]+)", PROSE, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert {"quickstart", "test"} <= targets
    assert not [target for target in targets if f"\n{target}:" not in makefile]


def test_readme_files_of_the_package_exist():
    parts = set(re.findall(r"`((?:\w+/)*\w+\.py)`", PROSE))
    assert not [part for part in parts if not ((ROOT / "worldenv_jax" / part).is_file() or (ROOT / part).is_file())]
