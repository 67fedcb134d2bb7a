# SPDX-License-Identifier: Apache-2.0
"""LOOP: leave-one-out advantages and the clipped Laplace-ratio loss (World-Env, section 1.5; LOOP, arXiv 2502.01600).

Arrays in, arrays out. No critic, no KL term, no normalisation of advantages: b_n = mean of the other rewards of the
group, A_n = R_n - b_n, and every valid step of trajectory n carries A_n.
"""

from dataclasses import dataclass

import chex
import jax.numpy as jnp

from worldenv_jax.types import Array


@dataclass(frozen=True)
class LoopConfig:
    """The loss."""

    clip: float = 0.1  # epsilon
    geometric_clip: bool = (
        False  # False: [1 - eps, 1 + eps] (World-Env, RIPT); True: [1 / (1 + eps), 1 + eps] (LOOP code)
    )
    min_contrast: float = 0.02  # a group whose rewards differ by no more than this teaches nothing and is dropped

    def __post_init__(self):
        if not 0.0 < self.clip < 1.0:
            raise ValueError(f"clip must lie in (0, 1), got {self.clip}")


def leave_one_out_advantages(rewards: Array) -> Array:
    """A_n = R_n - 1/(G-1) * sum of the other rewards of its group.

    Args:
      rewards: float32 [S, G], one reward per trajectory.

    Returns:
      float32 [S, G]; equals G/(G-1) * (R - mean of the group).

    Raises:
      ValueError: a group of one has no baseline.
    """
    chex.assert_rank(rewards, 2)
    group = rewards.shape[1]
    if group < 2:
        raise ValueError(f"leave-one-out needs at least 2 samples per start, got {group}")
    baseline = (rewards.sum(1, keepdims=True) - rewards) / (group - 1)
    return rewards - baseline


def groups_with_contrast(rewards: Array, config: LoopConfig) -> Array:
    """bool [S]: groups [S, G] whose best and worst rewards differ by more than `min_contrast`."""
    return rewards.max(1) - rewards.min(1) > config.min_contrast


def clipped_loss(
    log_prob: Array, behaviour_log_prob: Array, advantages: Array, valid: Array, config: LoopConfig
) -> tuple[Array, dict[str, Array]]:
    """-min(r A, clip(r) A), averaged over the valid steps of each trajectory, then over trajectories.

    Args:
      log_prob: float32 [B, T, K], current policy, summed over action dimensions (one ratio per timestep).
      behaviour_log_prob: float32 [B, T, K], of the policy that acted.
      advantages: float32 [B], one per trajectory, or [B, T], one per chunk (`critic`); zero for dropped groups.
      valid: bool [B, T, K]; steps after the end, and all steps of dropped groups, are False.

    Returns:
      (loss, metrics). Metrics: ratio_mean, ratio_max, clip_fraction (steps where the clip is active), kl (the
      estimator r - 1 - log r of KL(behaviour || current), non-negative) and kept (share of trajectories that count).
    """
    chex.assert_rank([log_prob, advantages], [3, {1, 2}])
    chex.assert_equal_shape([log_prob, behaviour_log_prob, valid])
    difference = jnp.where(valid, log_prob - behaviour_log_prob, 0.0)
    ratio = jnp.exp(difference)
    low = 1.0 / (1.0 + config.clip) if config.geometric_clip else 1.0 - config.clip
    advantage = advantages.reshape(len(advantages), -1, 1)
    unclipped = ratio * advantage
    clipped = jnp.clip(ratio, low, 1.0 + config.clip) * advantage
    per_step = jnp.where(valid, -jnp.minimum(unclipped, clipped), 0.0)

    steps = valid.sum((1, 2))
    counted = steps > 0
    per_trajectory = per_step.sum((1, 2)) / jnp.maximum(steps, 1)
    loss = per_trajectory.sum() / jnp.maximum(counted.sum(), 1)

    total = jnp.maximum(steps.sum(), 1)

    def mean(x):
        return jnp.where(valid, x, 0.0).sum() / total

    metrics = {
        "ratio_mean": mean(ratio),
        "ratio_max": jnp.where(valid, ratio, 0.0).max(),
        "clip_fraction": mean((clipped < unclipped).astype(jnp.float32)),
        "kl": mean(ratio - 1.0 - difference),
        "kept": counted.mean(),
    }
    return loss, metrics
