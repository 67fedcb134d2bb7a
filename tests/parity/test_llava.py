# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 and LLaVA-OneVision against the stored numbers, and against transformers on random tiny models."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from worldenv_jax.reflector.llava import llava_forward
from worldenv_jax.weights.llava import config_from_json, import_llava
from worldenv_jax.weights.name_tables import Tensors

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.parity.llava import check  # noqa: E402

TOLERANCE = 1e-5
IMAGE, VIDEO = 127, 126
TEXT_SIZES = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
VISION_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
}


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def test_fixture_in_both_layouts(fixtures_dir):
    results = list(check(fixtures_dir / "llava"))
    assert len(results) == 16
    assert [result for result in results if not result.passed] == []


def reference_model(family: str, seed: int):
    """A random tiny model of transformers whose every weight matters."""
    torch = pytest.importorskip("torch")
    import transformers as hf

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    if family == "llava":
        vision = hf.CLIPVisionConfig(image_size=28, projection_dim=16, **VISION_SIZES)
        config = hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**TEXT_SIZES), image_token_id=IMAGE)
        model = hf.LlavaForConditionalGeneration(config)
    else:
        vision = hf.SiglipVisionConfig(image_size=45, vision_use_head=False, **VISION_SIZES)
        text = hf.Qwen2Config(tie_word_embeddings=seed == 0, **TEXT_SIZES)
        config = hf.LlavaOnevisionConfig(
            vision_config=vision, text_config=text, image_token_index=IMAGE, video_token_index=VIDEO
        )
        model = hf.LlavaOnevisionForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.set_attn_implementation("eager")
    return model.eval()


def ours(model):
    """(config, params) of the same model here."""
    config = config_from_json(model.config.to_dict())
    arrays = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    params = import_llava(config, Tensors.from_arrays(arrays), "state_dict")
    return config, {"params": params["params"]}


def run_reference(model, tokens, mask, **images):
    torch = pytest.importorskip("torch")
    inputs = {name: torch.as_tensor(array) for name, array in images.items()}
    with torch.no_grad():
        output = model(
            input_ids=torch.as_tensor(tokens), attention_mask=torch.as_tensor(mask), output_hidden_states=True, **inputs
        )
    return output.hidden_states[-1].numpy(), output.logits.numpy()


def assert_same(got, expected, mask):
    for a, b in zip(got, expected):
        np.testing.assert_allclose(np.asarray(a)[mask], b[mask], rtol=0, atol=TOLERANCE)


def prompt(token: int, *parts):
    """Token ids: an integer n stands for n placeholders, a list for itself."""
    return [i for part in parts for i in ([token] * part if isinstance(part, int) else part)]


@pytest.mark.parity
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_llava_15_with_several_images_and_padding(seed):
    model = reference_model("llava", seed)
    config, params = ours(model)
    rows = [prompt(IMAGE, [1, 5], 4, [6, 7], 4, [8, 9]), prompt(IMAGE, [1], 4, [20, 21, 22])]
    tokens = np.array([rows[0], rows[1] + [0] * (len(rows[0]) - len(rows[1]))])
    mask = np.arange(tokens.shape[1]) < np.array([[len(row)] for row in rows])
    pixels = np.random.default_rng(seed).normal(size=(3, 28, 28, 3)).astype(np.float32)
    expected = run_reference(model, tokens, mask.astype(int), pixel_values=pixels.transpose(0, 3, 1, 2).copy())
    assert_same(llava_forward(config, params, tokens, mask, pixels), expected, mask)


@pytest.mark.parity
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_onevision_with_several_images_and_padding(seed):
    model = reference_model("onevision", seed)
    config, params = ours(model)
    per_image = 3 * 3 + 1  # the newline is a token of its own
    rows = [prompt(IMAGE, [1, 5], per_image, [6], per_image, [8, 9]), prompt(IMAGE, [3], per_image, per_image, [2])]
    tokens = np.array([rows[0], rows[1] + [0] * (len(rows[0]) - len(rows[1]))])
    mask = np.arange(tokens.shape[1]) < np.array([[len(row)] for row in rows])
    pixels = np.random.default_rng(seed).normal(size=(4, 45, 45, 3)).astype(np.float32)
    expected = run_reference(
        model,
        tokens,
        mask.astype(int),
        pixel_values=pixels.transpose(0, 3, 1, 2)[:, None].copy(),
        image_sizes=np.full((4, 2), 45),
        batch_num_images=np.array([2, 2]),
    )
    assert_same(llava_forward(config, params, tokens, mask, pixels), expected, mask)


@pytest.mark.parity
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_onevision_video(seed):
    model = reference_model("onevision", seed)
    config, params = ours(model)
    placeholders = 3 * 2 * 2 + 1  # three frames of 3 x 3 patches pooled to 2 x 2, one newline
    row = lambda token: np.array([prompt(token, [1, 5], placeholders, [6, 7])])
    mask = np.ones_like(row(0), bool)
    pixels = np.random.default_rng(seed).normal(size=(3, 45, 45, 3)).astype(np.float32)
    video = pixels.transpose(0, 3, 1, 2)[None].copy()
    expected = run_reference(model, row(VIDEO), mask.astype(int), pixel_values_videos=video)
    # One placeholder serves images and videos here.
    assert_same(llava_forward(config, params, row(IMAGE), mask, pixels, video=True), expected, mask)


@pytest.mark.parity
def test_placeholder_count_is_checked():
    model = reference_model("llava", 0)
    config, params = ours(model)
    tokens = np.array([prompt(IMAGE, [1], 3)])
    with pytest.raises(ValueError, match=r"hold 3 placeholders .* 1 images give 4 features"):
        llava_forward(config, params, tokens, np.ones_like(tokens, bool), np.zeros((1, 28, 28, 3), np.float32))
