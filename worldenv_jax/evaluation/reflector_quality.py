# SPDX-License-Identifier: Apache-2.0
"""How far the reflector can be trusted: ranking, error rates, calibration, delay; temperature and threshold.

All in NumPy, on held-out episodes. Padded arrays are [E, N] (episodes, frames) with a mask; a figure that its data do
not define (one class only, no detected success) is NaN. Sources: Fawcett 2006 (ROC), Guo et al. 2017 (expected
calibration error, temperature scaling).
"""

from collections.abc import Sequence

import numpy as np

DEFAULT_THRESHOLD = 0.5  # World-Env's eta


def auroc(score: np.ndarray, label: np.ndarray) -> float:
    """Chance that a positive scores above a negative, ties counted half (Mann-Whitney); score, label [N]."""
    label = np.asarray(label, bool)
    positives, negatives = int(label.sum()), int((~label).sum())
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2.0  # the mean rank of each value
    above = rank[inverse][label].sum() - positives * (positives + 1) / 2.0
    return float(above / (positives * negatives))


def average_precision(score: np.ndarray, label: np.ndarray) -> float:
    """Area under the precision-recall steps, tied scores taken together; score, label [N]."""
    label = np.asarray(label, bool)
    if not label.any():
        return float("nan")
    values, inverse = np.unique(-np.asarray(score, np.float64), return_inverse=True)
    hits = np.bincount(inverse, label, len(values))
    accepted = np.cumsum(np.bincount(inverse, minlength=len(values)))
    return float((np.cumsum(hits) / accepted * hits).sum() / label.sum())


def error_rates(probability: np.ndarray, label: np.ndarray, threshold: float) -> tuple[float, float]:
    """(false positives / negatives, false negatives / positives), judged positive above the threshold; both [N]."""
    judged, label = np.asarray(probability) > threshold, np.asarray(label, bool)
    return _mean(judged[~label]), _mean(~judged[label])


