# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: exact round trips, damage, another config, another mesh, a full disk."""

import json
import random
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from worldenv_jax.checkpoints import Checkpointer, CheckpointError, load_params

CONFIG = {"policy": {"width": 8, "towers": [1, 2]}, "seed": 0}


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    ema: Any
    key: Any


def make_state(step: int, width: int = 8) -> State:
    kernel = jnp.arange(16.0 * width).reshape(16, width) + step
    params = {"dense": {"kernel": kernel, "bias": jnp.ones(width, jnp.bfloat16)}, "head.0": jnp.zeros(3)}
    ema = {"dense": {"kernel": kernel + 0.5, "bias": None}, "head.0": None}
    return State(jnp.int32(step), params, optax.adamw(1e-3).init(params), ema, jax.random.key(step))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 10, 20, 30 saved and two of them kept."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpointer(folder, CONFIG, keep=2) as checkpointer:
        for step in (10, 20, 30):
            checkpointer.save(step, make_state(step), {"position": step * 4, "statistics": {"q01": [0.1, -1.0]}})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def test_round_trip_keeps_keys_dtypes_and_metadata(folder):
    with Checkpointer(folder, CONFIG) as checkpointer:
        restored = checkpointer.restore_latest(abstract(make_state(0)))
    assert restored.step == 30
    assert_same(restored.state, make_state(30))
    assert restored.metadata["position"] == 120
    assert restored.metadata["statistics"] == {"q01": [0.1, -1.0]}
    assert sorted(path.name for path in (folder / "last").iterdir()) == ["20", "30"]


def test_empty_folder_restores_nothing(tmp_path):
    with Checkpointer(tmp_path, CONFIG) as checkpointer:
        assert checkpointer.restore_latest(abstract(make_state(0))) is None
        assert checkpointer.latest_step is None


@pytest.mark.parametrize("damage", ["truncate", "delete", "flip"])
def test_any_damaged_file_falls_back_to_the_step_before(folder, damage, caplog):
    step = folder / "last" / "30"
    ignored = {"commit_success.txt", "_CHECKPOINT_METADATA"}
    candidates = sorted(p for p in step.rglob("*") if p.is_file() and p.name not in ignored)
    victim = random.Random(damage).choice([p for p in candidates if p.stat().st_size > 100])
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 255
    victim.write_bytes(data[: len(data) // 2] if damage == "truncate" else data)
    if damage == "delete":
        victim.unlink()
    with Checkpointer(folder, CONFIG) as checkpointer:
        restored = checkpointer.restore_latest(abstract(make_state(0)))
        assert restored.step == 20
        assert_same(restored.state, make_state(20))
        checkpointer.save(30, make_state(31))
        checkpointer.wait()
        assert_same(checkpointer.restore_latest(abstract(make_state(0))).state, make_state(31))
    assert "30 is unreadable" in caplog.text and "using step 20" in caplog.text
    assert (folder / "last" / "corrupt-30").is_dir()


def test_every_step_damaged_is_one_error_and_deletes_nothing(folder):
    for step in ("20", "30"):
        (folder / "last" / step / "metadata" / "metadata").write_text("{")
    with Checkpointer(folder, CONFIG) as checkpointer, pytest.raises(CheckpointError) as raised:
        checkpointer.restore_latest(abstract(make_state(0)))
    assert "no readable checkpoint" in str(raised.value) and "step 20" in str(raised.value)
    assert sorted(path.name for path in (folder / "last").iterdir()) == ["20", "30"]


def test_half_written_step_is_ignored_and_removed(folder):
    shutil.copytree(folder / "last" / "30", folder / "last" / "40.orbax-checkpoint-tmp")
    with Checkpointer(folder, CONFIG) as checkpointer:
        assert checkpointer.restore_latest(abstract(make_state(0))).step == 30
    assert not (folder / "last" / "40.orbax-checkpoint-tmp").exists()


def test_another_config_names_the_keys(folder):
    other = {"policy": {"width": 16, "towers": [1, 2]}, "seed": 0, "lora": True}
    with Checkpointer(folder, other) as checkpointer, pytest.raises(CheckpointError) as raised:
        checkpointer.restore_latest(abstract(make_state(0)))
    assert "policy.width: 8, now 16; lora: absent, now true" in str(raised.value)


def test_another_structure_names_the_arrays(folder):
    state = make_state(0, width=4)
    state.params["extra"] = jnp.zeros(2)
    with Checkpointer(folder, CONFIG) as checkpointer, pytest.raises(CheckpointError) as raised:
        checkpointer.restore_latest(abstract(state))
    assert "params.dense.kernel is float32[16, 8], now float32[16, 4]" in str(raised.value)
    assert "params.extra is not in the checkpoint" in str(raised.value)


def test_restored_on_another_mesh(folder):
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, P("fsdp") if x.shape == (16, 8) else P())
        ),
        make_state(0),
    )
    with Checkpointer(folder, CONFIG) as checkpointer:
        state = checkpointer.restore_latest(wanted).state
    assert_same(state, make_state(30))
    assert state.params["dense"]["kernel"].sharding.spec == P("fsdp")
    assert state.params["dense"]["kernel"].addressable_shards[0].data.shape == (8, 8)


