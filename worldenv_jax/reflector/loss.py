# SPDX-License-Identifier: Apache-2.0
"""Training the reflector: binary cross-entropy per frame (World-Env: L = BCE(R(o_1:t, g), y_t))."""

import jax.numpy as jnp
import optax

from worldenv_jax.reflector.config import ReflectorConfig
from worldenv_jax.reflector.model import success_logits
from worldenv_jax.types import Array, Params, Text


def reflector_loss(
    config: ReflectorConfig,
    params: Params,
    frames: Array,
    text: Text,
    labels: Array,
    frame_mask: Array,
    frame_index: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Mean binary cross-entropy over the frames that are not padding.

    Args:
        frames: uint8 [B, F, V, H, W, 3].
        text: from `tokenize_reflector_prompts`.
        labels: bool [B, F], the task predicate at each frame.
        frame_mask: bool [B, F], False on padding, which follows the frames.
        frame_index: int32 [B, F], ascending, the times of the frames where some are left out; None: 0 .. F - 1.
            A few frames of many episodes teach more per second than whole episodes.

    Returns: loss float32 [], and scalars "loss", "accuracy" at R = 0.5, "false_positive_rate",
        "false_negative_rate" (both 0 where there is no such frame), "positive_fraction".
    """
    logits = success_logits(config, params, frames, text, frame_mask, frame_index)
    weight = frame_mask.astype(jnp.float32)
    total = jnp.maximum(weight.sum(), 1.0)
    entropy = optax.sigmoid_binary_cross_entropy(logits, labels.astype(jnp.float32))
    loss = (entropy * weight).sum() / total
    wrong = ((logits > 0.0) != labels) * weight
    positive = labels * weight
    negative = weight - positive
    metrics = {
        "loss": loss,
        "accuracy": 1.0 - wrong.sum() / total,
        "false_positive_rate": (wrong * negative).sum() / jnp.maximum(negative.sum(), 1.0),
        "false_negative_rate": (wrong * positive).sum() / jnp.maximum(positive.sum(), 1.0),
        "positive_fraction": positive.sum() / total,
    }
    return loss, metrics
