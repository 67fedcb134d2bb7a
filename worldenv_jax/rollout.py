# SPDX-License-Identifier: Apache-2.0
"""Imagination: policy -> simulator -> reflector, chunk after chunk, in one `lax.scan` (World-Env, section 1.1).

The three models arrive as functions (`types.PolicyFn`, `SimulatorFns`, `ReflectorFns`), so this file knows no network.
A recorded action sequence in the policy's place gives open-loop prediction through the same code.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from worldenv_jax.types import (
    ACTION_DIM,
    Array,
    Observation,
    PolicyFn,
    PolicyStep,
    Prediction,
    ReflectorFns,
    Rollout,
    SimulatorFns,
    Starts,
)


@dataclass(frozen=True)
class RolloutConfig:
    """How trajectories are imagined."""

    num_chunks: int = 6  # T, the horizon in chunks
    samples: int = 8  # G, trajectories per start (the LOOP group; the paper's N)
    threshold: float = 0.5  # eta: a trajectory ends at the first frame with R > eta
    early_stop: bool = True  # False: every trajectory runs to the horizon (ablation)
    reward: str = "continuous"  # "continuous": R at the end; "binary": 1 where R > eta, else 0 (ablation)

    def __post_init__(self):
        if self.reward not in ("continuous", "binary"):
            raise ValueError(f"reward must be 'continuous' or 'binary', got {self.reward!r}")
        if self.num_chunks < 1 or self.samples < 1:
            raise ValueError(f"num_chunks and samples must be positive, got {self.num_chunks}, {self.samples}")


class RolloutParams(NamedTuple):
    """Parameters of the three models; only `policy` changes during post-training."""

    policy: Any
    simulator: Any
    reflector: Any


class _Carry(NamedTuple):
    images: Array  # [B, V, H, W, 3], the newest frame
    proprio: Array  # [B, 8]
    simulator: Any
    reflector: Any
    alive: Array  # [B], not yet ended
    reward: Array  # [B], R at the newest valid frame


def imagine_rollout(
    policy: PolicyFn | Array,
    simulator: SimulatorFns,
    reflector: ReflectorFns,
    params: RolloutParams,
    key: Array,
    starts: Starts,
    config: RolloutConfig,
) -> Rollout:
    """Imagines G trajectories from each of S starts, without leaving the device.

    Args:
      policy: a `PolicyFn`, or recorded normalised actions float32 [B, T, K, 7] to replay.
      simulator: the world that answers the actions.
      reflector: the judge of every frame.
      params: parameters of the three.
      key: one key (trajectory b uses the b-th of B keys split from it), or an array of B keys.
      starts: S first frames with their instructions.
      config: horizon, group size and the rule for ending.

    Returns:
      A `Rollout` of B = S * G trajectories. Frames, actions and statistics after the end of a trajectory are zero.
      The reward is R at the frame where R > eta first held, or R at the horizon.

    Raises:
      ValueError: recorded actions do not have the shape [B, config.num_chunks, K, 7].
    """
    starts = repeat_starts(starts, config.samples)
    batch = starts.task.shape[0]
    keys = key if key.ndim == 1 else jax.random.split(key, batch)
    chex.assert_shape(keys, (batch,))
    recorded = None if callable(policy) else _checked_actions(policy, batch, config)

    carry = _Carry(
        images=starts.images,
        proprio=starts.proprio,
        simulator=simulator.init(params.simulator, fold_in(keys, 0), starts),
        reflector=reflector.init(params.reflector, starts),
        alive=jnp.ones(batch, bool),
        reward=jnp.zeros(batch, jnp.float32),
    )

    def live_chunk(carry: _Carry, t: Array, actions: Array | None):
        observation = Observation(carry.images, carry.proprio, starts.policy_text)
        chunk_keys = fold_in(keys, t + 1)
        if actions is None:
            step = policy(params.policy, fold_in(chunk_keys, 0), observation)
        else:
            step = PolicyStep(actions, jnp.zeros(actions.shape[:2]), actions, jnp.zeros_like(actions))
        world, prediction = simulator.step(params.simulator, fold_in(chunk_keys, 1), carry.simulator, step.actions)
        judge, probability = reflector.judge(params.reflector, carry.reflector, prediction)
        valid, alive, reward = end_of_trajectories(probability, carry.alive, carry.reward, config)
        outputs = _mask_outputs(carry, step, prediction, probability, valid)
        newest = _Carry(prediction.frames[:, -1], prediction.proprio[:, -1], world, judge, alive, reward)
        return newest, outputs

    # Once every trajectory has ended, the remaining chunks cost nothing.
    shapes = jax.eval_shape(live_chunk, carry, jnp.int32(0), None if recorded is None else recorded[0])[1]

    def skipped_chunk(carry, t, actions):
        return carry, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def chunk(carry, inputs):
        return jax.lax.cond(carry.alive.any(), live_chunk, skipped_chunk, carry, *inputs)

    carry, outputs = jax.lax.scan(chunk, carry, (jnp.arange(config.num_chunks), recorded))
    outputs = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), outputs)  # [T, B, ...] -> [B, T, ...]
    reward = carry.reward
    if config.reward == "binary":
        reward = (reward > config.threshold).astype(jnp.float32)
    return Rollout(
        observations=Observation(outputs.pop("images"), outputs.pop("start_proprio"), starts.policy_text),
        reward=reward,
        terminated=~carry.alive,
        length=outputs["valid"].sum((1, 2), dtype=jnp.int32),
        **outputs,
    )


def end_of_trajectories(
    probability: Array, alive: Array, reward: Array, config: RolloutConfig
) -> tuple[Array, Array, Array]:
    """Applies the rule "ends at the first frame with R > eta" to one chunk.

    Args:
      probability: float32 [B, K], R(o_1:t, g) of the chunk's frames.
      alive: bool [B], not ended before this chunk.
      reward: float32 [B], R at the last valid frame so far.

    Returns:
      valid bool [B, K] (up to and including the ending frame), alive bool [B] after the chunk, reward float32 [B].
    """
    over = (probability > config.threshold) & config.early_stop
    ended_before = jnp.cumsum(over, axis=1) - over > 0
    valid = alive[:, None] & ~ended_before
    last = jnp.maximum(valid.sum(1) - 1, 0)
    newest = jnp.take_along_axis(probability, last[:, None], axis=1)[:, 0]
    return valid, alive & ~over.any(1), jnp.where(alive, newest, reward)


def repeat_starts(starts: Starts, samples: int) -> Starts:
    """S starts -> B = S * samples, the copies of a start next to each other."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=0), starts)


