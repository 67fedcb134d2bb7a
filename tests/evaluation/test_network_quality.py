# SPDX-License-Identifier: Apache-2.0
"""LPIPS against PyTorch's layers, the Frechet distance against scipy and closed forms, and clear refusals."""

import numpy as np
import pytest

from worldenv_jax.errors import WorldEnvError
from worldenv_jax.evaluation import video_quality
from worldenv_jax.evaluation.lpips_network import LAYERS, SCALE, SHIFT, load_lpips, make_lpips
from worldenv_jax.weights.torch_files import save_torch_file


def _images(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def _weights():
    rng, tensors = np.random.default_rng(0), {}
    for number, (index, outputs, inputs, size, *_) in enumerate(LAYERS):
        scale = np.sqrt(2.0 / (inputs * size * size))
        tensors[f"features.{index}.weight"] = rng.normal(size=(outputs, inputs, size, size), scale=scale)
        tensors[f"features.{index}.bias"] = rng.normal(size=outputs, scale=0.1)
        tensors[f"lin{number}.model.1.weight"] = rng.uniform(size=(1, outputs, 1, 1))
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def test_frechet_distance_agrees_with_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
    y = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=6)
    cross = linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * cross)
    assert video_quality.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_by_hand():
    # Two points at +-1 have mean 0 and variance 2; scaled by 3 and moved by 5: 25 + (sqrt(18) - sqrt(2))^2 = 33.
    x = np.array([[-1.0], [1.0]])
    assert video_quality.frechet_distance(x, 3.0 * x + 5.0) == pytest.approx(33.0)
    assert video_quality.frechet_distance(x, x) == pytest.approx(0.0, abs=1e-12)


def test_frechet_distance_of_known_gaussians():
    """Diagonal Gaussians, sampled: the sum over axes of (difference of means)^2 + (difference of deviations)^2."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200_000, 3)) * [1.0, 2.0, 0.5]
    y = rng.normal(size=(200_000, 3)) * [2.0, 2.0, 1.5] + [0.0, 1.0, 0.0]
    assert video_quality.frechet_distance(x, y) == pytest.approx(1.0 + 1.0 + 1.0, rel=0.02)


def test_fewer_samples_than_features_are_no_problem():
    x, y = np.random.default_rng(2).normal(size=(2, 5, 40))
    assert np.isfinite(video_quality.frechet_distance(x, y))
    assert video_quality.frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)


def test_fvd_is_the_distance_of_the_features():
    x, y = _images(0, 6, 4, 8, 8, 3), _images(1, 5, 4, 8, 8, 3)
    features = lambda videos: videos.astype(np.float64).mean((1, 2, 3))
    assert video_quality.fvd(x, y, features) == pytest.approx(video_quality.frechet_distance(features(x), features(y)))


def test_lpips_of_equal_images_is_0_and_keeps_the_axes():
    distance = make_lpips(_weights())
    x, y = _images(0, 2, 3, 40, 33, 3), _images(1, 2, 3, 40, 33, 3)
    assert video_quality.lpips(x, x, distance).max() < 1e-12
    result = video_quality.lpips(x, y, distance)
    assert result.shape == (2, 3) and result.dtype == np.float64 and (result > 0).all()
    np.testing.assert_allclose(result[1, 2], video_quality.lpips(x[1, 2], y[1, 2], distance), rtol=1e-5)


def test_lpips_reads_the_published_files(tmp_path):
    tensors = _weights()
    paths = tmp_path / "alexnet.pth", tmp_path / "alex.pth"
    for path, prefix in zip(paths, ("features", "lin")):
        save_torch_file(path, {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)})
    x, y = _images(0, 1, 40, 40, 3), _images(1, 1, 40, 40, 3)
    np.testing.assert_array_equal(load_lpips(*paths)(x, y), make_lpips(tensors)(x, y))
    with pytest.raises(WorldEnvError, match="not the weights of LPIPS with AlexNet: features.0.weight is missing"):
        load_lpips(paths[1], paths[1])
    with pytest.raises(WorldEnvError, match="cannot read LPIPS weights from .*nowhere"):
        load_lpips(tmp_path / "nowhere.pth", paths[1])


def test_without_networks_the_message_says_what_to_pass():
    images = _images(0, 1, 40, 40, 3)
    with pytest.raises(WorldEnvError, match="LPIPS needs a network.*load_lpips"):
        video_quality.lpips(images, images, None)
    with pytest.raises(WorldEnvError, match="FVD needs a video network.*features"):
        video_quality.fvd(images[None], images[None], None)
    with pytest.raises(ValueError, match="prediction must be uint8"):
        video_quality.fvd(images, images[None], lambda videos: videos)


@pytest.mark.parity
def test_lpips_agrees_with_torch():
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    weights = {name: torch.tensor(tensor).double() for name, tensor in _weights().items()}

    def features(images):
        x = (torch.tensor(images).double() / 127.5 - 1.0 - torch.tensor(SHIFT)) / torch.tensor(SCALE)
        x, maps = x.permute(0, 3, 1, 2), []
        for index, *_, stride, padding, pool in LAYERS:
            x = F.max_pool2d(x, 3, 2) if pool else x
            x = F.relu(
                F.conv2d(x, weights[f"features.{index}.weight"], weights[f"features.{index}.bias"], stride, padding)
            )
            maps.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        return maps

    x, y = _images(0, 2, 64, 48, 3), _images(1, 2, 64, 48, 3)
    expected = sum(
        F.conv2d((a - b).pow(2), weights[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
        for i, (a, b) in enumerate(zip(features(x), features(y)))
    )
    np.testing.assert_allclose(make_lpips(_weights())(x, y), expected.numpy(), rtol=1e-5)
