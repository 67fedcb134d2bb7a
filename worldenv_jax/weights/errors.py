# SPDX-License-Identifier: Apache-2.0
"""The error of everything that reads checkpoints of others."""

from worldenv_jax.errors import WorldEnvError


class WeightsError(WorldEnvError, ValueError):
    """A checkpoint file that cannot be used as it is."""
