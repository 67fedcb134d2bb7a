# SPDX-License-Identifier: Apache-2.0
"""The vision transformer against a second implementation in NumPy float64, for every variant of the towers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.networks.vision_transformer import VisionTransformer, ViTConfig

BASE = ViTConfig(image_size=16, patch_size=4, width=12, layers=3, heads=3, mlp_width=20)
VARIANTS = {
    "siglip": dataclasses.replace(BASE, activation="gelu_tanh", final_norm=True),
    "dinov2": dataclasses.replace(BASE, class_token=True, register_tokens=2, layer_scale=True, output_layer=-2),
    "clip": dataclasses.replace(
        BASE,
        class_token=True,
        pre_norm=True,
        position_on_prefix=True,
        patch_bias=False,
        activation="quick_gelu",
        norm_eps=1e-5,
        output_layer=-2,
    ),
    "stem": dataclasses.replace(BASE, stem=(8,), image_size=32, patch_size=8),
    "last patches cut": dataclasses.replace(BASE, image_size=18),
}
erf = np.vectorize(math.erf)
NUMPY_ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1.0 + erf(x / np.sqrt(2.0))),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1.0 + np.exp(-1.702 * x)),
}


def random_params(config: ViTConfig):
    images = jnp.zeros((1, config.image_size, config.image_size, 3))
    params = VisionTransformer(config).init(jax.random.key(0), images)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(tree, [jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


def numpy_stem(image: np.ndarray, kernel: np.ndarray, norm) -> np.ndarray:
    """A 3 x 3 convolution of stride 2, group norm over 8 groups, GELU."""
    padded, half = np.pad(image, ((1, 1), (1, 1), (0, 0))), len(image) // 2
    windows = [[padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3] for j in range(half)] for i in range(half)]
    x = np.einsum("ijklc,klcd->ijd", np.array(windows), kernel)
    groups = x.reshape(half, half, 8, -1)
    centred = groups - groups.mean((0, 1, 3), keepdims=True)
    x = (centred / np.sqrt((centred**2).mean((0, 1, 3), keepdims=True) + 1e-6)).reshape(x.shape)
    x = x * norm["scale"] + norm["bias"]
    return NUMPY_ACTIVATIONS["gelu_tanh"](x)


def numpy_tower(config: ViTConfig, params, image: np.ndarray) -> np.ndarray:
    """One image [H, W, 3] -> tokens, written from the formulas."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)["params"]
    linear = lambda x, layer: x @ layer["kernel"] + layer.get("bias", 0.0)

    def norm(x, layer):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.norm_eps)
        return scaled * layer["scale"] + layer["bias"]

    for i in range(len(config.stem)):
        image = numpy_stem(image, p[f"stem{i}"]["kernel"], p[f"stem_norm{i}"])
    size, patches = config.patch_size // 2 ** len(config.stem), []
    for row in range(len(image) // size):
        for column in range(len(image) // size):
            patch = image[row * size : (row + 1) * size, column * size : (column + 1) * size]
            patches.append(patch.reshape(-1))
    x = linear(np.array(patches), p["patch_embed"])
    prefix = [p[name] for name in ("class_token", "register_tokens") if name in p]
    if config.position_on_prefix:
        x = np.concatenate([*prefix, x]) + p["position_embedding"]
    else:
        x = np.concatenate([*prefix, x + p["position_embedding"]])
    if config.pre_norm:
        x = norm(x, p["norm_pre"])
    for i in range(config.depth):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"])
        q, k, v = np.split(linear(norm(x, block["norm1"]), block["qkv"]), 3, axis=1)
        heads = []
        for head in np.split(np.arange(config.width), config.heads):
            score = q[:, head] @ k[:, head].T / np.sqrt(len(head))
            weight = np.exp(score - score.max(1, keepdims=True))
            heads.append(weight / weight.sum(1, keepdims=True) @ v[:, head])
        x = x + linear(np.concatenate(heads, 1), block["proj"]) * block.get("scale1", 1.0)
        hidden = NUMPY_ACTIVATIONS[config.activation](linear(norm(x, block["norm2"]), block["fc1"]))
        x = x + linear(hidden, block["fc2"]) * block.get("scale2", 1.0)
    return norm(x, p["norm"]) if config.final_norm else x


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_equals_numpy(name):
    config = VARIANTS[name]
    params = random_params(config)
    image = np.random.default_rng(2).normal(size=(config.image_size, config.image_size, 3)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        ours = VisionTransformer(config).apply(params, image[None])[0]
    assert ours.shape == (config.num_prefix + 16, 12)
    np.testing.assert_allclose(ours, numpy_tower(config, params, image), rtol=0, atol=2e-4)


def test_only_the_blocks_that_are_read_exist():
    params = random_params(VARIANTS["dinov2"])["params"]
    assert params["blocks"]["qkv"]["kernel"].shape == (2, 12, 36)
    assert params["position_embedding"].shape == (16, 12)


def test_rematerialisation_changes_no_gradient():
    params, images = random_params(BASE), jnp.ones((2, 16, 16, 3))
    loss = lambda config: lambda p: (VisionTransformer(config).apply(p, images) ** 2).mean()
    plain = jax.grad(loss(BASE))(params)
    rematerialised = jax.grad(loss(dataclasses.replace(BASE, remat=True)))(params)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(rematerialised)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_position_start_tells_rows_and_columns_apart():
    images = jnp.zeros((1, 16, 16, 3))
    positions = VisionTransformer(VARIANTS["clip"]).init(jax.random.key(0), images)["params"]["position_embedding"]
    assert np.all(positions[0] == 0.0)  # the class token
    patches = np.asarray(positions[1:]).reshape(4, 4, 12)
    np.testing.assert_array_equal(patches[:, 0, :6], patches[:, 3, :6])  # the first half depends on the row only
    np.testing.assert_allclose(patches[2, 1, 0], np.sin(2.0), rtol=1e-6)
    np.testing.assert_allclose(patches[2, 1, 6], np.sin(1.0), rtol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match=r"got images \(1, 8, 8, 3\), expected .*16, 16, 3"):
        VisionTransformer(BASE).apply(random_params(BASE), jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="output_layer -4 is outside"):
        dataclasses.replace(BASE, output_layer=-4)
    with pytest.raises(ValueError, match="activation 'relu' is not one of"):
        dataclasses.replace(BASE, activation="relu")
    with pytest.raises(ValueError, match="image_size 16 and patch_size 4 cannot be halved 3 times"):
        dataclasses.replace(BASE, stem=(8, 8, 8))
