# SPDX-License-Identifier: Apache-2.0
"""The Laplace distribution of actions: density and samples. Source: RIPT-VLA, section 4.2."""

import math

import jax
import jax.numpy as jnp

from worldenv_jax.types import Array


def laplace_log_prob(actions: Array, loc: Array, log_scale: Array) -> Array:
    """-log b - |a - loc| / b - log 2 with b = exp(log_scale), per dimension; all arrays [..., A]."""
    return -log_scale - jnp.abs(actions - loc) * jnp.exp(-log_scale) - math.log(2.0)


def sample_laplace(key: Array, loc: Array, log_scale: Array) -> Array:
    """One sample per element of loc [B, ..., A]; row b depends on key[b] only (key: B keys)."""
    noise = jax.vmap(lambda k: jax.random.laplace(k, loc.shape[1:], loc.dtype))(key)
    return loc + jnp.exp(log_scale) * noise


@jax.custom_vjp
def clip_log_scale(log_scale: Array, low: float, high: float) -> Array:
    """clip(log_scale, low, high), with a gradient outside the range wherever descent leads back inside.

    The scale head starts at log b = -3, below the usual range: a plain clip would keep it there for ever.
    """
    return jnp.clip(log_scale, low, high)


def _clip_forward(log_scale: Array, low: float, high: float) -> tuple[Array, tuple]:
    return jnp.clip(log_scale, low, high), (log_scale, low, high)


def _clip_backward(residuals: tuple, gradient: Array) -> tuple[Array, None, None]:
    log_scale, low, high = residuals
    outward = ((log_scale < low) & (gradient > 0)) | ((log_scale > high) & (gradient < 0))
    return jnp.where(outward, 0.0, gradient), None, None


clip_log_scale.defvjp(_clip_forward, _clip_backward)
