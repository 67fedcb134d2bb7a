# SPDX-License-Identifier: Apache-2.0
"""The benchmark prints one JSON line, and its separate parts do what the fused program does."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tools import benchmark
from tools.benchmarks import models
from tools.benchmarks import rollout as rollouts
from tools.benchmarks.measure import make_starts
from tools.benchmarks.rollout import NEVER, separate_parts
from worldenv_jax.configs import get_config
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.rollout import RolloutConfig, RolloutParams, imagine_rollout
from worldenv_jax.types import PolicyStep, Prediction, ReflectorFns, SimulatorFns

COMMON = {"benchmark", "config", "figure", "device", "commit", "repeats", "peak_rss_bytes", "shapes"}


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """The machine's rates are not what is tested here, and the compilation cache stays on."""
    for module in (models, rollouts):
        monkeypatch.setattr(module, "measure_machine", lambda *_: {"matmul_gflops": 100.0})
    monkeypatch.setattr(benchmark.jax.config, "update", lambda *_: None)


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


def test_a_model(monkeypatch, capsys):
    line = run(monkeypatch, capsys, "reflector", "--config=debug", "--batch=2", "--repeats=2")
    assert set(line) >= COMMON | {"seconds", "compile_seconds", "flops", "utilisation", "peak_bytes", "machine"}
    assert line[line["figure"]] > 0
    assert line["utilisation"] == pytest.approx(line["flops"] / line["seconds"] / 100e9)


def test_the_policy_and_its_update(monkeypatch, capsys):
    line = run(monkeypatch, capsys, "policy", "--config=debug", "--batch=2", "--repeats=1")
    assert 0 < line["language_model"]["flops"] < line["flops"] < line["update"]["flops"] < 5 * line["flops"]
    config = get_config("debug").policy
    assert line["tokens_per_second"] == pytest.approx(2 * config.sequence_length / line["seconds"])
    llama, tokens = config.llama, 2 * config.sequence_length
    products = 4 * llama.width**2 + 3 * llama.width * llama.mlp_width  # kv_heads = heads
    attention = 2 * config.sequence_length * llama.width
    assert line["language_model"]["flops"] == 2 * tokens * llama.layers * (products + attention)


def test_data(monkeypatch, capsys):
    line = run(monkeypatch, capsys, "data", "--config=debug", "--batch=2", "--repeats=1")
    assert set(line) >= COMMON
    assert min(line[f"{kind}_windows_per_second"] for kind in ("policy", "simulator", "reflector")) > 0


def test_loading(monkeypatch, capsys):
    line = run(monkeypatch, capsys, "load", "--config=debug", "--dtype=bfloat16")
    assert line["params_bytes"] == 2 * line["params"] > 0
    assert line["params_bytes"] / 4 < line["largest_shard_bytes"] < line["params_bytes"]
    assert line["peak_bytes"] >= line["before_bytes"] > 0


def test_bad_arguments(monkeypatch, capsys):
    with pytest.raises(WorldEnvError, match="at least 1"):
        run(monkeypatch, capsys, "policy", "--config=debug", "--repeats=0")
    with pytest.raises(WorldEnvError, match="did you mean 'debug'"):
        run(monkeypatch, capsys, "policy", "--config=debugg")


def test_separate_parts_equal_the_fused_program():
    """With three models of a few operations each, all of which use their key or their state."""

    def policy(params, keys, observation):
        noise = jax.vmap(lambda key: jax.random.normal(key, (4, 7)))(keys)
        actions = noise + params * observation.proprio[:, None, :7]
        return PolicyStep(actions, actions.sum(-1), actions, actions)

    def step(params, keys, state, actions):
        proprio = state + jnp.pad(jnp.cumsum(actions, 1), ((0, 0), (0, 0), (0, 1)))
        noise = jax.vmap(jax.random.uniform)(keys)[:, None, None]
        frames = jnp.clip(100.0 + 10.0 * proprio + noise, 0, 255).astype(jnp.uint8)
        return proprio[:, -1], Prediction(frames.reshape(*frames.shape[:2], 1, 2, 4, 1).repeat(3, -1), proprio)

    def judge(params, state, prediction):
        state = state + prediction.proprio.mean((1, 2))
        return state, jax.nn.sigmoid(state[:, None] + prediction.proprio[..., 0])

    simulator = SimulatorFns(lambda params, keys, starts: starts.proprio, step)
    reflector = ReflectorFns(lambda params, starts: jnp.zeros(len(starts.task)), judge)
    rollout = RolloutConfig(num_chunks=3, samples=2, threshold=NEVER)
    starts = make_starts(get_config("debug"), 2)
    starts = starts._replace(images=starts.images[..., :2, :4, :], proprio=np.full((2, 8), 0.3, np.float32))
    params = RolloutParams(0.5, None, None)
    whole = imagine_rollout(policy, simulator, reflector, params, jax.random.key(0), starts, rollout)
    separate = separate_parts(policy, simulator, reflector, rollout)
    frames, reward = separate(params, jax.random.key(0), starts)
    difference = np.abs(np.stack(frames, axis=1).astype(int) - np.asarray(whole.frames))
    assert difference.max() <= 1  # rounding to uint8
    np.testing.assert_allclose(reward, whole.reward, rtol=1e-5)
