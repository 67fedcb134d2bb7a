# SPDX-License-Identifier: Apache-2.0
"""The arm's motion beyond the linear step: lag, joint limits, and the contacts that a picture of the hand foretells.

Differs from EVAC, which is told where the arm will be. Whether the fingers meet the table, the top of a can or its
sides is not in the commands. It is in the hand camera's last picture; without it fingers close on nothing, and the
policy in imagination never feels what it holds.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from worldenv_jax.simulator.glance import CHANNELS, Glance, GlanceFn
from worldenv_jax.simulator.grips import Grip
from worldenv_jax.types import Array, Params

MOTION_FEATURES = 6 + 7 + 7 + 1 + 3 + 6 + 1
SIGHT = 16  # numbers that are kept of the pictures for the motion
GRASP_WIDTH = 64  # ... and for the grasp
GRASP_DROPOUT = 0.5  # a few hundred closings are soon learned by heart


class ArmContext(NamedTuple):
    """What the arm's motion depends on besides the commands."""

    params: Params  # of `ArmMotion`
    previous_action: Array  # float32 [B, 7], environment action; zeros at the start of an episode
    pictures: Array  # float [B, P, V, h, w, c], latents of `motion_views`, the newest before every (K / P)-th action
    grip: Grip  # leaves [B], before the first action
    glance: GlanceFn | None = None  # for the grasp; None where the parameters were made without, or holds are given
    holds: Array | None = None  # float32 [B, K], the recorded `Grip.holds` after each action; None: decided here
    dropout: Array | None = None  # a key: training; None: nothing is dropped


class ArmMotion(nn.Module):
    """What the linear step misses: of the motion, in units of the steady one under a full command, and of the fingers.

    Starts at zero. Sees the last motion, the command and the one before it (a controller of second order needs both),
    the gripper, where the hand is (joint limits and the table are there), whether it holds something, and the sight of
    the chunk's beginning. The grasp is foretold by a network of its own: what motion needs to see is another thing.
    """

    width: int

    def setup(self):
        self.patches = nn.Dense(32)
        self.conv1, self.conv2 = (nn.Conv(48, (3, 3), strides=2, name=f"conv{i}") for i in (1, 2))
        self.sight = nn.Dense(SIGHT)
        self.dense1, self.dense2 = nn.Dense(self.width), nn.Dense(self.width)
        self.out = nn.Dense(7, kernel_init=nn.initializers.zeros)
        self.grasp_conv1 = nn.Conv(48, (5, 5), strides=2)
        self.grasp_conv2 = nn.Conv(48, (3, 3), strides=2)
        self.dropout = nn.Dropout(GRASP_DROPOUT)
        self.grasp_sight, self.grasp_features = nn.Dense(GRASP_WIDTH), nn.Dense(GRASP_WIDTH, use_bias=False)
        self.grasp_glance, self.grasp_seen = Glance(), nn.Dense(GRASP_WIDTH, use_bias=False)
        self.grasp_out = nn.Dense(1, kernel_init=nn.initializers.zeros)

    def look(self, pictures: Array, train: bool = False) -> tuple[Array, Array]:
        """Latents [..., V, h, w, c] of the newest known frames to float [..., `SIGHT`] and [..., `GRASP_WIDTH`]."""
        *batch, views, rows, columns, channels = pictures.shape
        cells = jnp.moveaxis(pictures.reshape(-1, views, rows, columns, channels), 1, 3)
        cells = cells.reshape(-1, rows, columns, views * channels)
        motion = nn.silu(self.conv2(nn.silu(self.conv1(nn.silu(self.patches(cells))))))
        grasp = nn.silu(self.grasp_conv2(nn.silu(self.grasp_conv1(cells))))
        motion, grasp = (hidden.reshape(len(cells), -1) for hidden in (motion, grasp))
        grasp = self.grasp_sight(self.dropout(grasp, deterministic=not train))
        return self.sight(motion).reshape(*batch, SIGHT), grasp.reshape(*batch, GRASP_WIDTH)

    def __call__(self, features: Array, sight: Array) -> Array:
        """Features float [B, `MOTION_FEATURES`] and sight [B, `SIGHT`] to float [B, 7], the last one the fingers'."""
        hidden = nn.gelu(self.dense1(jnp.concatenate([features, sight], axis=-1)))
        hidden = nn.gelu(self.dense2(hidden))
        return self.out(jnp.concatenate([hidden, features], axis=-1))

    def grasps(self, features: Array, sight: Array, glances: Array | None = None, train: bool = False) -> Array:
        """Of features, sight [B, `GRASP_WIDTH`], glances [B, S, S, 6] at the hand, float [B]: will it hold something?

        The logit, once the hand has closed.
        """
        hidden = sight + self.grasp_features(features)
        if glances is not None:
            hidden += self.grasp_seen(self.dropout(self.grasp_glance(glances), deterministic=not train))
        return self.grasp_out(nn.silu(hidden))[:, 0]

    def initialise(self, features: Array, pictures: Array, glances: Array | None) -> tuple[Array, Array]:
        """Touches every parameter, once."""
        motion, grasp = self.look(pictures)
        return self(features, motion), self.grasps(features, grasp, glances)


def init_arm_motion(width: int, key: Array, pictures: tuple[int, ...], glance_size: int = 0) -> Params:
    """Random parameters for latents of shape `pictures`, (V, h, w, c); `glance_size`: S of glances, 0 for none."""
    glances = jnp.zeros((1, glance_size, glance_size, CHANNELS)) if glance_size else None
    inputs = jnp.zeros((1, MOTION_FEATURES)), jnp.zeros((1, *pictures)), glances
    return ArmMotion(width).init(key, *inputs, method="initialise")["params"]


def arm_sights(arm: ArmContext, steps: int) -> tuple[Array, Array]:
    """`ArmMotion.look` at every step, leaves [B, steps, ...]."""
    network, train = ArmMotion(arm.params["dense1"]["bias"].size), arm.dropout is not None
    keys = {"dropout": arm.dropout} if train else {}
    sights = network.apply({"params": arm.params}, arm.pictures, train, method="look", rngs=keys)
    return jax.tree.map(lambda sight: jnp.repeat(sight, steps // arm.pictures.shape[1], axis=1), sights)