def test_params_alone_prefer_the_moving_average(folder):
    params, metadata = load_params(folder)
    assert set(params) == {"dense", "head.0"}
    assert metadata["config"] == CONFIG
    expected = make_state(30)
    np.testing.assert_array_equal(params["dense"]["kernel"], expected.ema["dense"]["kernel"])
    np.testing.assert_array_equal(params["dense"]["bias"], expected.params["dense"]["bias"])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), expected.params)
    params, _ = load_params(folder, wanted)
    assert jax.tree.structure(params) == jax.tree.structure(wanted)
    assert params["dense"]["kernel"].dtype == jnp.bfloat16


def test_params_of_another_shape_or_folder_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="dense.kernel is float32"):
        load_params(folder, abstract(make_state(0, width=4).params))
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        load_params(tmp_path / "nothing")


def test_best_slot_keeps_the_highest_score_beside_the_last(tmp_path):
    with Checkpointer(tmp_path, CONFIG, keep=1, asynchronous=False) as checkpointer:
        kept = []
        for step, score in [(1, 0.2), (2, 0.5), (3, 0.5), (4, 0.1)]:
            checkpointer.save(step, make_state(step))
            kept.append(checkpointer.save_best(step, make_state(step), score))
        assert kept == [True, True, False, False]
        assert checkpointer.save_best(2, make_state(7), 0.6)  # the same step again, better
    with Checkpointer(tmp_path, CONFIG) as checkpointer:
        assert checkpointer.best_score == 0.6
        best = checkpointer.restore_best(abstract(make_state(0)))
        assert_same(best.state, make_state(7))
        assert (best.step, checkpointer.latest_step) == (2, 4)
    assert load_params(tmp_path)[1]["score"] == 0.6
    assert "score" not in load_params(tmp_path, best=False)[1]


def test_full_disk_is_a_clear_error_and_the_step_before_remains(tmp_path):
    program = """
import resource, signal, sys
import jax.numpy as jnp, numpy as np
from worldenv_jax.checkpoints import Checkpointer
from worldenv_jax.errors import run_main

def main():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    noise = lambda n: {"params": {"noise": jnp.asarray(np.random.default_rng(0).normal(size=n))}}
    with Checkpointer(sys.argv[1]) as checkpointer:
        checkpointer.save(1, noise(10))
        checkpointer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        checkpointer.save(2, noise(1_000_000))

run_main(main)
"""
    result = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: cannot write a checkpoint")
    assert "Traceback" not in result.stderr
    assert [path.name for path in (tmp_path / "last").iterdir()] == ["1"]
    assert load_params(tmp_path)[0]["noise"].shape == (10,)


def test_metadata_is_plain_json(folder):
    assert json.loads((folder / "last" / "30" / "metadata" / "metadata").read_text())["config"] == CONFIG
