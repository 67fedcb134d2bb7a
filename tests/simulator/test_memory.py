# SPDX-License-Identifier: Apache-2.0
"""Which frames the sparse memory holds, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.simulator.memory import history_steps, memory_slots


def test_slots_of_the_reference():
    """EVAC after one chunk of 16: n = 20."""
    assert memory_slots(20, 4).tolist() == [0, 6, 13, 19]
    assert memory_slots(4, 4).tolist() == [0, 1, 2, 3]


def test_traced_count():
    np.testing.assert_array_equal(jax.jit(lambda n: memory_slots(n, 4))(jnp.int32(20)), [0, 6, 13, 19])


def test_history_as_episode_steps():
    assert history_steps(0, 4).tolist() == [0, 0, 0, 0]
    assert history_steps(16, 4).tolist() == [0, 3, 10, 16]
