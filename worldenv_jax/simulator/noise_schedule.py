# SPDX-License-Identifier: Apache-2.0
"""Noise schedule, v-prediction and DDIM steps; tables are NumPy float64, everything else is pure.

Sources: Ho et al. 2020, Salimans & Ho 2022 (v-prediction), Lin et al. 2024 (zero-terminal SNR, trailing timesteps,
guidance rescale), Song et al. 2021 (DDIM), DynamiCrafter (dynamic rescale, Apache-2.0).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.types import Array


@dataclass(frozen=True)
class ScheduleConfig:
    """The defaults are EVAC's."""

    steps: int = 1000
    beta_first: float = 0.00085
    beta_last: float = 0.012
    # x0 is multiplied by a factor that falls from 1 to `base_scale` over the first `turning_step` steps; 1: off.
    base_scale: float = 0.7
    turning_step: int = 400


class Schedule(NamedTuple):
    """Tables over the training steps."""

    betas: np.ndarray  # float64 [steps]
    alphas_cumprod: np.ndarray  # float64 [steps]; the last is exactly 0
    x0_scale: np.ndarray  # float64 [turning_step + steps], of which the first `steps` are used


class DDIMTables(NamedTuple):
    """One row per denoising step, in the order of execution (descending noise); a pytree to scan over."""

    t: np.ndarray | Array  # int32 [S]
    alpha: np.ndarray | Array  # alphas_cumprod at t
    alpha_next: np.ndarray | Array  # alphas_cumprod after the step
    sigma: np.ndarray | Array  # of the fresh noise
    direction: np.ndarray | Array  # of the predicted noise, sqrt(1 - alpha_next - sigma^2)
    scale: np.ndarray | Array  # x0_scale at t
    scale_next: np.ndarray | Array  # x0_scale after the step


