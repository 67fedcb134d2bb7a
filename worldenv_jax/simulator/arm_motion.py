# SPDX-License-Identifier: Apache-2.0
"""The arm's motion beyond the linear step: lag, joint limits, and the contacts that a picture of the hand foretells.

Differs from EVAC, which is told where the arm will be. Whether the fingers meet the table, the top of a can or its
sides is not in the commands. It is in the hand camera's last picture; without it fingers close on nothing, and the
policy in imagination never feels what it holds.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from worldenv_jax.simulator.grips import Grip
from worldenv_jax.types import Array, Params

MOTION_FEATURES = 6 + 7 + 7 + 1 + 3 + 6 + 1
SIGHT = 16  # numbers that are kept of the pictures


class ArmContext(NamedTuple):
    """What the arm's motion depends on besides the commands."""

    params: Params  # of `ArmMotion`
    previous_action: Array  # float32 [B, 7], environment action; zeros at the start of an episode
    pictures: Array  # float [B, P, V, h, w, c], latents of `motion_views`, the newest before every (K / P)-th action
    grip: Grip  # leaves [B], before the first action
    holds: Array | None = None  # float32 [B, K], the recorded `Grip.holds` after each action; None: decided here


class ArmMotion(nn.Module):
    """What the linear step misses: of the motion, in units of the steady one under a full command, and of the fingers.

    Starts at zero. Sees the last motion, the command and the one before it (a controller of second order needs both),
    the gripper, where the hand is (joint limits and the table are there), whether it holds something, and the sight of
    the chunk's beginning.
    """

    width: int

    def setup(self):
        self.patches = nn.Dense(32)
        self.conv1, self.conv2 = (nn.Conv(48, (3, 3), strides=2, name=f"conv{i}") for i in (1, 2))
        self.sight = nn.Dense(SIGHT)
        self.dense1, self.dense2 = nn.Dense(self.width), nn.Dense(self.width)
        self.out = nn.Dense(7, kernel_init=nn.initializers.zeros)
        self.grasp1, self.grasp2 = nn.Dense(self.width), nn.Dense(1, kernel_init=nn.initializers.zeros)

    def look(self, pictures: Array) -> Array:
        """Latents [..., V, h, w, c] of the newest known frames to float [..., `SIGHT`]."""
        *batch, views, rows, columns, channels = pictures.shape
        cells = jnp.moveaxis(pictures.reshape(-1, views, rows, columns, channels), 1, 3)
        hidden = nn.silu(self.patches(cells.reshape(-1, rows, columns, views * channels)))
        hidden = nn.silu(self.conv2(nn.silu(self.conv1(hidden))))
        return self.sight(hidden.reshape(len(hidden), -1)).reshape(*batch, SIGHT)

    def __call__(self, features: Array, sight: Array) -> Array:
        """Features float [B, `MOTION_FEATURES`] and sight [B, `SIGHT`] to float [B, 7], the last one the fingers'."""
        hidden = nn.gelu(self.dense1(jnp.concatenate([features, sight], axis=-1)))
        hidden = nn.gelu(self.dense2(hidden))
        return self.out(jnp.concatenate([hidden, features], axis=-1))

    def grasps(self, features: Array, sight: Array) -> Array:
        """The same to float [B]: logit of the probability that the closing hand will hold something."""
        return self.grasp2(nn.gelu(self.grasp1(jnp.concatenate([features, sight], axis=-1))))[:, 0]

    def initialise(self, features: Array, pictures: Array) -> tuple[Array, Array]:
        """Touches every parameter, once."""
        sight = self.look(pictures)
        return self(features, sight), self.grasps(features, sight)


def init_arm_motion(width: int, key: Array, pictures: tuple[int, ...]) -> Params:
    """Random parameters for latents of shape `pictures`, (V, h, w, c)."""
    inputs = jnp.zeros((1, MOTION_FEATURES)), jnp.zeros((1, *pictures))
    return ArmMotion(width).init(key, *inputs, method="initialise")["params"]


def motion_sight(params: Params, pictures: Array, steps: int) -> Array:
    """The sight at every step, [B, steps, `SIGHT`], from latents [B, P, V, h, w, c] of every (steps / P)-th step."""
    sight = ArmMotion(params["dense1"]["bias"].size).apply({"params": params}, pictures, method="look")
    return jnp.repeat(sight, steps // pictures.shape[1], axis=1)
