# SPDX-License-Identifier: Apache-2.0
"""Geometry features of the reference frames: off changes nothing, on starts as the same function, and then learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from worldenv_jax.errors import WorldEnvError
from worldenv_jax.simulator import Kinematics, SimulatorConfig, extend_params, init_simulator, make_simulator_fns
from worldenv_jax.simulator.conditioning import encode_geometry_tokens
from worldenv_jax.simulator.losses import drop_conditions
from worldenv_jax.simulator.video_unet import VideoUNet, VideoUNetConfig
from worldenv_jax.simulator.world_simulator import ChunkInputs
from worldenv_jax.types import Camera, Starts, Statistics, Text

WIDTH = 6  # of the geometry tokens
OFF = VideoUNetConfig(  # one resolution: compiles fast
    channels=8, multipliers=(1,), res_blocks=1, attention_levels=(0,), head_dim=8, init_attention_heads=1,
    context_width=8, latent_channels=2, condition_channels=3, domains=1, norm_groups=2,
)  # fmt: skip
ON = dataclasses.replace(OFF, geometry_width=WIDTH)
SMALL = SimulatorConfig.debug()
SMALL_ON = dataclasses.replace(SMALL, unet=dataclasses.replace(SMALL.unet, geometry_width=WIDTH))


def _draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


LATENTS = _draw(1, 2, 3, 4, 4, 2)
CONDITION, IMAGE, ACTION = _draw(1, 2, 3, 4, 4, 3, seed=1), _draw(1, 4, 8, seed=2), _draw(1, 3, 8, seed=3)
GEOMETRY = _draw(1, 10, WIDTH, seed=4)
ONE = jnp.zeros(1, jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def _v(config, params, geometry=None):
    """v of two views and three frames, one of them history."""
    unet, variables = VideoUNet(config), {"params": params}
    prepared = unet.apply(variables, CONDITION, IMAGE, ACTION, ONE, ONE, None, geometry, method="prepare")
    return unet.apply(variables, LATENTS, jnp.full((1, 2), 500), 1, prepared)


def _init(config, geometry=None):
    arguments = (LATENTS, ONE[None], CONDITION, IMAGE, ACTION, ONE, ONE, None, geometry)
    init = jax.jit(lambda key: VideoUNet(config).init(key, *arguments, method="initialise")["params"])
    return init(jax.random.key(0))


def _filled(params):
    """The same tree with its zeros replaced: an output layer of zeros would hide everything before it."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


def _names(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}


def test_on_adds_parameters_at_every_resolution_and_leaves_the_others_as_they_were():
    off, on = _names(_init(OFF)), _names(_init(ON, GEOMETRY))
    assert all("geometry" in name for name in on.keys() - off.keys()) and on.keys() > off.keys()
    for name, leaf in off.items():
        np.testing.assert_array_equal(on[name], leaf, err_msg=name)

    two = dataclasses.replace(ON, multipliers=(1, 2), attention_levels=(0, 1))
    names = _names(jax.eval_shape(functools.partial(_init, two), GEOMETRY))
    widths = {
        name.split("/")[0]: x.shape for name, x in names.items() if name.endswith("geometry/attention/to_out/kernel")
    }
    assert {name: shape[0] for name, shape in widths.items()} == {
        "input1": 8, "input3": 16, "middle": 16, "output0": 16, "output1": 16, "output2": 8, "output3": 8,
    }  # fmt: skip


def test_on_starts_as_the_same_function_and_its_gradient_opens_it():
    base = _filled(_init(OFF))
    fresh = _init(ON, GEOMETRY)
    merged = unflatten_dict({**flatten_dict(fresh), **flatten_dict(base)})

    @jax.jit
    def gradients(params, tokens):
        def loss(params, tokens):
            v = _v(ON, params, tokens)
            return jnp.square(v).mean(), v

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, tokens)

    (gradient, _), v = gradients(merged, GEOMETRY)
    np.testing.assert_allclose(v, _v(OFF, base), atol=1e-5)
    outputs = {name: x for name, x in _names(gradient).items() if "geometry/attention/to_out/kernel" in name}
    assert len(outputs) == 4 and all(np.abs(x).max() > 0 for x in outputs.values())

    # With the outputs open, the gradient reaches the projection of the tokens, and the tokens matter.
    (gradient, of_tokens), _ = gradients(_filled(merged), GEOMETRY)
    assert np.abs(gradient["geometry_projection"]["kernel"]).max() > 0 and np.abs(of_tokens).max() > 0


