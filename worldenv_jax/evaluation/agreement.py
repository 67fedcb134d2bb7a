# SPDX-License-Identifier: Apache-2.0
"""Imagination agreement: does the true world agree with the verdicts that reinforcement learning is paid by?

The action sequences of imagined trajectories are replayed in the true environment from the same starts. A false
success (the reflector said done, the world says no) is what a policy can exploit; a false failure only slows it down.
"""

from typing import Any

import numpy as np

from worldenv_jax.evaluation.summary import success_rate


def imagination_agreement(imagined: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    """Compares verdicts with outcomes.

    Args:
      imagined: bool [B], the reflector ended the imagined trajectory with R > eta.
      true: bool [B], the same actions from the same start solved the task in the true environment.

    Returns:
      "agreement", "imagined_success" and "true_success" as shares of all trajectories, "false_successes" as the share
      of imagined successes that the world denies, "false_failures" as the share of imagined failures that it denies
      (each as `success_rate` returns it), "by_chance", the agreement of independent outcomes with the same two rates,
      "correlation" (phi, 0 for a world that teaches nothing; None where one side is constant), "counts" of the cases.

    Raises:
      ValueError: shapes differ, are not [B], or the dtypes are not bool.
    """
    imagined, true = np.asarray(imagined), np.asarray(true)
    if imagined.shape != true.shape or imagined.ndim != 1 or imagined.dtype != bool or true.dtype != bool:
        raise ValueError(
            "verdicts and outcomes must be bool [B]: "
            f"got {imagined.dtype} {list(imagined.shape)} and {true.dtype} {list(true.shape)}"
        )
    counts = {
        "both_success": int((imagined & true).sum()),
        "false_success": int((imagined & ~true).sum()),
        "false_failure": int((~imagined & true).sum()),
        "both_failure": int((~imagined & ~true).sum()),
    }
    p, q = imagined.mean(), true.mean()
    spread = float(np.sqrt(p * (1 - p) * q * (1 - q)))
    return {
        "agreement": success_rate(counts["both_success"] + counts["both_failure"], imagined.size),
        "imagined_success": success_rate(imagined.sum(), imagined.size),
        "true_success": success_rate(true.sum(), true.size),
        "false_successes": success_rate(counts["false_success"], imagined.sum()),
        "false_failures": success_rate(counts["false_failure"], (~imagined).sum()),
        "by_chance": float(p * q + (1 - p) * (1 - q)),
        "correlation": float((imagined & true).mean() - p * q) / spread if spread > 0 else None,
        "counts": counts,
    }
