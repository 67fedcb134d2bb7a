# SPDX-License-Identifier: Apache-2.0
"""One optimiser step against hand arithmetic; frozen parameters, groups, accumulation, the non-finite guard."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.training import train_state as ts
from worldenv_jax.training.train_state import OptimizerConfig


def make_params():
    return {
        "params": {"tower": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}, "head": {"kernel": jnp.ones((2, 1))}},
        "lora": {"tower": {"a": jnp.full((2, 1), 0.5)}},
    }


def linear_loss(params, key, batch):
    del key
    kernel = params["params"]["tower"]["kernel"] + params["lora"]["tower"]["a"]
    hidden = batch["x"] @ kernel + params["params"]["tower"]["bias"]
    loss = jnp.mean((hidden @ params["params"]["head"]["kernel"] - batch["y"]) ** 2)
    return loss, {"mean_x": batch["x"].mean()}


def make_batch(rows=8):
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(rows, 2)).astype(np.float32), "y": rng.normal(size=(rows, 1)).astype(np.float32)}


def test_adamw_step_by_hand():
    # Adam's first step moves every entry by lr * sign(g) (epsilon aside); decay adds lr * wd * value to matrices.
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, clip_norm=None, epsilon=0.0)
    params = {"kernel": jnp.array([[2.0, -1.0]]), "bias": jnp.array([3.0, 4.0])}
    state = ts.init_train_state(params, config, jax.random.key(0))
    gradients = {"kernel": jnp.array([[0.3, -0.2]]), "bias": jnp.array([5.0, -1.0])}
    state, metrics = ts.apply_gradients(state, gradients, config, loss=jnp.float32(1.0))
    np.testing.assert_allclose(state.params["kernel"], [[2 - 0.1 - 0.1, -1 + 0.1 + 0.05]], rtol=1e-5)
    np.testing.assert_allclose(state.params["bias"], [2.9, 4.1], rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], np.sqrt(0.09 + 0.04 + 25 + 1), rtol=1e-6)
    np.testing.assert_allclose(metrics["update_norm"], np.sqrt(0.2**2 + 0.15**2 + 0.1**2 + 0.1**2), rtol=1e-5)
    assert int(state.step) == 1


def test_groups_have_their_own_rates_and_the_first_match_wins():
    config = OptimizerConfig(
        learning_rate=1.0, group_learning_rates=(("head", 0.1), ("params", 0.01)), clip_norm=None, epsilon=0.0
    )
    params = make_params()
    state = ts.init_train_state(params, config, jax.random.key(0))
    state, _ = ts.apply_gradients(state, jax.tree.map(jnp.ones_like, params), config, loss=jnp.float32(0))
    moved = jax.tree.map(lambda new, old: float((old - new).ravel()[0]), state.params, params)
    assert moved["params"]["head"]["kernel"] == pytest.approx(0.1, rel=1e-5)
    assert moved["params"]["tower"]["bias"] == pytest.approx(0.01, rel=1e-5)
    assert moved["lora"]["tower"]["a"] == pytest.approx(1.0, rel=1e-5)


def test_clip_by_global_norm_limits_what_adam_sees():
    config = OptimizerConfig(learning_rate=1.0, clip_norm=1.0)
    params = {"a": jnp.zeros(2)}
    state = ts.init_train_state(params, config, jax.random.key(0))
    state, metrics = ts.apply_gradients(state, {"a": jnp.array([30.0, 40.0])}, config, loss=jnp.float32(0))
    np.testing.assert_allclose(state.opt_state[1].mu["a"], [0.1 * 0.6, 0.1 * 0.8], rtol=1e-6)
    assert float(metrics["gradient_norm"]) == 50.0


@pytest.mark.parametrize(
    ("config", "step", "rate"),
    [
        (OptimizerConfig(), 1000, 1.0),
        (OptimizerConfig(warmup_steps=4), 1, 0.25),
        (OptimizerConfig(warmup_steps=4), 9, 1.0),
        (OptimizerConfig(schedule="cosine", decay_steps=8), 0, 1.0),
        (OptimizerConfig(schedule="cosine", decay_steps=8), 4, 0.5),
        (OptimizerConfig(schedule="cosine", warmup_steps=2, decay_steps=10, final_fraction=0.2), 6, 0.6),
        (OptimizerConfig(schedule="cosine", decay_steps=8, final_fraction=0.1), 50, 0.1),
    ],
)
def test_schedule(config, step, rate):
    assert float(ts._schedule(config)(step)) == pytest.approx(rate, abs=1e-6)


def test_cosine_without_decay_steps_is_refused():
    with pytest.raises(ValueError, match="decay_steps > warmup_steps, got 0 and 0"):
        OptimizerConfig(schedule="cosine")


def test_frozen_parameters_have_no_gradient_state_or_average():
    config = OptimizerConfig(trainable=("lora", "head"), ema_decay=0.9)
    state = ts.init_train_state(make_params(), config, jax.random.key(0))
    assert state.opt_state[1].mu["params"]["tower"]["kernel"] is None
    assert state.ema["params"]["tower"]["bias"] is None
    step = ts.make_train_step(linear_loss, config)
    before = make_params()
    state, _ = step(state, make_batch())
    np.testing.assert_array_equal(state.params["params"]["tower"]["kernel"], before["params"]["tower"]["kernel"])
    assert not np.array_equal(state.params["lora"]["tower"]["a"], before["lora"]["tower"]["a"])
    expected = 0.9 * before["lora"]["tower"]["a"] + 0.1 * state.params["lora"]["tower"]["a"]
    np.testing.assert_allclose(state.ema["lora"]["tower"]["a"], expected, rtol=1e-6)
    averaged = ts.ema_params(state)
    np.testing.assert_array_equal(averaged["params"]["tower"]["kernel"], before["params"]["tower"]["kernel"])
    assert averaged["lora"]["tower"]["a"] is state.ema["lora"]["tower"]["a"]


def test_pattern_without_a_parameter_is_an_error():
    with pytest.raises(ValueError, match=r"patterns \['hed'\] match none of the 4 parameters"):
        ts.trainable_mask(make_params(), ("lora", "hed"))
    with pytest.raises(ValueError, match="match none"):
        ts.init_train_state(make_params(), OptimizerConfig(group_learning_rates=(("hed", 1.0),)), jax.random.key(0))


def test_partition_and_combine_are_inverse():
    params = make_params()
    trained, frozen = ts.partition(params, ts.trainable_mask(params, ("kernel$",)))
    assert len(jax.tree.leaves(trained)) == 2 and len(jax.tree.leaves(frozen)) == 2
    combined = ts.combine(trained, frozen)
    assert jax.tree.structure(combined) == jax.tree.structure(params)
    assert combined["params"]["tower"]["bias"] is params["params"]["tower"]["bias"]


def test_accumulated_gradient_is_that_of_the_whole_batch():
    whole, parts = (OptimizerConfig(micro_batches=n) for n in (1, 4))
    arguments = make_params(), jax.random.key(0), make_batch()
    loss, metrics, gradients = ts.value_and_grad(linear_loss, whole, *arguments)
    loss4, metrics4, gradients4 = ts.value_and_grad(linear_loss, parts, *arguments)
    np.testing.assert_allclose(loss, loss4, rtol=1e-6)
    np.testing.assert_allclose(metrics["mean_x"], metrics4["mean_x"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), gradients, gradients4)


def test_non_finite_step_changes_only_the_counters():
    config = OptimizerConfig(ema_decay=0.5, warmup_steps=3)
    step = ts.make_train_step(linear_loss, config)
    state, _ = step(ts.init_train_state(make_params(), config, jax.random.key(0)), make_batch())
    before = jax.tree.map(np.array, state._replace(key=0))
    bad = make_batch()
    bad["y"][3] = np.nan
    for row in (1, 2):
        state, metrics = step(state, bad)
        assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (row, row)
    after = jax.tree.map(np.array, state._replace(key=0))
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    state, metrics = step(state, make_batch())
    assert (int(state.step), int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (4, 2, 0)


def test_too_many_skips_in_a_row_stop_the_run():
    ts.check_not_diverged({"skipped_in_a_row": 2.0}, 3)
    ts.check_not_diverged({}, 3)
    with pytest.raises(ts.TrainingDiverged, match="not finite in 3 steps in a row"):
        ts.check_not_diverged({"skipped_in_a_row": 3.0}, 3)