def reliability_curve(probability: np.ndarray, label: np.ndarray, bins: int = 15) -> tuple[np.ndarray, ...]:
    """Mean probability, share of positives and number of frames in `bins` equal intervals of [0, 1]; NaN if empty."""
    place = np.minimum((np.asarray(probability, np.float64) * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(place, probability, bins) / count
        frequency = np.bincount(place, np.asarray(label, np.float64), bins) / count
    return confidence, frequency, count


def calibration_error(probability: np.ndarray, label: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: the mean over frames of |probability - share of positives| of their interval."""
    confidence, frequency, count = reliability_curve(probability, label, bins)
    if not count.sum():
        return float("nan")
    return float(np.nansum(np.abs(confidence - frequency) * count) / count.sum())


def detection(probability: np.ndarray, label: np.ndarray, mask: np.ndarray, threshold: float) -> dict[str, float]:
    """What a rollout that stops at the first R > threshold would do with each episode.

    Args:
        probability, label, mask: [E, N]; label True where the task is done, mask False on padding.

    Returns: "delay" (frames from the first success to the first alarm at or after it, mean over episodes that have
        both and no earlier alarm), "detected" and "premature" (shares of the successful episodes: such an alarm; an
        alarm before the success), "false_alarms" (share of the failed episodes with any alarm).
    """
    alarm, done = (probability > threshold) & mask, np.asarray(label, bool) & mask
    succeeded, alarmed = done.any(1), alarm.any(1)
    delay = np.where(alarmed, alarm.argmax(1), np.inf) - np.where(succeeded, done.argmax(1), 0)
    detected, premature = succeeded & alarmed & (delay >= 0), succeeded & alarmed & (delay < 0)
    return {
        "delay": _mean(delay[detected]),
        "detected": _mean(detected[succeeded]),
        "premature": _mean(premature[succeeded]),
        "false_alarms": _mean(alarmed[~succeeded]),
    }


def calibration_figures(
    probability: np.ndarray, label: np.ndarray, mask: np.ndarray, threshold: float = DEFAULT_THRESHOLD
) -> dict[str, float]:
    """Every figure of a judge.

    Args:
        probability: R(o_1:t, g), float [E, N].
        label: bool [E, N], the task predicate at each frame.
        mask: bool [E, N], False on padding.
        threshold: eta.

    Returns: frame by frame "auroc", "average_precision", "false_positive_rate", "false_negative_rate",
        "calibration_error"; episode by episode "episode_auroc" (of its highest R, for whether it succeeds; frames are
        ranked well by the time alone, see `clock`) and the figures of `detection`; and the numbers "frames",
        "episodes".

    Raises ValueError where the shapes differ or a probability is outside [0, 1].
    """
    probability, label, mask = (np.asarray(array) for array in (probability, label, mask))
    if not probability.shape == label.shape == mask.shape or probability.ndim != 2:
        raise ValueError(
            f"got probability {probability.shape}, label {label.shape}, mask {mask.shape}; expected the same [E, N]"
        )
    frames, truth = probability[mask], label[mask].astype(bool)
    if not ((frames >= 0.0) & (frames <= 1.0)).all():
        raise ValueError(f"got probabilities from {frames.min()} to {frames.max()}, expected [0, 1]: pass sigmoids")
    false_positive, false_negative = error_rates(frames, truth, threshold)
    return {
        "auroc": auroc(frames, truth),
        "average_precision": average_precision(frames, truth),
        "false_positive_rate": false_positive,
        "false_negative_rate": false_negative,
        "calibration_error": calibration_error(frames, truth),
        "episode_auroc": auroc(np.where(mask, probability, 0.0).max(1), (label.astype(bool) & mask).any(1)),
        **detection(probability, label, mask, threshold),
        "frames": int(mask.sum()),
        "episodes": len(mask),
    }


def clock(
    task: Sequence[int], known_task: Sequence[int], label: np.ndarray, mask: np.ndarray, window: int = 8
) -> np.ndarray:
    """A judge that sees no frame, for comparison: how often known episodes of the task are done at about that time.

    Args:
        task: int [E], of the episodes to judge.
        known_task, label, mask: int [M], bool [M, N], bool [M, N] of the episodes that it has learned from.
        window: it counts frames at most this far from the time.

    Returns: float [E, N]; 0 where no known episode is that long.
    """
    known_task, done = np.asarray(known_task), np.asarray(label, bool) & mask
    smooth = lambda row: np.convolve(row, np.ones(2 * window + 1))[window : window + len(row)]
    rates = {}
    for number in np.unique(task):
        own = known_task == number
        rates[number] = smooth(done[own].sum(0)) / np.maximum(smooth(np.asarray(mask)[own].sum(0)), 1)
    return np.stack([rates[number] for number in task])


def figures_per_task(
    task: Sequence[int],
    probability: np.ndarray,
    label: np.ndarray,
    mask: np.ndarray,
    threshold: float = DEFAULT_THRESHOLD,
) -> dict[int, dict[str, float]]:
    """`calibration_figures` of the episodes of each task; task int [E]."""
    task = np.asarray(task)
    rows = {int(number): task == number for number in np.unique(task)}
    return {n: calibration_figures(probability[i], label[i], mask[i], threshold) for n, i in rows.items()}


def threshold_sweep(
    probability: np.ndarray, label: np.ndarray, mask: np.ndarray, thresholds: np.ndarray
) -> dict[str, np.ndarray]:
    """For a plot: "threshold", both error rates per frame and the figures of `detection`, each [len(thresholds)]."""
    frames, truth = probability[mask], np.asarray(label[mask], bool)
    rates = np.array([error_rates(frames, truth, threshold) for threshold in thresholds])
    events = [detection(probability, label, mask, threshold) for threshold in thresholds]
    return {
        "threshold": np.asarray(thresholds),
        "false_positive_rate": rates[:, 0],
        "false_negative_rate": rates[:, 1],
        **{name: np.array([event[name] for event in events]) for name in events[0]},
    }


def judge_curves(probability: np.ndarray, label: np.ndarray, mask: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """What the report plots of a judge; arguments as in `calibration_figures`.

    Returns: "reliability" (mean "probability", "share" of positives and number of "frames", ten intervals of [0, 1];
        NaN in empty ones) and "sweep" (`threshold_sweep` over 0.05, 0.10, ... 0.95).
    """
    probability, label, mask = (np.asarray(array) for array in (probability, label, mask))
    confidence, frequency, count = reliability_curve(probability[mask], label[mask], bins=10)
    sweep = threshold_sweep(probability, label, mask, np.round(np.arange(0.05, 0.96, 0.05), 2))
    return {
        "reliability": {
            "probability": confidence.tolist(), "share": frequency.tolist(), "frames": count.tolist(),
        },
        "sweep": {name: values.tolist() for name, values in sweep.items()},
    }  # fmt: skip


def choose_threshold(
    probability: np.ndarray,
    label: np.ndarray,
    mask: np.ndarray,
    false_positive_rate: float = 0.02,
) -> float:
    """Eta: a half where its false-positive rate per frame is within the limit, else the smallest that keeps to it.

    A false success ends a trajectory with a reward that it did not earn, so RL learns to provoke it; a late or missed
    success only costs signal. Hence the limit is on false positives.

    Returns: 0.5, or a larger value on a grid of 0.01; 0.99 where even that does not keep to the limit.
    """
    failures = probability[mask & ~np.asarray(label, bool)]
    grid = np.round(np.arange(DEFAULT_THRESHOLD, 1.0, 0.01), 2)
    within = [float(threshold) for threshold in grid if np.mean(failures > threshold) <= false_positive_rate]
    return within[0] if within else float(grid[-1])


def fit_temperature(logit: np.ndarray, label: np.ndarray) -> float:
    """The T that minimises the cross-entropy of sigmoid(logit / T); logit, label [N], both classes present.

    The derivative in 1 / T, sum((sigmoid(logit / T) - label) * logit), rises with 1 / T: bisection, T in [0.01, 100].

    Raises ValueError where only one class is present.
    """
    logit, label = np.asarray(logit, np.float64), np.asarray(label, np.float64)
    if not 0.0 < label.mean() < 1.0:
        raise ValueError("temperature scaling needs successes and failures, got one class only")
    low, high = np.log(0.01), np.log(100.0)  # of 1 / T
    for _ in range(60):
        middle = 0.5 * (low + high)
        slope = np.sum((0.5 * (1.0 + np.tanh(0.5 * np.exp(middle) * logit)) - label) * logit)
        low, high = (middle, high) if slope < 0.0 else (low, middle)
    return float(np.exp(-0.5 * (low + high)))


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
