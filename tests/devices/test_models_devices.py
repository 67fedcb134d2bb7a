# SPDX-License-Identifier: Apache-2.0
"""The losses of the real models, a few steps each, on 1 device and on 8 simulated ones: the same parameters."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from worldenv_jax import mesh as meshes
from worldenv_jax.configs import AugmentationConfig, PostTrainingConfig
from worldenv_jax.loop_ppo import LoopConfig
from worldenv_jax.policy import PolicyConfig, init_policy, laplace_log_prob, policy_distribution
from worldenv_jax.reflector import ReflectorConfig, init_reflector, reflector_loss
from worldenv_jax.simulator import (
    Kinematics,
    SimulatorBatch,
    SimulatorConfig,
    denoising_loss,
    init_simulator,
    no_grip,
)
from worldenv_jax.training.cloning import CloningBatch, make_action_loss
from worldenv_jax.training.post_training import make_update
from worldenv_jax.training.train_state import OptimizerConfig, init_train_state, make_train_step
from worldenv_jax.types import Camera, Observation, Rollout, Statistics, Text

BATCH, STEPS, SAMPLES, CHUNKS = 8, 3, 4, 2
LAYOUTS = {"8 data": (8, 1, 1), "2 x 2 x 2": (2, 2, 2)}
# Adam divides by the size of the gradient: where that is rounding and nothing else, a small epsilon would amplify it.
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, epsilon=1e-3, weight_decay=0.01)
STATISTICS = Statistics(*(np.full(n, sign, np.float32) for n, sign in ((7, -1), (7, 1), (8, -1), (8, 1))))
POLICY = PolicyConfig.debug(lora_rank=2)


def noise(*shape):
    return np.random.default_rng(len(shape)).normal(0.0, 0.3, shape).astype(np.float32)


def pictures(*shape):
    return np.random.default_rng(len(shape)).integers(0, 256, (*shape, 32, 32, 3), dtype=np.uint8)


def text(length):
    tokens = np.random.default_rng(length).integers(5, 500, (BATCH, length)).astype(np.int32)
    return Text(tokens, np.arange(length) < np.arange(length - BATCH, length)[:, None] + 1)


def initial(init, config):
    """Random parameters on the host; scales near 1, so that no signal dies out."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return rng.normal(1.0 if path[-1].key == "scale" else 0.0, 0.1, leaf.shape).astype(leaf.dtype)

    return jax.tree.map_with_path(draw, jax.eval_shape(functools.partial(init, config), jax.random.key(0)))


def on_host(tree):
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)  # not a view of a buffer that is donated later


def cloning():
    batch = CloningBatch(Observation(pictures(BATCH, 1), noise(BATCH, 8), text(24)), noise(BATCH, POLICY.chunk, 7))
    return initial(init_policy, POLICY), make_action_loss(POLICY, STATISTICS, AugmentationConfig()), batch


def simulator():
    config = SimulatorConfig.debug()
    pose = np.diag([1, -1, -1, 1]).astype(np.float32) + np.eye(4, k=3, dtype=np.float32)
    intrinsics = np.array([[32, 0, 16], [0, 32, 16], [0, 0, 1]], np.float32)
    shape = (BATCH, config.frames, 1, *config.latent_size, config.autoencoder.latent_channels)
    batch = SimulatorBatch(
        latents=noise(*shape),
        first_images=pictures(BATCH, 1),
        proprio=noise(BATCH, config.history, 8) / 3,
        previous_proprio=noise(BATCH, 8) / 3,
        previous_action=noise(BATCH, 7) / 3,
        grasp=noise(BATCH, 8) / 3,
        grip=no_grip(BATCH),
        holds=np.zeros((BATCH, config.chunk), np.float32),
        actions=noise(BATCH, config.chunk, 7),
        camera=Camera(np.tile(intrinsics, (BATCH, 1, 1, 1)), np.tile(pose, (BATCH, 1, 1, 1))),
        mask=np.ones((BATCH, config.chunk), bool),
    )
    loss = lambda params, key, rows: denoising_loss(config, params, key, rows, STATISTICS, Kinematics.osc_pose())
    params = initial(init_simulator, config)
    del params["autoencoder"]  # the loss begins with its latents
    return params, loss, batch


def reflector():
    config, frames = ReflectorConfig.debug(), 3
    batch = (pictures(BATCH, frames, 1), text(8), noise(BATCH, frames) > 0, np.ones((BATCH, frames), bool))
    loss = lambda params, key, rows: reflector_loss(config, params, *rows)
    return initial(init_reflector, config), loss, batch


def supervised(make, mesh):
    params, loss, batch = make()
    state = meshes.shard_state(init_train_state(params, OPTIMIZER, jax.random.key(1)), mesh)
    step = make_train_step(loss, OPTIMIZER, meshes.shardings(state, mesh))
    for _ in range(STEPS):
        state, metrics = jax.block_until_ready(step(state, meshes.shard_batch(batch, mesh)))
    return state.params, metrics["loss"]


def loop_ppo(mesh):
    optimizer = replace(OPTIMIZER, trainable=("^lora/", "head"))
    config = PostTrainingConfig(minibatches=1, chunks_at_once=1, max_kl=100.0, optimizer=optimizer)
    shape = (BATCH, CHUNKS, POLICY.chunk)
    rollout = Rollout(
        observations=Observation(pictures(BATCH, CHUNKS, 1), noise(BATCH, CHUNKS, 8), text(24)),
        actions=noise(*shape, 7),
        log_prob=noise(*shape) - 2.0,
        loc=noise(*shape, 7),
        log_scale=noise(*shape, 7),
        frames=pictures(*shape, 1),
        proprio=noise(*shape, 8),
        success_probability=abs(noise(*shape)),
        valid=np.ones(shape, bool),
        reward=np.linspace(0, 1, BATCH, dtype=np.float32),
        terminated=np.zeros(BATCH, bool),
        length=np.full(BATCH, CHUNKS * POLICY.chunk, np.int32),
    )
    params = initial(init_policy, POLICY)
    state = meshes.shard_state(init_train_state(params, optimizer, jax.random.key(1)), mesh)
    distribution = lambda params, observation: policy_distribution(POLICY, params, STATISTICS, observation)
    layout = meshes.shardings(state, mesh)
    update = make_update(distribution, laplace_log_prob, config, LoopConfig(), SAMPLES, layout)
    for number in range(STEPS):
        rows = meshes.shard_batch(rollout, mesh)
        state, metrics = jax.block_until_ready(update(state, jax.random.key(number), rows))
    assert float(metrics["updates"]) == 1.0
    return state.params, metrics["loss"]


TRAININGS = {
    "cloning": lambda mesh: supervised(cloning, mesh),
    "simulator": lambda mesh: supervised(simulator, mesh),
    "reflector": lambda mesh: supervised(reflector, mesh),
    "loop_ppo": loop_ppo,
}


@functools.cache
def train(name, *layout):
    mesh = meshes.make_mesh(*layout, devices=jax.devices()[: int(np.prod(layout))])
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        params, loss = TRAININGS[name](mesh)
    return on_host(params), float(loss)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TRAININGS)
def test_eight_devices_agree_with_one(name, layout):
    (params, loss), (expected, expected_loss) = train(name, *LAYOUTS[layout]), train(name, 1, 1, 1)
    assert np.isfinite(expected_loss) and loss == pytest.approx(expected_loss, abs=1e-5)
    far = {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(abs(a - b).max())
        for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(expected))
        if abs(a - b).max() > 1e-5
    }
    assert far == {}
