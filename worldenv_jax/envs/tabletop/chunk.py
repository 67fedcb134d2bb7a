# SPDX-License-Identifier: Apache-2.0
"""A chunk of commands for a batch of tables, with the frames, proprioception and verdicts that follow each command."""

from functools import partial

import jax
import jax.numpy as jnp

from worldenv_jax.envs.tabletop.config import TabletopConfig
from worldenv_jax.envs.tabletop.physics import step
from worldenv_jax.envs.tabletop.renderer import render
from worldenv_jax.envs.tabletop.world import TabletopState, proprioception, success
from worldenv_jax.types import Array, Prediction


def run_chunk(
    config: TabletopConfig, states: TabletopState, actions: Array, every_frame: bool = True
) -> tuple[TabletopState, Prediction]:
    """Executes environment actions float32 [B, K, 7].

    Args:
        config: the world.
        states: B tables.
        actions: clipped to [-1, 1]; gripper > 0 closes.
        every_frame: False draws the last frame only, and `frames` and `proprio` have one entry instead of K.

    Returns:
        The tables afterwards, and frames uint8 [B, K, 1, H, W, 3], proprio float32 [B, K, 8], success bool [B, K].
    """

    def advance(states, action):
        states = jax.vmap(partial(step, config))(states, action)
        frames = _render_all(config, states) if every_frame else None
        return states, (frames, jax.vmap(proprioception)(states), jax.vmap(success)(states))

    states, outputs = jax.lax.scan(advance, states, jnp.moveaxis(actions, 1, 0))
    frames, proprio, done = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), outputs)
    if not every_frame:
        frames, proprio = _render_all(config, states)[:, None], proprio[:, -1:]
    return states, Prediction(frames, proprio, done)


def _render_all(config: TabletopConfig, states: TabletopState) -> Array:
    return jax.vmap(partial(render, config))(states)
