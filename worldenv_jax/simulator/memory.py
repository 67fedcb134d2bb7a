# SPDX-License-Identifier: Apache-2.0
"""Sparse memory: which earlier frames the denoiser sees (EVAC: the first, those at one and two thirds, the last)."""

import jax.numpy as jnp
import numpy as np

from worldenv_jax.types import Array


def memory_slots(count: int | Array, history: int) -> np.ndarray | Array:
    """Slots n * k // (F - 1) for k = 0 .. F - 2, and the last slot.

    Args:
        count: n, the number of filled slots, at least 1; a Python integer or a traced int32 scalar.
        history: F, at least 2.
    Returns: int [F], NumPy for a Python integer.
    """
    library = jnp if isinstance(count, jnp.ndarray) else np
    spread = count * library.arange(history - 1) // (history - 1)
    return library.append(spread, count - 1)


def history_steps(step: int, history: int) -> np.ndarray:
    """The same memory as episode steps: what the denoiser sees when it predicts frame `step` + 1 and later.

    A roll-out begins with the first frame in all F slots; step s of the episode then sits in slot F - 1 + s.

    Returns: int [F]; the last is `step` itself.
    """
    return np.maximum(memory_slots(history + step, history) - (history - 1), 0)
