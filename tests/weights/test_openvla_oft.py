# SPDX-License-Identifier: Apache-2.0
"""OpenVLA-OFT checkpoints: full-size names and counts, the published folder in and out, and its errors."""

import ast
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open

from worldenv_jax.policy import PolicyConfig, init_policy, make_policy_fn, merge_adapters, tokenize_policy_prompts
from worldenv_jax.types import Observation, Statistics
from worldenv_jax.weights import openvla_folder as folders
from worldenv_jax.weights import openvla_oft as tables
from worldenv_jax.weights.name_tables import bind, check_names, export_tensors
from worldenv_jax.weights.torch_files import load_torch_file, save_torch_file

FULL = PolicyConfig.libero_full()
SMALL = PolicyConfig.debug(lora_rank=4, lora_alpha=2.0)
LM_HEAD_COPY = 32064 * 4096  # PEFT saves an adapted output layer once more


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def full_size_names(fixtures_dir) -> dict[str, dict[str, tuple]]:
    """The fixture's list: {"model" | name of a head: {tensor name: shape}}."""
    groups, group = {"model": {}}, "model"
    for line in (fixtures_dir / "openvla_oft/openvla_full_state_dict.txt").read_text().splitlines():
        if line.startswith("#") and ": " in line and "tensors" not in line:
            group = line.split()[1].rstrip(":")
            groups[group] = {}
        elif line and not line.startswith("#"):
            name, shape = line.split("\t")
            groups[group][name] = ast.literal_eval(shape)
    return groups


def test_full_size_parameter_counts():
    assert count(tables.abstract_model(FULL)) == 7_541_237_184
    assert count(tables.abstract_adapter(FULL)) - LM_HEAD_COPY == 110_828_288
    assert count(tables.abstract_head(FULL, "action_head")) == 151_117_831
    assert count(tables.abstract_head(FULL, "proprio_projector")) == 16_818_176
    assert count(tables.abstract_head(FULL, "scale_head")) == 167_899_143


def test_film_has_the_published_number_of_parameters():
    film = dataclasses.replace(FULL, film=True)
    with_film, without = (
        count(jax.eval_shape(lambda k, c=c: init_policy(c, k)["params"], jax.random.key(0))) for c in (film, FULL)
    )
    # 456,241,920 counts all 24 and 27 blocks; the last of each is not read and not built.
    last_blocks = 2 * 4097 * (1024 + 1152)
    assert with_film - without == 456_241_920 - last_blocks


def test_every_full_size_name_maps_with_its_shape(fixtures_dir):
    names = full_size_names(fixtures_dir)
    entries = bind(tables.model_rows(FULL), tables.abstract_model(FULL))
    check_names({name: entry.shape for name, entry in entries.items()}, names["model"], "the list")
    assert len(entries) == 982
    for head in ("action_head", "proprio_projector", "scale_head", "noisy_action_projector"):
        config = dataclasses.replace(FULL, head="diffusion") if head == "noisy_action_projector" else FULL
        entries = bind(tables.head_rows(config)[head], tables.abstract_head(config, head))
        check_names({name: entry.shape for name, entry in entries.items()}, names[head], "the list")


def random_like(abstract, dtype=jnp.bfloat16):
    """A tree of random bfloat16 arrays, seeded by position."""
    leaves, structure = jax.tree.flatten(abstract)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return structure.unflatten([jax.random.normal(k, leaf.shape, dtype) for k, leaf in zip(keys, leaves)])


@pytest.fixture
def checkpoint(tmp_path):
    """A synthetic checkpoint in the published layout: real names, shrunken widths, three shards."""
    params = random_like(tables.abstract_model(SMALL))
    for name in tables.head_rows(SMALL):
        params["params"] |= random_like(tables.abstract_head(SMALL, name))["params"]
    statistics = {"libero": {"action": {"q01": [-1] * 7, "q99": [1] * 7}, "num_transitions": 3}}
    folder = tmp_path / "checkpoint"
    folders.save_policy(folder, SMALL, params, statistics, step=150000, shard_bytes=100_000)
    folders.save_adapter(folder / "lora_adapter", SMALL, random_like(tables.abstract_adapter(SMALL), jnp.float32))
    return folder


def tensors_of(folder) -> dict[str, np.ndarray]:
    tensors = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            tensors |= {name: file.get_tensor(name) for name in file.offset_keys()}
    for path in sorted(folder.glob("*.pt")):
        tensors |= {f"{path.name}/{name}": array for name, array in load_torch_file(path).items()}
    return tensors


