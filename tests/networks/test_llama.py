# SPDX-License-Identifier: Apache-2.0
"""The decoder against transformers, and the properties its callers rely on: cache, padding anywhere, adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.networks.llama import Llama, LlamaConfig, init_cache

CONFIG = LlamaConfig(64, 32, 48, layers=2, heads=4, kv_heads=2, qkv_bias=True)
BATCH, LENGTH = 2, 8


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def initialized(config):
    def touch(model, x):
        return model.logits(model(x, jnp.zeros(x.shape[:2], jnp.int32), None)[0])

    return Llama(config).init(jax.random.key(0), jnp.zeros((1, 2, config.width)), method=touch)


@pytest.fixture(scope="module")
def params():
    return initialized(CONFIG)


@pytest.fixture
def inputs():
    x = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, CONFIG.width))
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    return x, positions, jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None, None]


def test_cache_gives_the_same_states_as_one_pass(params, inputs):
    x, positions, causal = inputs
    whole, none = Llama(CONFIG).apply(params, x, positions, causal)
    cache = init_cache(CONFIG, BATCH, LENGTH + 3)
    parts = []
    for start, stop in ((0, 3), (3, 4), (4, 8)):
        mask = jnp.pad(causal[:, :, start:stop], ((0, 0), (0, 0), (0, 0), (0, 3)))
        arguments = (x[:, start:stop], positions[:, start:stop], mask, cache, start)
        part, cache = Llama(CONFIG).apply(params, *arguments)
        parts.append(part)
    assert none is None
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-6)


def test_order_of_tokens_does_not_matter_given_positions_and_mask(params, inputs):
    x, positions, _ = inputs
    order = jnp.array([3, 0, 7, 1, 2, 6, 5, 4])
    straight, _ = Llama(CONFIG).apply(params, x, positions, None)
    shuffled, _ = Llama(CONFIG).apply(params, x[:, order], positions[:, order], None)
    np.testing.assert_allclose(shuffled, straight[:, order], atol=2e-6)


def test_masked_keys_do_not_matter(params, inputs):
    x, positions, _ = inputs
    mask = (jnp.arange(LENGTH) != 2)[None, None, None]
    before, _ = Llama(CONFIG).apply(params, x, positions, mask)
    after, _ = Llama(CONFIG).apply(params, x.at[:, 2].add(5.0), positions, mask)
    others = jnp.arange(LENGTH) != 2
    np.testing.assert_array_equal(after[:, others], before[:, others])


def test_remat_changes_no_gradient(params, inputs):
    x, positions, mask = inputs
    gradient = lambda config: jax.grad(lambda p: Llama(config).apply(p, x, positions, mask)[0].var())(params)
    remat = LlamaConfig(**{**vars(CONFIG), "remat": True})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient(CONFIG), gradient(remat))


def test_config_names_both_numbers():
    with pytest.raises(ValueError, match="width 30 must be a multiple of heads 4"):
        LlamaConfig(64, 30, 48, layers=2, heads=4, kv_heads=2)


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_equals_transformers(family):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    if family == "llama":
        config = LlamaConfig(64, 32, 48, 2, 4, 2, rms_eps=1e-5)
        reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    else:
        config = LlamaConfig(64, 32, 48, 2, 4, 2, rms_eps=1e-5, qkv_bias=True, tie_embeddings=True)
        settings = transformers.Qwen2Config(**sizes, tie_word_embeddings=True)
        reference = transformers.Qwen2ForCausalLM(settings).eval()
    state = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    stack = lambda name: np.stack([state[f"model.layers.{i}.{name}"] for i in range(2)])
    layers = {}
    for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for name in (f"{n}_proj" for n in names):
            layers[name] = {"kernel": stack(f"{part}.{name}.weight").swapaxes(1, 2)}
            if f"model.layers.0.{part}.{name}.bias" in state:
                layers[name]["bias"] = stack(f"{part}.{name}.bias")
    for name in ("input_layernorm", "post_attention_layernorm"):
        layers[name] = {"scale": stack(f"{name}.weight")}
    params = {"embed_tokens": state["model.embed_tokens.weight"], "layers": layers}
    params["norm"] = {"scale": state["model.norm.weight"]}
    if family == "llama":
        params["lm_head"] = {"kernel": state["lm_head.weight"].T}
    tokens = np.random.default_rng(0).integers(0, 64, (2, 9))

    def forward(model, tokens):
        mask = jnp.tril(jnp.ones((9, 9), bool))[None, None]
        positions = jnp.broadcast_to(jnp.arange(9), tokens.shape)
        return model.logits(model(model.embed(tokens), positions, mask)[0])

    ours = Llama(config).apply({"params": params}, tokens, method=forward)
    with torch.no_grad():
        theirs = reference(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=3e-6)


def test_parameters_may_be_numpy_constants_of_a_compiled_function(params):
    params = jax.device_get(params)
    embed = jax.jit(lambda tokens: Llama(CONFIG).apply(params, tokens, method="embed"))
    np.testing.assert_array_equal(embed(np.array([[3, 5]])), params["params"]["embed_tokens"][[[3, 5]]])
