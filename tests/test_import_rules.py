# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, and what importing the package must not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "worldenv_jax"

# Part of the package -> the parts it may import besides itself, errors and files.
MODELS = {"types", "networks"}
PURE_DATA = {"data.tokenizer", "data.image_transforms"}  # functions of text and of images, no episodes
LIBRARY = {"types", "networks", "policy", "simulator", "reflector", "rollout", "loop_ppo", "critic", "mesh",
           "checkpoints", "metrics", "overrides", "data", "envs", "weights", "manifest", "params_file"}  # fmt: skip
ALLOWED = {
    "types": set(),
    "errors": set(),
    "files": set(),
    "networks": {"types", "mesh"},
    "policy": MODELS | PURE_DATA,
    "simulator": MODELS,
    "reflector": MODELS | PURE_DATA,
    "rollout": {"types"},
    "loop_ppo": {"types"},
    "critic": {"types"},
    "overrides": set(),
    "mesh": {"types"},
    "checkpoints": {"types", "overrides"},
    "metrics": {"types"},
    "manifest": set(),
    "params_file": {"types"},
    "data": {"types"},
    "envs": {"types", "data"},
    "weights": MODELS | {"policy", "simulator", "reflector"},
    "training": LIBRARY | {"evaluation", "configs"},
    "evaluation": LIBRARY,
}
FLAX = {"networks", "policy", "simulator", "reflector", "critic"}
NEVER = {"torch", "tensorflow", "dill", "cloudpickle", "experiments", "tools", "tests"}


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_import_direction(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = imports(path)
    roots = {name.partition(".")[0] for name in names}
    assert not roots & NEVER
    flax = {name for name in names if name.startswith("flax.") and "traverse_util" not in name}
    assert not flax or part in FLAX, "modules are seen by the model folders only"
    if part not in ALLOWED:  # __init__ and configs stand at the top
        return
    ours = {name.partition(".")[2] for name in names if name.startswith("worldenv_jax.")}
    allowed = ALLOWED[part] | {part, "errors", "files"}
    bad = {name for name in ours if not any(name == other or name.startswith(other + ".") for other in allowed)}
    assert not bad, f"{part} must not import {sorted(bad)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_data_is_executed(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"eval", "exec", "pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps"}


def test_every_part_of_the_package_has_a_rule():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert parts - set(ALLOWED) <= {"__init__", "configs"}


def test_importing_the_package_changes_and_starts_nothing():
    program = """
import os, sys
import jax, orbax.checkpoint  # these set variables of their own
before = dict(os.environ)
import worldenv_jax
import worldenv_jax.checkpoints, worldenv_jax.mesh, worldenv_jax.metrics
import worldenv_jax.training.loop
assert dict(os.environ) == before, "the environment was changed"
assert not jax._src.xla_bridge.backends_are_initialized(), "a device was touched"
heavy = {"torch", "tensorflow", "transformers", "wandb", "robosuite"} & set(sys.modules)
assert not heavy, heavy
from absl import flags
assert not flags.FLAGS.is_parsed()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
