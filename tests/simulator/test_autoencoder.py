# SPDX-License-Identifier: Apache-2.0
"""The autoencoder: shapes, patches, learning, and errors on wrong frames."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from worldenv_jax.simulator import (
    SimulatorConfig,
    autoencoder_loss,
    decode_latents,
    encode_frames,
    init_simulator,
    measure_latent_scale,
    principal_components,
)
from worldenv_jax.simulator.autoencoder import depth_to_space, space_to_depth
from worldenv_jax.simulator.conditioning import decode_images, over_frames

CONFIG = SimulatorConfig.debug()


@pytest.fixture(scope="module")
def params():
    return init_simulator(CONFIG, jax.random.key(0))


def _frames(count):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def test_patches_are_reversible():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    patches = space_to_depth(x, 2)
    assert patches.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(patches[0, 0, 0, :6], [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(depth_to_space(patches, 2), x)


def test_shapes_and_dtypes(params):
    latents = encode_frames(CONFIG, params, _frames(6).reshape(2, 3, 1, 32, 32, 3))
    assert latents.shape == (2, 3, 1, *CONFIG.latent_size, CONFIG.autoencoder.latent_channels)
    frames = decode_latents(CONFIG, params, latents)
    assert frames.shape == (2, 3, 1, 32, 32, 3) and frames.dtype == jnp.uint8


def test_one_frame_at_a_time_is_the_same(params):
    import dataclasses
    import functools

    encode = functools.partial(encode_frames, CONFIG, params)
    slowly = dataclasses.replace(CONFIG, frame_by_frame=True)
    frames = jnp.asarray(_frames(6).reshape(2, 1, 3, 32, 32, 3))
    np.testing.assert_allclose(over_frames(slowly, encode, frames, axis=2), encode(frames), atol=1e-5)


def test_scale_brings_latents_to_unit_variance(params):
    import dataclasses

    frames = _frames(8)
    scaled = dataclasses.replace(CONFIG, latent_scale=measure_latent_scale(CONFIG, params, frames))
    assert float(jnp.std(encode_frames(scaled, params, frames))) == pytest.approx(1.0, rel=1e-4)


def test_loss_falls(params):
    """Thirty steps of Adam on one batch."""
    frames = np.full((4, 32, 32, 3), 200, np.uint8)
    optimizer = optax.adam(1e-2)
    loss = lambda p, key: autoencoder_loss(CONFIG, {"autoencoder": p}, key, frames)[0]

    @jax.jit
    def step(p, state, key):
        value, gradients = jax.value_and_grad(loss)(p, key)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(p, updates), state, value

    trained, state, values = params["autoencoder"], optimizer.init(params["autoencoder"]), []
    for i in range(30):
        trained, state, value = step(trained, state, jax.random.key(i))
        values.append(float(value))
    assert values[-1] < 0.2 * values[0]


def test_wrong_frames_are_named(params):
    with pytest.raises(ValueError, match="got frames float32.*expected uint8"):
        encode_frames(CONFIG, params, jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(ValueError, match="expected uint8 \\[..., 32, 32, 3\\]"):
        encode_frames(CONFIG, params, jnp.zeros((1, 64, 64, 3), jnp.uint8))


def test_principal_components_are_the_best_linear_code():
    """Against NumPy's singular value decomposition of the same patches."""
    import dataclasses

    coder = dataclasses.replace(CONFIG.autoencoder, latent_channels=10, principal=True)
    unet = dataclasses.replace(CONFIG.unet, latent_channels=10, condition_channels=CONFIG.unet.condition_channels + 6)
    config = dataclasses.replace(CONFIG, autoencoder=coder, unet=unet)
    rng = np.random.default_rng(0)
    frames = np.clip(rng.normal(128, 40, (24, 4, 4, 3)).repeat(8, 1).repeat(8, 2), 0, 255).astype(np.uint8)
    frames = np.clip(frames + rng.integers(-9, 10, frames.shape), 0, 255).astype(np.uint8)
    params = init_simulator(config, jax.random.key(0))
    fitted = principal_components(coder, frames)
    assert jax.tree.map(jnp.shape, params["autoencoder"]) == jax.tree.map(jnp.shape, fitted)
    params["autoencoder"] = fitted

    images = frames / 127.5 - 1.0
    d = coder.downsampling
    patches = images.reshape(24, 32 // d, d, 32 // d, d, 3).swapaxes(2, 3).reshape(-1, 3 * d * d)
    centred = patches - patches.mean(0)
    components = np.linalg.svd(centred, full_matrices=False)[2][:10]
    expected = centred @ components.T @ components + patches.mean(0)

    latents = encode_frames(dataclasses.replace(config, latent_scale=1.0), params, frames)
    flat = np.asarray(latents, np.float64).reshape(-1, 10)
    covariance = np.cov(flat.T)
    np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=1e-3)
    decoded = decode_images(dataclasses.replace(config, latent_scale=1.0), params, latents)
    got = np.asarray(decoded).reshape(24, 32 // d, d, 32 // d, d, 3).swapaxes(2, 3).reshape(-1, 3 * d * d)
    np.testing.assert_allclose(got, np.clip(expected, -1, 1), atol=2e-4)
    loss, metrics = autoencoder_loss(config, params, jax.random.key(1), frames)
    assert float(metrics["reconstruction"]) < 1.05 * np.mean((expected - patches) ** 2) + 1e-3