def test_import_then_export_is_byte_identical(checkpoint, tmp_path):
    shards = sorted(path.name for path in checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    params = folders.load_policy(checkpoint, SMALL)
    adapter = folders.load_adapter(checkpoint / "lora_adapter", SMALL)
    statistics = json.loads((checkpoint / "dataset_statistics.json").read_text())
    folders.save_policy(tmp_path / "again", SMALL, params, statistics, step=150000)
    folders.save_adapter(tmp_path / "again/lora_adapter", SMALL, adapter)
    before, after = tensors_of(checkpoint), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype and array.tobytes() == after[name].tobytes(), name
    assert json.loads((tmp_path / "again/dataset_statistics.json").read_text()) == statistics


def test_names_in_the_files_are_the_published_ones(checkpoint):
    names = set(tensors_of(checkpoint))
    assert {
        "vision_backbone.featurizer.blocks.2.attn.qkv.weight",  # the block that is not read
        "vision_backbone.fused_featurizer.attn_pool.latent",
        "language_model.lm_head.weight",
        "base_model.model.vision_backbone.featurizer.patch_embed.proj.lora_B.weight",
        "base_model.model.language_model.lm_head.base_layer.weight",
        "action_head--150000_checkpoint.pt/module.model.mlp_resnet_blocks.1.ffn.0.weight",
        "proprio_projector--150000_checkpoint.pt/module.fc1.weight",
    } <= names


def test_loads_onto_a_mesh(checkpoint):
    mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])
    abstract = tables.abstract_model(SMALL)
    for name in tables.head_rows(SMALL):
        abstract["params"] |= tables.abstract_head(SMALL, name)["params"]
    spec = lambda x: (
        PartitionSpec(*[None] * (x.ndim - 1), "fsdp") if x.ndim and x.shape[-1] % 4 == 0 else PartitionSpec()
    )
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, spec(x)), abstract)
    sharded = folders.load_policy(checkpoint, SMALL, shardings)
    jax.tree.map(np.testing.assert_array_equal, sharded, folders.load_policy(checkpoint, SMALL))
    kernel = sharded["params"]["llama"]["layers"]["q_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 32, 8)


def test_loaded_policy_acts_and_merging_keeps_its_actions(checkpoint):
    params = folders.load_policy(checkpoint, SMALL, dtype="float32")
    params["lora"] = jax.tree.map(lambda x: 0.1 * x, folders.load_adapter(checkpoint / "lora_adapter", SMALL)["lora"])
    observation = Observation(
        np.zeros((1, 1, 32, 32, 3), np.uint8), np.zeros((1, 8)), tokenize_policy_prompts(SMALL, ["push it"])
    )
    statistics = Statistics(-jnp.ones(7), jnp.ones(7), -jnp.ones(8), jnp.ones(8))
    act = lambda config, params: jax.jit(make_policy_fn(config, statistics, deterministic=True))(
        params, jax.random.split(jax.random.key(0), 1), observation
    )
    with jax.default_matmul_precision("highest"):
        beside = act(SMALL, params).actions
        merged = act(dataclasses.replace(SMALL, lora_rank=0), merge_adapters(SMALL, params)).actions
    assert np.isfinite(beside).all()
    np.testing.assert_allclose(beside, merged, atol=1e-4 * np.abs(beside).max())


def test_ript_files_of_the_scale_head(checkpoint, tmp_path):
    head = folders.load_head(folders.find_head(checkpoint, "scale_head"), SMALL, "scale_head")
    flat = dict(export_tensors(tables.head_rows(SMALL)["scale_head"], {"params": head}))
    pick = lambda prefix: {key.removeprefix(prefix): x for key, x in flat.items() if key.startswith(prefix)}
    parts = {"scale_trunk": pick("trunk."), "log_b_head": pick("log_b_head.")}
    assert folders.flat_head({"scale_header": parts}, "scale_head").keys() == flat.keys()
    assert folders.flat_head(parts, "scale_head").keys() == flat.keys()


def test_the_newest_head_is_taken(tmp_path):
    for step in ("50000", "150000", "9000"):
        save_torch_file(tmp_path / f"action_head--{step}_checkpoint.pt", {})
    assert folders.find_head(tmp_path, "action_head").name == "action_head--150000_checkpoint.pt"
    save_torch_file(tmp_path / "action_head--latest_checkpoint.pt", {})
    assert folders.find_head(tmp_path, "action_head").name == "action_head--latest_checkpoint.pt"


def test_one_error_lists_the_differences_of_all_files(checkpoint):
    narrow = dataclasses.replace(SMALL.llama, mlp_width=64, layers=1)
    config = dataclasses.replace(SMALL, llama=narrow, action_dim=6, head="diffusion", lora_rank=0)
    with pytest.raises(ValueError) as error:
        folders.load_policy(checkpoint, config)
    for line in (
        "unexpected  language_model.model.layers.1.self_attn.q_proj.weight (32, 32)  [model]",
        "misshapen   language_model.model.layers.0.mlp.up_proj.weight: got (48, 32), expected (64, 32)  [model]",
        "missing     noise_predictor.mlp_resnet.fc1.weight (32, 192)  [action_head--150000_checkpoint.pt]",
        "missing     noisy_action_projector--*.pt",
    ):
        assert line in str(error.value)


def test_an_adapter_of_another_scale_is_an_error(checkpoint):
    with pytest.raises(ValueError, match="lora_alpha: got 2.0, expected 8.0"):
        folders.load_adapter(checkpoint / "lora_adapter", dataclasses.replace(SMALL, lora_alpha=8.0))


def test_a_causal_attention_implementation_is_an_error(tmp_path):
    text = {"rms_norm_eps": 1e-5, "vocab_size": 512, "hidden_size": 48, "_attn_implementation": "eager"}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text, "image_sizes": [224, 224]}))
    with pytest.raises(ValueError) as error:
        folders.read_config(tmp_path, SMALL)
    assert "causal" in str(error.value) and "hidden_size: got 48, expected 32" in str(error.value)
    assert "image_sizes: got [224, 224], expected 32" in str(error.value)
    text |= {"hidden_size": 32, "_attn_implementation": "sdpa"}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
    assert folders.read_config(tmp_path, SMALL).llama.rms_eps == 1e-5
