# SPDX-License-Identifier: Apache-2.0
"""Runs that start from published checkpoints, and give their models back in the same layouts."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tools import export_checkpoint
from worldenv_jax.configs import PretrainedConfig, debug
from worldenv_jax.data.statistics import statistics_to_dict
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.networks.resampler import ResamplerConfig
from worldenv_jax.networks.vision_transformer import ViTConfig
from worldenv_jax.policy import PolicyConfig, init_policy, merge_adapters, policy_distribution
from worldenv_jax.reflector import init_reflector
from worldenv_jax.simulator import SimulatorConfig, init_simulator
from worldenv_jax.simulator.autoencoder import AutoencoderConfig
from worldenv_jax.simulator.video_unet import VideoUNetConfig
from worldenv_jax.training import pipeline, reflector_training
from worldenv_jax.training.pretrained import complete_config, initial_policy, initial_reflector, initial_simulator
from worldenv_jax.training.workdir import mesh_from_config
from worldenv_jax.types import Observation, Statistics, Text
from worldenv_jax.weights import evac, llava
from worldenv_jax.weights import openvla_oft as tables
from worldenv_jax.weights.openvla_folder import load_policy, save_policy
from worldenv_jax.weights.safetensors_files import open_safetensors, save_safetensors
from worldenv_jax.weights.torch_files import load_torch_file, save_torch_file

STATISTICS = Statistics(
    np.full(7, -0.5, np.float32), np.full(7, 0.75, np.float32), np.full(8, -1.5, np.float32), np.full(8, 2, np.float32)
)


def random_like(abstract, dtype=jnp.float32, seed=0):
    leaves, structure = jax.tree.flatten(abstract)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten([0.1 * jax.random.normal(k, leaf.shape, dtype) for k, leaf in zip(keys, leaves)])


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    """An OpenVLA-OFT folder at the debug preset's size, in bfloat16, without a scale head."""
    config = PolicyConfig.debug()
    folder = tmp_path_factory.mktemp("published") / "policy"
    params = random_like(tables.abstract_policy(config), jnp.bfloat16)
    del params["params"]["scale_head"]
    save_policy(folder, config, params, {"kitchen": statistics_to_dict(STATISTICS)})
    text = {"vocab_size": 512, "hidden_size": 32, "rms_norm_eps": 3e-6, "max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps({"text_config": text, "image_sizes": [32, 32]}))
    return folder


@pytest.fixture(scope="module")
def reflector_folder(tmp_path_factory):
    """A LLaVA-OneVision folder at the debug preset's size."""
    folder = tmp_path_factory.mktemp("published") / "reflector"
    folder.mkdir()
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    text = {"model_type": "qwen2", "vocab_size": 512, "hidden_size": 16, "intermediate_size": 32}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"max_position_embeddings": 512, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rope_theta": 1e6}
    raw = {"vision_config": vision, "text_config": text, "image_token_index": 9, "vision_feature_layer": -1}
    (folder / "config.json").write_text(json.dumps(raw))
    config = llava.config_from_json(raw)
    tensors = dict(llava.export_llava(config, random_like(llava.abstract_llava(config))))
    shapes = {name: array.shape for name, array in tensors.items()}
    save_safetensors(folder / "model.safetensors", shapes, dict.fromkeys(shapes, "float32"), tensors.items())
    return folder


def small_evac() -> SimulatorConfig:
    """EVAC's architecture without additions, for the debug preset's frames and chunks."""
    resampler = ResamplerConfig(4, 14, 16, 16, 1, 2, 8)
    return SimulatorConfig(
        image_size=(32, 32),
        chunk=4,
        max_chunks=4,
        autoencoder=AutoencoderConfig(32, (1, 1), 1),
        unet=VideoUNetConfig(32, (1, 2), 1, (1,), head_dim=16, init_attention_heads=2, context_width=16),
        image_encoder=replace(ViTConfig.openclip_huge(), width=16, layers=2, heads=2, mlp_width=32),
        image_resampler=replace(resampler, input_width=16),
        action_resampler=resampler,
        ddim_steps=2,
    )


@pytest.fixture(scope="module")
def simulator_file(tmp_path_factory):
    """An EVAC checkpoint, small, in the layout of DeepSpeed and half precision."""
    config = small_evac()
    params = random_like(jax.eval_shape(lambda: init_simulator(config, jax.random.key(0))), jnp.float16)
    path = tmp_path_factory.mktemp("published") / "evac.pt"
    save_torch_file(path, evac.export_evac(config, params, {"betas": np.arange(3.0)}, "deepspeed"))
    return path


def config_with(lora_rank=0, **paths):
    config = debug()
    policy = replace(config.policy, lora_rank=lora_rank)
    trainable = ("^lora/", "_head") if lora_rank else ("",)
    with_trainable = lambda stage: replace(stage, optimizer=replace(stage.optimizer, trainable=trainable))
    return replace(
        config,
        policy=policy,
        simulator=small_evac() if "simulator" in paths else config.simulator,
        pretrained=PretrainedConfig(**{name: str(path) for name, path in paths.items()}),
        cloning=with_trainable(config.cloning),
        post_training=with_trainable(config.post_training),
    )


def test_the_policy_starts_as_published(policy_folder):
    config = complete_config(config_with(lora_rank=2, policy=policy_folder))
    assert config.policy.llama.rms_eps == 3e-6 and config.policy.llama.max_positions == 1024
    params = initial_policy(config, jax.random.key(5), mesh_from_config(config.mesh))
    published = load_policy(policy_folder, config.policy)["params"]
    for name, tree in published.items():
        same = jax.tree.map(lambda a, b: bool((a == b).all()), params["params"][name], tree)
        assert all(jax.tree.leaves(same)), name
    scratch = init_policy(config.policy, jax.random.key(5))
    for ours, theirs in ((params["lora"], scratch["lora"]),
                         (params["params"]["scale_head"], scratch["params"]["scale_head"])):  # fmt: skip
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    dtypes = {name: {leaf.dtype.name for leaf in jax.tree.leaves(tree)} for name, tree in params["params"].items()}
    assert dtypes["llama"] == {"bfloat16"}  # frozen
    assert dtypes["action_head"] == dtypes["scale_head"] == {"float32"}  # trained
    assert params["params"].keys() == scratch["params"].keys()


def test_a_run_from_a_published_policy_and_back(policy_folder, tmp_path):
    config = config_with(lora_rank=2, policy=policy_folder, statistics="kitchen")
    run = pipeline.Run(config, tmp_path / "run")
    run.workdir.save_config()
    for name in ("collect_demonstrations", "clone_policy"):
        pipeline.STAGES[name](run)
    np.testing.assert_array_equal(run.models.statistics.action_q99, STATISTICS.action_q99)
    trained = run.params("policy")
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(trained["lora"]))
    arguments = ["--workdir", str(run.workdir.folder), "--model=policy", "--to", str(tmp_path / "exported")]
    export_checkpoint.main(arguments)
    assert (tmp_path / "exported" / "config.json").read_bytes() == (policy_folder / "config.json").read_bytes()
    statistics = json.loads((tmp_path / "exported" / "dataset_statistics.json").read_text())
    assert statistics == {"kitchen": statistics_to_dict(STATISTICS)}
    stored, back = open_safetensors(policy_folder), open_safetensors(tmp_path / "exported")
    unread = "vision_backbone.fused_featurizer.attn_pool.latent"
    np.testing.assert_array_equal(back.read(unread), stored.read(unread))

    exported = load_policy(tmp_path / "exported", run.config.policy)
    length = run.config.policy.text_length
    observation = Observation(
        np.full((1, 1, 32, 32, 3), 90, np.uint8), np.zeros((1, 8), np.float32),
        Text(np.full((1, length), 7, np.int32), np.ones((1, length), bool)),
    )  # fmt: skip
    plain = replace(run.config.policy, lora_rank=0)
    merged = policy_distribution(plain, exported, STATISTICS, observation)
    jax.tree.map(
        np.testing.assert_array_equal,
        merged,
        policy_distribution(plain, merge_adapters(run.config.policy, trained), STATISTICS, observation),
    )
    with pytest.raises(WorldEnvError, match="exists already"):
        export_checkpoint.main(arguments)


