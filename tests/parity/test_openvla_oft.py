# SPDX-License-Identifier: Apache-2.0
"""Every quantity of the OpenVLA-OFT / RIPT-VLA fixtures, and the diffusion head's formulas against NumPy."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tools.parity import openvla_oft


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def test_every_quantity_is_within_tolerance(fixtures_dir):
    results = list(openvla_oft.check(fixtures_dir / "openvla_oft"))
    assert len(results) == 31
    assert not [result for result in results if not result.passed]


def test_an_unknown_quantity_and_a_wrong_number_fail(fixtures_dir, tmp_path):
    folder = tmp_path / "fixture"
    shutil.copytree(fixtures_dir / "openvla_oft", folder)
    outputs = dict(np.load(folder / "outputs.npz"))
    kept = {"patches_dino": outputs["patches_dino"] + 1e-3, "mystery": np.zeros(3)}
    np.savez(folder / "outputs.npz", **kept)
    for optional in ("normalisation.npz", "lora_merged_expected.safetensors"):
        (folder / optional).unlink()
    assert [(result.name, result.passed) for result in openvla_oft.check(folder)] == [
        ("patches_dino", False),
        ("mystery", False),
    ]


def test_a_folder_with_a_diffusion_head(fixtures_dir, tmp_path):
    """The visible fixture has no diffusion head: one is made here, and DDIM is followed in NumPy from its epsilons."""
    folder, steps, rng = tmp_path / "fixture", 50, np.random.default_rng(0)
    shutil.copytree(fixtures_dir / "openvla_oft", folder)
    config = json.loads((folder / "config.json").read_text())
    config["diffusion"] = {"num_diffusion_steps": steps}
    (folder / "config.json").write_text(json.dumps(config))
    head = load_file(folder / "action_head.safetensors")
    prefix = "noise_predictor.mlp_resnet."
    head = {name.replace("model.", prefix, 1): array for name, array in head.items()}
    save_file(head, folder / "diffusion_action_head.safetensors")
    width, normal = config["llm"]["hidden_size"], lambda *shape: rng.standard_normal(shape).astype(np.float32) / 4
    projector = {"fc1.weight": normal(width, 1), "fc1.bias": normal(width)}
    projector |= {"fc2.weight": normal(width, width), "fc2.bias": normal(width)}
    save_file(projector, folder / "noisy_action_projector.safetensors")
    inputs = dict(np.load(folder / "inputs.npz"))
    inputs["diffusion_start_noise"] = rng.standard_normal((1, 8, 7)).astype(np.float32)
    inputs["diffusion_train_noise"], inputs["diffusion_train_actions"] = normal(2, 8, 7), normal(2, 8, 7)
    inputs["diffusion_train_timesteps"] = np.array([3, 49])

    values = openvla_oft.Checks(folder, config, inputs).diffusion
    alpha_bar = lambda t: np.cos((t / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = [min(1 - alpha_bar(i + 1) / alpha_bar(i), 0.999) for i in range(steps)]
    alphas = np.cumprod(1 - np.array(betas))
    np.testing.assert_allclose(values["diffusion_alphas_cumprod"], alphas, atol=1e-6)
    x = inputs["diffusion_start_noise"].astype(np.float64)
    for epsilon, after, t in zip(values["diffusion_eps"], values["diffusion_x"], reversed(range(steps))):
        previous = alphas[t - 1] if t else 1.0
        clean = np.clip((x - np.sqrt(1 - alphas[t]) * epsilon) / np.sqrt(alphas[t]), -1, 1)
        x = np.sqrt(previous) * clean + np.sqrt(1 - previous) * np.asarray(epsilon)
        np.testing.assert_allclose(after, x, atol=3e-4)
    a = alphas[[3, 49], None, None]
    noisy = np.sqrt(a) * inputs["diffusion_train_actions"] + np.sqrt(1 - a) * inputs["diffusion_train_noise"]
    np.testing.assert_allclose(values["diffusion_train_noisy"], noisy, atol=1e-6)
    angle = 49 * np.exp(-np.log(1e4) * np.arange(width // 2) / (width // 2 - 1))
    embedding = np.concatenate([np.sin(angle), np.cos(angle)])
    np.testing.assert_allclose(values["diffusion_time_embedding"][1], embedding, atol=1e-5)
