# SPDX-License-Identifier: Apache-2.0
"""The pytrees that cross borders between components, the letters of their axes, and the function types.

Letters, the same in every file:

====  =======================================  ====  ==========================================
S     starts (first frames + instruction)      V     camera views
G     samples per start (the LOOP group)       F     frames given to a model as context
B     trajectories, B = S * G                  H W C image height, width, channels (3)
T     chunks in a rollout                      h w c latent height, width, channels
K     actions per chunk                        N     tokens
A     action dimensions (7)                    D L   model width, layers
====  =======================================  ====  ==========================================

Units: positions in metres, rotations as axis-angle vectors in radians, images uint8 RGB with the origin at the
top left, upright. Cameras use the OpenCV convention (x right, y down, z forward).

An *environment action* is LIBERO's OSC_POSE command: six pose deltas and a gripper command, each in [-1, 1], gripper
-1 = open and +1 = close. A *normalised action* is what the policy predicts: the six deltas mapped by the dataset's
q01/q99 to [-1, 1] and the gripper as 1 = open, 0 = close (`Statistics` maps between the two).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Params = Any  # nested dict of arrays

ACTION_DIM = 7
PROPRIO_DIM = 8


class Text(NamedTuple):
    """Tokenised instructions, right padded."""

    tokens: Array  # int32 [B, N]
    mask: Array  # bool [B, N], False on padding


class Camera(NamedTuple):
    """Pinhole cameras of one frame."""

    intrinsics: Array  # float32 [B, V, 3, 3], in pixels of the image they belong to
    pose: Array  # float32 [B, V, 4, 4], camera to world


class Observation(NamedTuple):
    """What the policy sees at the start of a chunk."""

    images: Array  # uint8 [B, V, H, W, 3]
    proprio: Array  # float32 [B, 8]: position (3), axis-angle (3), finger positions (2)
    text: Text  # the policy's prompt


class Starts(NamedTuple):
    """Where imagined trajectories begin."""

    images: Array  # uint8 [S, V, H, W, 3]
    proprio: Array  # float32 [S, 8]
    policy_text: Text
    reflector_text: Text
    camera: Camera
    task: Array  # int32 [S]
    environment: Any = ()  # true state, used only where a real environment stands in for the learned simulator
    photographs: Array | None = None  # uint8 [S, V, H', W', 3], `images` at another resolution


class PolicyStep(NamedTuple):
    """One chunk of actions and the distribution they came from."""

    actions: Array  # float32 [B, K, A], normalised, as sampled (not clipped)
    log_prob: Array  # float32 [B, K], summed over the action dimensions
    loc: Array  # float32 [B, K, A]
    log_scale: Array  # float32 [B, K, A], the scale that was sampled from (exploration factor included)


class Rollout(NamedTuple):
    """B = S * G imagined trajectories; sample g of start s is row s * G + g."""

    observations: Observation  # leaves [B, T, ...]: what the policy saw (text is [B, N], without T)
    actions: Array  # float32 [B, T, K, A], normalised
    log_prob: Array  # float32 [B, T, K] under the behaviour policy
    loc: Array  # float32 [B, T, K, A]
    log_scale: Array  # float32 [B, T, K, A]
    frames: Array  # uint8 [B, T, K, V, H, W, 3], the frame after each action
    proprio: Array  # float32 [B, T, K, 8], after each action
    success_probability: Array  # float32 [B, T, K], the reflector's R(o_1:t, g)
    valid: Array  # bool [B, T, K], True up to and including the frame at which the trajectory ended
    reward: Array  # float32 [B], R at the end (or at the horizon)
    terminated: Array  # bool [B], True where R > eta ended it before the horizon
    length: Array  # int32 [B], number of valid steps


class Statistics(NamedTuple):
    """q01/q99 of a dataset's standardised actions and proprioception, stored with every checkpoint."""

    action_q01: Array  # float32 [7]
    action_q99: Array  # float32 [7]
    proprio_q01: Array  # float32 [8]
    proprio_q99: Array  # float32 [8]

    def normalize_action(self, action: Array) -> Array:
        """Environment actions [..., 7] -> normalised, unclipped (OpenVLA-OFT, reference section 1.6)."""
        delta = self._scale(action[..., :6], self.action_q01[:6], self.action_q99[:6])
        return jnp.concatenate([delta, (1.0 - jnp.clip(action[..., 6:], 0.0, 1.0))], axis=-1)

    def unnormalize_action(self, action: Array) -> Array:
        """Normalised actions [..., 7] -> environment actions, deltas clipped to [-1, 1], gripper exactly -1 or +1."""
        low, high = self.action_q01[:6], self.action_q99[:6]
        delta = 0.5 * (action[..., :6] + 1.0) * (high - low + 1e-8) + low
        gripper = jnp.where(action[..., 6:] > 0.5, -1.0, 1.0)
        return jnp.concatenate([jnp.clip(delta, -1.0, 1.0), gripper], axis=-1)

    def normalize_proprio(self, proprio: Array) -> Array:
        """Raw proprioception [..., 8] -> [-1, 1], clipped."""
        return jnp.clip(self._scale(proprio, self.proprio_q01, self.proprio_q99), -1.0, 1.0)

    @staticmethod
    def _scale(x: Array, low: Array, high: Array) -> Array:
        scaled = 2.0 * (x - low) / (high - low + 1e-8) - 1.0
        return jnp.where(high > low, scaled, 0.0)


# A `key` below is an array of B keys, one per trajectory, so that a trajectory does not depend on its batch.

# (params, key [B], observation) -> PolicyStep
PolicyFn = Callable[[Params, Array, Observation], PolicyStep]


class Prediction(NamedTuple):
    """What a world returns for a chunk of actions."""

    frames: Array  # uint8 [B, K, V, H, W, 3], the frame after each action
    proprio: Array  # float32 [B, K, 8], after each action
    success: Array | None = None  # bool [B, K], known only where a real environment stands in for the simulator


class SimulatorFns(NamedTuple):
    """A world that can be stepped: the learned simulator, or a real environment behind the same border."""

    # (params, key [B], starts[B]) -> state; everything that is constant within a rollout is computed here
    init: Callable[[Params, Array, Starts], Any]
    # (params, key [B], state, normalised actions [B, K, A]) -> (state, Prediction)
    step: Callable[[Params, Array, Any, Array], tuple[Any, Prediction]]


# (frozen params, images float32 [B, V, H, W, 3] in [-1, 1]) -> tokens float [B, V, N, D]: any network that turns the
# frames a roll-out starts from into features of the scene's geometry (VGGT and its like)
GeometryFn = Callable[[Params, Array], Array]


class ReflectorFns(NamedTuple):
    """The judge: R(o_1:t, g) for every frame."""

    # (params, starts[B]) -> state; reads the instruction and the first frame
    init: Callable[[Params, Starts], Any]
    # (params, state, prediction) -> (state, success probability float32 [B, K])
    judge: Callable[[Params, Any, Prediction], tuple[Any, Array]]


class EpisodeSpec(NamedTuple):
    """Which episode to run: everything an environment needs to recreate its start."""

    task: int  # index into Environment.instructions
    seed: int  # start number within (task, split, starts)
    split: str = "train"  # "train" or "test": disjoint start states
    starts: str = "shifted"  # "official" or "shifted"; the tabletop has "shifted" only
    sample: int = 0  # one of several tries from the same start: the world begins alike, a sampling policy differs