def test_the_simulator_starts_as_published(simulator_file):
    config = config_with(simulator=simulator_file)
    params = initial_simulator(config, jax.random.key(0))
    tensors = evac.flatten_checkpoint(load_torch_file(simulator_file))
    kernel = tensors["model.diffusion_model.out.2.weight"]  # [O, I, 3, 3]
    assert kernel.dtype == np.float16
    np.testing.assert_array_equal(params["denoiser"]["unet"]["conv_out"]["kernel"], kernel.transpose(2, 3, 1, 0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


def test_the_reflector_starts_as_published(reflector_folder):
    config = complete_config(config_with(reflector=reflector_folder))
    assert config.reflector.llava.language.rope_theta == 1e6
    params = initial_reflector(config, jax.random.key(1), mesh_from_config(config.mesh))
    stored = open_safetensors(reflector_folder).read("multi_modal_projector.linear_1.weight")
    np.testing.assert_array_equal(params["params"]["llava"]["projector"]["linear_1"]["kernel"], stored.T)
    scratch = init_reflector(config.reflector, jax.random.key(1))
    assert jax.tree.structure(params) == jax.tree.structure(scratch)
    jax.tree.map(np.testing.assert_array_equal, params["params"]["reward_head"], scratch["params"]["reward_head"])


def test_all_three_run_and_go_back(policy_folder, reflector_folder, simulator_file, tmp_path, monkeypatch):
    monkeypatch.setattr(reflector_training, "REPLAY_BATCH", 8)
    config = config_with(policy=policy_folder, reflector=reflector_folder, simulator=simulator_file)
    nothing = lambda stage: replace(stage, steps=0)
    config = replace(
        config,
        cloning=nothing(config.cloning),
        autoencoder=nothing(config.autoencoder),
        denoiser=nothing(config.denoiser),
        reflector_training=nothing(config.reflector_training),
    )
    run = pipeline.Run(config, tmp_path / "run")
    run.workdir.save_config()
    for name in ("collect_demonstrations", "clone_policy", "collect_exploration", "train_simulator", "train_reflector"):
        pipeline.STAGES[name](run)
    assert run.models.config.simulator.latent_scale == config.simulator.latent_scale
    for model in ("simulator", "reflector"):
        export_checkpoint.main(
            ["--workdir", str(run.workdir.folder), f"--model={model}", "--to", str(tmp_path / model)]
        )
    before = evac.flatten_checkpoint(load_torch_file(simulator_file))
    after = evac.flatten_checkpoint(load_torch_file(tmp_path / "simulator" / "evac.pt"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)
    before, after = open_safetensors(reflector_folder), open_safetensors(tmp_path / "reflector" / "model.safetensors")
    assert before.shapes == after.shapes
    for name in before.shapes:
        np.testing.assert_array_equal(after.read(name), before.read(name), err_msg=name)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"policy": "nowhere"}, "nowhere/config.json"),
        ({"reflector": "nowhere"}, "nowhere/config.json"),
    ],
)
def test_missing_checkpoints(paths, message):
    with pytest.raises(WorldEnvError, match=message):
        complete_config(config_with(**paths))