def test_off_params_are_extended_without_being_touched():
    shapes = lambda config: jax.eval_shape(lambda key: init_simulator(config, key), jax.random.key(0))
    zeros = jax.tree.map(lambda x: np.full(x.shape, 3.0, x.dtype), shapes(SMALL))
    extended = extend_params(SMALL_ON, jax.random.key(0), zeros)
    assert jax.tree.map(jnp.shape, extended) == jax.tree.map(jnp.shape, shapes(SMALL_ON))
    for name, leaf in _names(extended).items():
        new = "geometry" in name
        assert new != bool((np.asarray(leaf) == 3.0).all()), name
        assert not new or "to_out" not in name or not np.any(leaf), name


def test_the_encoder_runs_frozen_in_a_rollout():
    """Shapes only: init and step with an encoder whose parameters lie beside the simulator's."""
    statistics = Statistics(
        -np.ones(7, np.float32), np.ones(7, np.float32), -np.ones(8, np.float32), np.ones(8, np.float32)
    )
    text = Text(np.zeros((2, 2), np.int32), np.ones((2, 2), bool))
    camera = Camera(np.zeros((2, 1, 3, 3), np.float32), np.zeros((2, 1, 4, 4), np.float32))
    starts = Starts(np.zeros((2, 1, 32, 32, 3), np.uint8), np.zeros((2, 8), np.float32), text, text, camera, ONE)
    encoder = lambda params, images: images.reshape(2, 1, -1, 12) @ params["w"]
    simulator = make_simulator_fns(SMALL_ON, statistics, Kinematics.osc_pose(), encoder)

    def two_calls(key):
        params = {**init_simulator(SMALL_ON, key), "geometry_encoder": {"w": jnp.zeros((12, WIDTH))}}
        keys = jax.random.split(key, 2)
        state = simulator.init(params, keys, starts)
        return state, simulator.step(params, keys, state, jnp.zeros((2, SMALL.chunk, 7)))[1]

    state, prediction = jax.eval_shape(two_calls, jax.random.key(0))
    assert state.geometry_tokens.shape == (2, 256, WIDTH) and prediction.frames.shape == (2, 4, 1, 32, 32, 3)

    tokens = lambda w: encode_geometry_tokens(
        SMALL_ON, {"geometry_encoder": {"w": w}}, encoder, jnp.ones((2, 1, 32, 32, 3))
    ).sum()
    assert not jax.grad(tokens)(jnp.ones((12, WIDTH))).any()


@pytest.mark.parametrize(
    ("encoder", "message"),
    [(None, "no geometry encoder was given"), (lambda p, x: x[..., 0], r"returned tokens \[1, 1, 32, 32\], expected")],
)
def test_a_missing_or_unfit_encoder_is_named(encoder, message):
    images = jnp.zeros((1, 1, 32, 32, 3))
    with pytest.raises(WorldEnvError, match=message):
        encode_geometry_tokens(SMALL_ON, {}, encoder, images)
    assert encode_geometry_tokens(SMALL, {}, encoder, images) is None


def test_dropped_images_lose_their_geometry_too():
    config = dataclasses.replace(SMALL_ON, condition_dropout=0.1)
    ones = lambda *shape: jnp.ones((200, *shape))
    inputs = ChunkInputs(
        ones(1, 8, 1, 1, 1), ones(1, 8), ones(1, 8, 1, 1, 1), ones(1, 8, 1, 1, 6), ones(4, 7), None, ones(5, WIDTH)
    )
    dropped, images = drop_conditions(config, jax.random.key(0), inputs, ones(1, 1, 1, 3))
    gone = np.asarray(images[:, 0, 0, 0, 0] == 0)
    assert gone.any() and not gone.all()
    np.testing.assert_array_equal(dropped.geometry_tokens[:, 0, 0] == 0, gone)
