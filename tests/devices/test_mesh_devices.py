# SPDX-License-Identifier: Apache-2.0
"""The same training on 1 device and on 8 simulated ones, in several layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from worldenv_jax import mesh as meshes
from worldenv_jax.checkpoints import Checkpointer
from worldenv_jax.networks.llama import Llama, LlamaConfig
from worldenv_jax.training.train_state import OptimizerConfig, init_train_state, make_train_step

MODEL = LlamaConfig(vocab_size=32, width=16, mlp_width=32, layers=2, heads=4, kv_heads=2)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.01, ema_decay=0.9)
LAYOUTS = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "data x fsdp x tensor": (2, 2, 2)}


def forward(module, tokens):
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, 1, length, length))
    hidden, _ = module(module.embed(tokens), positions, mask)
    return module.logits(hidden)


def loss_fn(params, key, tokens):
    keep = jax.random.bernoulli(key, 0.9, tokens.shape)  # the noise must not depend on the layout
    logits = Llama(MODEL).apply(params, tokens, method=forward)[:, :-1]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(losses * keep[:, 1:]), {"kept": keep.mean()}


def batch_fn(step):
    return np.random.default_rng(step).integers(0, 32, (16, 6)).astype(np.int32)


def make_state():
    params = Llama(MODEL).init(jax.random.key(0), jnp.zeros((1, 6), jnp.int32), method=forward)
    return init_train_state(params, OPTIMIZER, jax.random.key(1))


def train(mesh, steps):
    with jax.default_matmul_precision("highest"):
        state = meshes.shard_state(make_state(), mesh)
        step_fn = make_train_step(loss_fn, OPTIMIZER, meshes.shardings(state, mesh))
        for step in range(steps):
            state, metrics = step_fn(state, meshes.shard_batch(batch_fn(step), mesh))
            jax.block_until_ready(metrics)
    return state, metrics


def assert_close(a, b, tolerance=1e-5):
    close = lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=tolerance)
    jax.tree.map(close, a, b)


@pytest.fixture(scope="module")
def one_device():
    return train(meshes.make_mesh(devices=jax.devices()[:1]), 20)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_agree_with_one_device(layout, one_device):
    state, metrics = train(meshes.make_mesh(*LAYOUTS[layout]), 20)
    expected, expected_metrics = one_device
    for name in ("params", "ema"):
        assert_close(getattr(state, name), getattr(expected, name))
    assert float(metrics["kept"]) == float(expected_metrics["kept"])
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], atol=1e-5)


@pytest.mark.parametrize("layout", [(2, 2, 2), (4, 2, 1), (1, 2, 4)])
def test_gradients_of_a_residual_layer_on_a_mesh_are_right(layout):
    # Without the order of the axes in `mesh.BATCH` rows of devices are swapped in the gradient of x on 2 x 2 x 2.
    mesh, generator = meshes.make_mesh(*layout), np.random.default_rng(0)
    kernel, x = (generator.normal(size=(rows, 32)).astype(np.float32) for rows in (32, 8))
    loss = lambda params, x: jnp.abs(x + x @ params["kernel"]).sum()
    params, rows = meshes.shard_state({"kernel": kernel}, mesh), meshes.shard_batch(x, mesh)
    assert params["kernel"].sharding.spec == P("fsdp", "tensor")
    of_params, of_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, rows)
    sign = np.sign(x + x @ kernel)  # d|y|/dy
    np.testing.assert_allclose(of_x, sign + sign @ kernel.T, atol=1e-4)
    np.testing.assert_allclose(of_params["kernel"], x.T @ sign, atol=1e-4)


def test_steps_keep_the_layout_of_parameters_and_optimiser_state():
    mesh = meshes.make_mesh(*LAYOUTS["data x fsdp x tensor"])
    state, _ = train(mesh, 2)
    wanted = meshes.shardings(state, mesh)
    differ = [
        jax.tree_util.keystr(path)
        for (path, leaf), sharding in zip(jax.tree_util.tree_flatten_with_path(state)[0], jax.tree.leaves(wanted))
        if not leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    ]
    assert differ == []
    assert state.params["params"]["layers"]["q_proj"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")


def test_batch_rows_lie_on_their_devices():
    mesh = meshes.make_mesh(2, 2, 2)
    rows = np.arange(16, dtype=np.float32).reshape(8, 2)
    batch = meshes.shard_batch(rows, mesh)
    assert batch.sharding.spec == meshes.BATCH
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(np.asarray(batch), rows)


def test_rows_are_split_only_where_they_divide():
    mesh = meshes.make_mesh(2, 2, 2)
    rows = {"a": np.arange(12.0).reshape(4, 3), "b": np.arange(4)}
    split = meshes.split_rows(rows, mesh)
    assert {shard.data.shape for shard in split["a"].addressable_shards} == {(1, 3)}
    jax.tree.map(np.testing.assert_array_equal, split, rows)
    assert meshes.split_rows({"a": np.zeros((6, 3))}, mesh)["a"].shape == (6, 3)
    assert isinstance(meshes.split_rows({"a": np.zeros((6, 3))}, mesh)["a"], np.ndarray)


def test_shuffled_rows_stay_split_where_that_is_asked_for():
    mesh = meshes.make_mesh(2, 4, 1)
    rows = meshes.shard_batch(np.arange(64, dtype=np.float32).reshape(16, 4), mesh)
    order = np.random.default_rng(0).permutation(16)
    shuffle = jax.jit(lambda x: meshes.constrain_batch({"x": x[order]})["x"])
    with jax.set_mesh(mesh):
        shuffled = shuffle(rows)
    assert {shard.data.shape for shard in shuffled.addressable_shards} == {(2, 4)}
    np.testing.assert_array_equal(np.asarray(shuffled), np.asarray(rows)[order])
    np.testing.assert_array_equal(meshes.constrain_batch(np.ones(3)), np.ones(3))  # no mesh, nothing to do


def test_checkpoint_of_one_layout_goes_on_in_another(tmp_path, one_device):
    mesh, other = meshes.make_mesh(8, 1, 1), meshes.make_mesh(2, 2, 2)
    state, _ = train(mesh, 20)
    with Checkpointer(tmp_path) as saver:
        saver.save(20, state)
        restored = saver.restore_latest(meshes.abstract_state(make_state(), other)).state
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), state.params, restored.params
    )
    step_fn = make_train_step(loss_fn, OPTIMIZER)
    with jax.default_matmul_precision("highest"):
        restored, _ = step_fn(restored, meshes.shard_batch(batch_fn(20), other))
        expected, _ = step_fn(jax.tree.map(jnp.copy, one_device[0]), batch_fn(20))
    assert_close(restored.params, expected.params)
