# SPDX-License-Identifier: Apache-2.0
"""The noise schedule against published numbers, and the algebra of v-prediction and DDIM."""

import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.simulator.noise_schedule import (
    ScheduleConfig,
    add_noise,
    as_float32,
    ddim_step,
    ddim_tables,
    guide,
    noise_from_v,
    noise_schedule,
    sinusoid_steps,
    trailing_timesteps,
    v_target,
    x0_from_v,
)


@pytest.mark.parametrize(
    ("step", "value"), [(0, 0.99915), (1, 0.998233446), (250, 0.652457015), (500, 0.241018783), (998, 1.96788806e-07)]
)
def test_alphas_cumprod(step, value):
    assert noise_schedule(ScheduleConfig()).alphas_cumprod[step] == pytest.approx(value, rel=1e-6)


def test_terminal_snr_is_exactly_zero():
    assert noise_schedule(ScheduleConfig()).alphas_cumprod[-1] == 0.0


def test_dynamic_rescale():
    scale = noise_schedule(ScheduleConfig()).x0_scale
    np.testing.assert_allclose(scale[[0, 100, 200, 399, 999]], [1, 0.924812, 0.849624, 0.7, 0.7], atol=1e-6)


def test_trailing_timesteps():
    config = ScheduleConfig()
    assert trailing_timesteps(config, 5).tolist() == [199, 399, 599, 799, 999]
    assert trailing_timesteps(config, 27)[[0, 12, 26]].tolist() == [36, 480, 999]


def test_v_recovers_x0_and_noise():
    x0, noise = np.random.default_rng(0).normal(size=(2, 50)).astype(np.float32)
    for alpha in (0.0, 0.3, 1.0):
        x, v = add_noise(x0, noise, alpha), v_target(x0, noise, alpha)
        np.testing.assert_allclose(x0_from_v(x, v, alpha), x0, atol=1e-6)
        np.testing.assert_allclose(noise_from_v(x, v, alpha), noise, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_with_a_perfect_model_lands_on_x0(eta):
    """A model that knows x0 is followed to it exactly, whatever the noise on the way."""
    config = ScheduleConfig(base_scale=1.0)
    tables = as_float32(ddim_tables(config, 4, eta, land_on_x0=True))
    x0, x, *noises = np.random.default_rng(1).normal(size=(6, 20)).astype(np.float32)
    for i in range(4):
        row = tables._replace(**{name: getattr(tables, name)[i] for name in tables._fields})
        noise = (x - np.sqrt(row.alpha) * x0) / np.sqrt(1 - row.alpha)
        x, predicted = ddim_step(x, v_target(x0, noise, row.alpha), noises[i], row)
        np.testing.assert_allclose(predicted, x0, atol=1e-5)
    np.testing.assert_allclose(x, x0, atol=1e-5)


def test_first_step_with_eta_one_forgets_the_start():
    """alphas_cumprod is 0 there, so the direction's factor is 0 on paper and must not be the root of a rounding."""
    assert ddim_tables(ScheduleConfig(), 5, 1.0).direction[0] < 1e-7


def test_guidance_without_rescale_is_extrapolation():
    conditional, unconditional = np.random.default_rng(2).normal(size=(2, 1, 1, 3, 2, 2, 4))
    np.testing.assert_allclose(
        guide(jnp.asarray(conditional), jnp.asarray(unconditional), 3.0, 0.0),
        unconditional + 3.0 * (conditional - unconditional),
        rtol=1e-5,
    )


def test_full_rescale_restores_the_deviation():
    conditional, unconditional = np.random.default_rng(3).normal(size=(2, 2, 1, 3, 2, 2, 4))
    guided = guide(jnp.asarray(conditional), jnp.asarray(unconditional), 7.5, 1.0)
    np.testing.assert_allclose(np.std(guided, axis=(2, 3, 4, 5)), np.std(conditional, axis=(2, 3, 4, 5)), rtol=1e-4)


def test_history_noise_is_half_the_time_zero_and_ascends():
    uniform = np.random.default_rng(4).random((1000, 4)).astype(np.float32)
    steps = np.asarray(sinusoid_steps(uniform, 3, ScheduleConfig()))
    assert (np.diff(steps, axis=1) >= 0).all() and steps.max() <= 333
    assert 0.45 < (steps == 0).mean() < 0.56
