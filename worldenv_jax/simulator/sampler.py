# SPDX-License-Identifier: Apache-2.0
"""DDIM over one chunk, with the history held clean (EVAC); one `lax.scan` over the denoising steps."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from worldenv_jax.simulator.noise_schedule import DDIMTables, ddim_step
from worldenv_jax.types import Array


def sample_chunk(
    predict_v: Callable[[Array, Array], Array],
    image_latents: Array,
    start_noise: Array,
    step_noise: Array | None,
    tables: DDIMTables,
) -> tuple[Array, tuple[Array, Array]]:
    """Denoises the future frames of one chunk.

    Args:
        predict_v: (latents [B, V, T, h, w, c], step int32 []) to v, guidance included.
        image_latents: float [B, V, T, h, w, c]; its first T - K frames are the clean history.
        start_noise: float [B, V, K, h, w, c], standard normal.
        step_noise: float [S, B, V, T, h, w, c] in the order of execution, or None where every sigma is 0.
        tables: `noise_schedule.as_float32(ddim_tables(...))`.

    Returns: latents [B, V, T, h, w, c] with the history in front; and per step, for inspection, the latents before
        it and the predicted x0, [S, ...] each (free where they are not used).
    """
    history = image_latents.shape[2] - start_noise.shape[2]

    def step(x: Array, inputs: tuple[DDIMTables, Array | None]) -> tuple[Array, tuple[Array, Array]]:
        row, noise = inputs
        noise = jnp.zeros(()) if noise is None else noise
        stepped, x0 = ddim_step(x, predict_v(x, row.t), noise, row)
        stepped = jnp.concatenate([image_latents[:, :, :history], stepped[:, :, history:]], axis=2)
        return stepped, (x, x0)

    start = jnp.concatenate([image_latents[:, :, :history], start_noise], axis=2)
    return jax.lax.scan(step, start, (tables, step_noise))
