# SPDX-License-Identifier: Apache-2.0
"""How well a simulator predicts held-out episodes: PSNR, SSIM, baselines, action sensitivity, drift.

SSIM is that of Wang, Bovik, Sheikh and Simoncelli (IEEE TIP 13, 2004): Gaussian window 11 x 11 with sigma 1.5, K1 =
0.01, K2 = 0.03, population moments, windows inside the image only, averaged over windows and colour channels.

LPIPS and FVD need networks that cannot be shipped: the user passes them as functions.

Letters beside those of `types`: E episodes, N horizon steps. Everything is NumPy on the host.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from worldenv_jax.errors import WorldEnvError

PEAK = 255.0
# The mean squared rounding error of uint8: equal frames score 58.9 dB instead of infinity, so that means exist.
ROUNDING_ERROR = 1.0 / 12.0
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03
_CHUNK = 64  # images that are compared at once, which bounds the memory


def psnr(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of uint8 images [..., H, W, 3] -> float64 [...], at most 58.92.

    Raises:
      ValueError: shapes or dtypes differ from uint8 [..., H, W, 3].
    """
    _check_images(prediction, truth)
    return 10.0 * np.log10(PEAK**2 / np.maximum(_mean_squared_error(prediction, truth), ROUNDING_ERROR))


def ssim(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity of uint8 images [..., H, W, 3] -> float64 [...], 1 for equal images.

    Raises:
      ValueError: shapes or dtypes differ from uint8 [..., H, W, 3], or the images are smaller than the window.
    """
    _check_images(prediction, truth)
    height, width = prediction.shape[-3:-1]
    if min(height, width) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW} x {WINDOW} pixels, got {height} x {width}")
    rows, columns = _window_matrix(height), _window_matrix(width)
    return _per_image(lambda x, y: _ssim_images(x, y, rows, columns), prediction, truth)


def lpips(
    prediction: np.ndarray, truth: np.ndarray, network: Callable[[np.ndarray, np.ndarray], np.ndarray] | None
) -> np.ndarray:
    """Perceptual distance of uint8 images [..., H, W, 3] -> float64 [...], 0 for equal images.

    Args:
      network: (uint8 [M, H, W, 3], same) -> [M]. `lpips_network.load_lpips` makes the usual one of two local files.

    Raises:
      WorldEnvError: no network.
      ValueError: shapes or dtypes differ from uint8 [..., H, W, 3].
    """
    if network is None:
        raise WorldEnvError(
            "LPIPS needs a network, and none is shipped: pass evaluation.lpips_network.load_lpips(alexnet, linear) "
            "with the paths of torchvision's AlexNet and of the lpips package's alex.pth, or your own function"
        )
    _check_images(prediction, truth)
    return _per_image(lambda x, y: np.asarray(network(x, y), np.float64), prediction, truth)


def fvd(prediction: np.ndarray, truth: np.ndarray, network: Callable[[np.ndarray], np.ndarray] | None) -> float:
    """Frechet video distance (Unterthiner et al. 2018) between two sets of videos, uint8 [N, T, H, W, 3] each.

    Args:
      network: (uint8 [M, T, H, W, 3]) -> features [M, D], the logits of I3D trained on Kinetics-400 in the paper.
        Published figures resize to 224 x 224 first: that belongs to the function.

    Raises:
      WorldEnvError: no network.
      ValueError: shapes or dtypes differ from uint8 [N, T, H, W, 3].
    """
    if network is None:
        raise WorldEnvError(
            "FVD needs a video network, and none is shipped: pass a function from videos uint8 [M, T, H, W, 3] to "
            "features [M, D], for example your copy of I3D"
        )
    sets = []
    for name, videos in (("prediction", prediction), ("truth", truth)):
        if videos.dtype != np.uint8 or videos.ndim != 5 or videos.shape[-1] != 3:
            raise ValueError(f"{name} must be uint8 [N, T, H, W, 3], got {videos.dtype} {list(videos.shape)}")
        sets.append(np.concatenate([np.asarray(network(videos[i : i + 1])) for i in range(len(videos))]))
    return frechet_distance(*sets)


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of the Gaussians with the moments of two feature sets [N, D] and [M, D].

    |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)), with the unbiased covariances S.

    Raises:
      ValueError: fewer than two rows, different D, or entries that are not finite.
    """
    x, y = (np.asarray(features, np.float64) for features in (x, y))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"features must be [N, D] and [M, D] with N, M > 1, got {list(x.shape)} and {list(y.shape)}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("features are not finite")
    covariances = [np.atleast_2d(np.cov(features, rowvar=False)) for features in (x, y)]
    # The eigenvalues of S_x S_y are those of the symmetric R S_y R with R R = S_x: no complex square root is needed.
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ covariances[1] @ root)
    cross = np.sqrt(np.maximum(product, 0.0)).sum()
    distance = np.square(x.mean(0) - y.mean(0)).sum() + sum(np.trace(c) for c in covariances) - 2.0 * cross
    return float(max(distance, 0.0))