def fold_in(keys: Array, data: Array | int) -> Array:
    """`jax.random.fold_in` for an array of keys [B]."""
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


def _checked_actions(actions: Array, batch: int, config: RolloutConfig) -> Array:
    """[B, T, K, A] -> [T, B, K, A]."""
    if actions.ndim != 4 or actions.shape[:2] != (batch, config.num_chunks) or actions.shape[3] != ACTION_DIM:
        expected = f"[{batch}, {config.num_chunks}, K, {ACTION_DIM}]"
        raise ValueError(f"recorded actions must have the shape {expected}, got {list(actions.shape)}")
    return jnp.moveaxis(jnp.asarray(actions, jnp.float32), 1, 0)


def _mask_outputs(
    carry: _Carry, step: PolicyStep, prediction: Prediction, probability: Array, valid: Array
) -> dict[str, Array]:
    """The chunk's part of the `Rollout`, zero after the end of each trajectory."""

    def where_valid(leaf: Array, mask: Array) -> Array:
        mask = mask.reshape(mask.shape + (1,) * (leaf.ndim - mask.ndim))
        return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))

    masked = {
        "actions": step.actions,
        "log_prob": step.log_prob,
        "loc": step.loc,
        "log_scale": step.log_scale,
        "frames": prediction.frames,
        "proprio": prediction.proprio,
        "success_probability": probability,
    }
    outputs = {name: where_valid(leaf, valid) for name, leaf in masked.items()}
    outputs["images"] = where_valid(carry.images, carry.alive)
    outputs["start_proprio"] = where_valid(carry.proprio, carry.alive)
    outputs["valid"] = valid
    return outputs
