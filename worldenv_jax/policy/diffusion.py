# SPDX-License-Identifier: Apache-2.0
"""The noise schedule and DDIM steps of OpenVLA-OFT's diffusion head (Song et al. 2021; diffusers' DDIMScheduler).

Squared-cosine schedule, epsilon prediction, x0 clipped to [-1, 1] with epsilon not re-derived, eta = 0, and the last
step goes to alpha = 1.
"""

import math

import jax.numpy as jnp
import numpy as np

from worldenv_jax.types import Array


def alphas_cumprod(steps: int) -> np.ndarray:
    """Cumulative products of the squared-cosine schedule (Nichol & Dhariwal 2021), float32 [steps]."""
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    return np.cumprod(1.0 - betas).astype(np.float32)


def add_noise(actions: Array, noise: Array, timestep: Array, steps: int) -> Array:
    """The forward process at `timestep` int32 [B]; actions and noise [B, K, A]."""
    alpha = jnp.asarray(alphas_cumprod(steps))[timestep][:, None, None]
    return jnp.sqrt(alpha) * actions + jnp.sqrt(1.0 - alpha) * noise


def ddim_step(x: Array, epsilon: Array, timestep: Array, steps: int) -> Array:
    """x at `timestep` (int32 scalar) -> x at `timestep` - 1."""
    table = jnp.asarray(np.concatenate([[1.0], alphas_cumprod(steps)]), jnp.float32)
    alpha, previous = table[timestep + 1], table[timestep]
    clean = jnp.clip((x - jnp.sqrt(1.0 - alpha) * epsilon) / jnp.sqrt(alpha), -1.0, 1.0)
    return jnp.sqrt(previous) * clean + jnp.sqrt(1.0 - previous) * epsilon


def timestep_embedding(timestep: Array, width: int) -> Array:
    """int32 [B] -> float32 [B, width]: sines, then cosines, of geometrically spaced frequencies."""
    half = width // 2
    frequency = jnp.exp(-math.log(1e4) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
    angle = timestep[:, None].astype(jnp.float32) * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