def open_loop_quality(
    context: np.ndarray,
    truth: np.ndarray,
    valid: np.ndarray,
    succeeded: np.ndarray,
    predictions: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Scores open-loop predictions of held-out episodes, success and failure episodes apart.

    Args:
      context: uint8 [E, V, H, W, 3], the last true frame before the horizon; repeated, it is the baseline
        "copy_last_frame".
      truth: uint8 [E, N, V, H, W, 3], the frame after each recorded action.
      valid: bool [E, N], False after the end of an episode.
      succeeded: bool [E], the episode's true outcome.
      predictions: predictor -> uint8 [E, N, V, H, W, 3]; "simulator" (recorded actions) and "no_action" (the
        simulator with zero actions) are the names that the gate reads.

    Returns:
      JSON-able: outcome ("success", "failure") -> predictor -> {"psnr", "ssim" (means over valid steps and views),
      "psnr_per_step", "ssim_per_step" (lists of N, null where no episode is valid), "drift" (dB lost per step: minus
      the least-squares slope of psnr_per_step), "episodes"}; null numbers where there are no episodes.

    Raises:
      ValueError: shapes or dtypes do not fit together.
    """
    _check_open_loop(context, truth, valid, succeeded)
    copied = np.broadcast_to(context[:, None], truth.shape)
    scores = {}
    for name, frames in {**predictions, "copy_last_frame": copied}.items():
        scores[name] = {"psnr": psnr(frames, truth).mean(-1), "ssim": ssim(frames, truth).mean(-1)}
    return {
        outcome: {name: _summarise(score, valid & chosen[:, None]) for name, score in scores.items()}
        for outcome, chosen in (("success", succeeded), ("failure", ~succeeded))
    }


def action_sensitivity(
    truth: np.ndarray, valid: np.ndarray, prediction: np.ndarray, other_prediction: np.ndarray
) -> dict[str, Any]:
    """Does another action give another future?

    Args:
      truth: uint8 [E, N, V, H, W, 3], what the recorded actions led to.
      valid: bool [E, N].
      prediction: uint8 [E, N, V, H, W, 3] from the recorded actions.
      other_prediction: uint8 [E, N, V, H, W, 3] from the same starts with other actions (another episode's, say).

    Returns:
      "change_per_step": root mean square difference between both futures in grey levels, a list of N (null where no
      episode is valid); "change": its mean over valid steps; "preference": share of valid steps at which the recorded
      actions' future is nearer to the truth than the other (0.5 = the actions are ignored; ties count one half).
    """
    _check_images(prediction, truth)
    _check_images(other_prediction, truth)
    change = np.sqrt(_mean_squared_error(prediction, other_prediction).mean(-1))
    own, other = (_mean_squared_error(frames, truth).mean(-1) for frames in (prediction, other_prediction))
    nearer = (own < other) + 0.5 * (own == other)
    return {
        "change": _mean(change, valid),
        "change_per_step": _mean_per_step(change, valid),
        "preference": _mean(nearer, valid),
    }


def drift(psnr_per_step: np.ndarray) -> float:
    """dB lost per horizon step: minus the least-squares slope of PSNR [N] over the step; 0 for a single step."""
    values = np.asarray(psnr_per_step, np.float64)
    if len(values) < 2:
        return 0.0
    steps = np.arange(len(values)) - (len(values) - 1) / 2.0
    return float(-(steps * values).sum() / (steps**2).sum())


def _summarise(score: Mapping[str, np.ndarray], chosen: np.ndarray) -> dict[str, Any]:
    per_step = {name: _mean_per_step(values, chosen) for name, values in score.items()}
    measured = [value for value in per_step["psnr"] if value is not None]
    return {
        **{name: _mean(values, chosen) for name, values in score.items()},
        **{f"{name}_per_step": values for name, values in per_step.items()},
        "drift": drift(np.array(measured)) if measured else None,
        "episodes": int(chosen.any(1).sum()),
    }


def _mean(values: np.ndarray, chosen: np.ndarray) -> float | None:
    return float(values[chosen].mean()) if chosen.any() else None


def _mean_per_step(values: np.ndarray, chosen: np.ndarray) -> list[float | None]:
    return [_mean(values[:, step], chosen[:, step]) for step in range(values.shape[1])]


def _mean_squared_error(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Squared grey levels, uint8 [..., H, W, 3] -> float64 [...]."""
    return _per_image(lambda x, y: np.square(x.astype(np.int32) - y).mean((1, 2, 3)), prediction, truth)


def _per_image(function: Callable, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Applies (uint8 [M, H, W, 3], same) -> float64 [M] to the leading axes, a bounded number of images at a time."""
    flat = [images.reshape(-1, *images.shape[-3:]) for images in (x, y)]
    parts = [function(*(f[i : i + _CHUNK] for f in flat)) for i in range(0, len(flat[0]), _CHUNK)]
    return np.concatenate([np.zeros(0), *parts]).reshape(x.shape[:-3])


def _window_matrix(length: int) -> np.ndarray:
    """Float64 [length - 10, length]: row i averages pixels i to i + 10 with the Gaussian window's weights."""
    taps = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    matrix = np.zeros((length - WINDOW + 1, length))
    for row in range(len(matrix)):
        matrix[row, row : row + WINDOW] = taps / taps.sum()
    return matrix


def _ssim_images(x: np.ndarray, y: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Equation 13 of Wang et al. averaged over windows and channels: uint8 [M, H, W, 3] -> float64 [M]."""
    x, y = (np.moveaxis(image, -1, 1).astype(np.float64) for image in (x, y))
    average = lambda image: rows @ image @ columns.T
    mean_x, mean_y = average(x), average(y)
    variances = average(x * x) - mean_x**2 + average(y * y) - mean_y**2
    covariance = average(x * y) - mean_x * mean_y
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    numerator = (2.0 * mean_x * mean_y + c1) * (2.0 * covariance + c2)
    return (numerator / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))).mean((1, 2, 3))


def _check_images(prediction: np.ndarray, truth: np.ndarray) -> None:
    good = prediction.dtype == truth.dtype == np.uint8 and truth.ndim >= 3 and truth.shape[-1] == 3
    if not good or prediction.shape != truth.shape:
        raise ValueError(
            "images must be uint8 [..., H, W, 3] of one shape: prediction is "
            f"{prediction.dtype} {list(prediction.shape)}, truth is {truth.dtype} {list(truth.shape)}"
        )


def _check_open_loop(context: np.ndarray, truth: np.ndarray, valid: np.ndarray, succeeded: np.ndarray) -> None:
    episodes, steps = truth.shape[:2]
    expected = {
        "context": (context, np.uint8, (episodes, *truth.shape[2:])),
        "valid": (valid, np.bool_, (episodes, steps)),
        "succeeded": (succeeded, np.bool_, (episodes,)),
    }
    problems = [
        f"{name}: got {value.dtype} {list(value.shape)}, expected {np.dtype(dtype)} {list(shape)}"
        for name, (value, dtype, shape) in expected.items()
        if value.dtype != dtype or value.shape != shape
    ]
    if problems:
        raise ValueError("open-loop frames do not fit together: " + "; ".join(problems))