def test_a_simulator_that_is_not_evac(tmp_path):
    run = pipeline.Run(debug(), tmp_path / "run")
    run.workdir.save_config()
    run.workdir.save_params("simulator", init_simulator(run.config.simulator, jax.random.key(0)))
    arguments = ["--workdir", str(run.workdir.folder), "--model=simulator", "--to", str(tmp_path / "exported")]
    with pytest.raises(WorldEnvError, match="autoencoder/shortcut_in/bias"):
        export_checkpoint.main(arguments)
    assert not (tmp_path / "exported").exists()


def test_a_policy_of_other_sizes(policy_folder):
    config = config_with(policy=policy_folder)
    wide = replace(config, policy=replace(config.policy, llama=replace(config.policy.llama, width=64)))
    with pytest.raises(WorldEnvError, match="text_config.hidden_size: got 32, expected 64"):
        complete_config(wide)
    longer = replace(config, policy=replace(config.policy, head_width=48))
    with pytest.raises(WorldEnvError, match="misshapen.*action_head"):
        initial_policy(longer, jax.random.key(0), mesh_from_config(config.mesh))


def test_a_simulator_without_its_image_encoder(simulator_file, tmp_path):
    tensors = evac.flatten_checkpoint(load_torch_file(simulator_file))
    clip = {name: array for name, array in tensors.items() if name.startswith(evac.CLIP)}
    rest = {name: array for name, array in tensors.items() if name not in clip}
    save_torch_file(tmp_path / "part.pt", {"state_dict": rest})
    with pytest.raises(WorldEnvError, match="missing .*embedder.model.visual"):
        initial_simulator(config_with(simulator=tmp_path / "part.pt"), jax.random.key(0))
    save_torch_file(tmp_path / "clip.pt", {name.removeprefix(evac.CLIP): array for name, array in clip.items()})
    paths = {"simulator": tmp_path / "part.pt", "image_encoder": tmp_path / "clip.pt"}
    params = initial_simulator(config_with(**paths), jax.random.key(0))
    whole = initial_simulator(config_with(simulator=simulator_file), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, whole)