def noise_schedule(config: ScheduleConfig) -> Schedule:
    """Scaled-linear betas, rescaled to zero terminal SNR."""
    betas = np.linspace(config.beta_first**0.5, config.beta_last**0.5, config.steps) ** 2
    root = np.sqrt(np.cumprod(1.0 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alphas_cumprod = root**2
    alphas = np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    falling = np.linspace(1.0, config.base_scale, config.turning_step)
    scale = np.concatenate([falling, np.full(config.steps, config.base_scale)])
    return Schedule(1.0 - alphas, alphas_cumprod, scale)


def trailing_timesteps(config: ScheduleConfig, count: int) -> np.ndarray:
    """`count` evenly spaced steps that end at the last training step, ascending, int [count]."""
    return np.flip(np.round(np.arange(config.steps, 0, -config.steps / count))).astype(np.int64) - 1


def ddim_tables(config: ScheduleConfig, count: int, eta: float, land_on_x0: bool = False) -> DDIMTables:
    """Tables of a DDIM run of `count` steps.

    Args:
        eta: 0 is deterministic, 1 has the noise of ancestral sampling.
        land_on_x0: the last step returns x0 itself. Differs from EVAC, whose last step keeps the noise of step 0.
    """
    schedule = noise_schedule(config)
    # The published tables are made from the float32 schedule.
    cumprod = schedule.alphas_cumprod.astype(np.float32).astype(np.float64)
    t = trailing_timesteps(config, count)
    alpha, scale = cumprod[t], schedule.x0_scale[t]
    alpha_next = np.concatenate([[1.0 if land_on_x0 else cumprod[0]], alpha[:-1]])
    scale_next = np.concatenate([scale[:1], scale[:-1]])
    sigma = eta * np.sqrt((1.0 - alpha_next) / (1.0 - alpha) * (1.0 - alpha / alpha_next))
    # In float64: with eta 1 the first step's radicand is 0, and float32 would leave the root of its rounding error.
    direction = np.sqrt(np.maximum(1.0 - alpha_next - sigma**2, 0.0))
    rows = (t.astype(np.int32), alpha, alpha_next, sigma, direction, scale, scale_next)
    return DDIMTables(*(np.flip(row) for row in rows))


def add_noise(x0: Array, noise: Array, alpha: Array) -> Array:
    """q(x_t | x_0); `alpha` = alphas_cumprod[t], broadcastable."""
    return jnp.sqrt(alpha) * x0 + jnp.sqrt(1.0 - alpha) * noise


def v_target(x0: Array, noise: Array, alpha: Array) -> Array:
    """v = sqrt(a) eps - sqrt(1 - a) x0."""
    return jnp.sqrt(alpha) * noise - jnp.sqrt(1.0 - alpha) * x0


def x0_from_v(x: Array, v: Array, alpha: Array) -> Array:
    """x0 = sqrt(a) x - sqrt(1 - a) v."""
    return jnp.sqrt(alpha) * x - jnp.sqrt(1.0 - alpha) * v


def noise_from_v(x: Array, v: Array, alpha: Array) -> Array:
    """eps = sqrt(a) v + sqrt(1 - a) x."""
    return jnp.sqrt(alpha) * v + jnp.sqrt(1.0 - alpha) * x


def ddim_step(x: Array, v: Array, noise: Array, step: DDIMTables) -> tuple[Array, Array]:
    """One DDIM step.

    Args:
        x, v, noise: the same shape; noise is standard normal.
        step: one row of `ddim_tables`, scalars.
    Returns: x after the step, and the (rescaled) x0 that was predicted.
    """
    x0 = x0_from_v(x, v, step.alpha) * (step.scale_next / step.scale)
    x = jnp.sqrt(step.alpha_next) * x0 + step.direction * noise_from_v(x, v, step.alpha) + step.sigma * noise
    return x, x0


def guide(conditional: Array, unconditional: Array, guidance: float, rescale: float) -> Array:
    """Classifier-free guidance with its standard deviation pulled back (Lin et al. 2024, section 3.4).

    Predictions are [B, V, ...]; statistics are taken per trajectory and view over everything else.
    """
    guided = unconditional + guidance * (conditional - unconditional)
    axes = tuple(range(2, guided.ndim))
    factor = jnp.std(conditional, axes, ddof=1, keepdims=True) / jnp.std(guided, axes, ddof=1, keepdims=True)
    return guided * (rescale * factor + 1.0 - rescale)


def sinusoid_steps(uniform: Array, divisor: Array, config: ScheduleConfig) -> Array:
    """Noise steps for history frames: half of the draws are 0, the rest reach steps / divisor.

    Args:
        uniform: float in [0, 1), [..., F].
        divisor: integer, broadcastable to `uniform`.
    Returns: int32 [..., F], ascending over the history.
    """
    angle = jnp.clip(3.14 * uniform - 1.57, 0.0, 1.57)
    return jnp.sort(jnp.floor((1.0 - jnp.cos(angle)) * config.steps / divisor).astype(jnp.int32), axis=-1)


def as_float32(tables: DDIMTables) -> DDIMTables:
    """The tables as float32 device arrays (the steps stay int32)."""
    return jax.tree.map(lambda row: jnp.asarray(row, jnp.int32 if row.dtype == np.int32 else jnp.float32), tables)


def schedule_buffers(schedule: Schedule) -> dict[str, np.ndarray]:
    """The schedule as published checkpoints store it: float64 tables under their buffer names.

    Entries that a zero terminal SNR leaves undefined are not there.
    """
    betas, cumprod = schedule.betas, schedule.alphas_cumprod
    previous = np.append(1.0, cumprod[:-1])
    variance = betas * (1.0 - previous) / (1.0 - cumprod)
    with np.errstate(divide="ignore"):
        logarithm = np.log(1.0 - cumprod)
    return {
        "scale_arr": schedule.x0_scale,
        "betas": betas,
        "alphas_cumprod": cumprod,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - cumprod),
        "log_one_minus_alphas_cumprod": logarithm,
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1.0 - cumprod),
        "posterior_mean_coef2": (1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - cumprod),
    }
