# SPDX-License-Identifier: Apache-2.0
"""LLaVA checkpoints: three layouts, full sizes against transformers on the meta device, round trips, errors."""

import json
import math

import numpy as np
import pytest

from worldenv_jax.reflector.llava import LlavaConfig
from worldenv_jax.weights import llava as tables
from worldenv_jax.weights.name_tables import Tensors, bind, check_names
from worldenv_jax.weights.safetensors_files import open_safetensors

VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 384,
    "vision_use_head": False,
}


def full_size_reference(name: str):
    """transformers' model of the published size, on the meta device, with its published names and shapes."""
    torch = pytest.importorskip("torch")
    import transformers as hf

    with torch.device("meta"):
        if name == "llava_1_5_7b":
            text = hf.LlamaConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5)
            return hf.LlavaForConditionalGeneration(hf.LlavaConfig(text_config=text))
        sizes = {"onevision_0_5b": (152000, 896, 4864, 24, 14, 2), "onevision_7b": (152128, 3584, 18944, 28, 28, 4)}
        fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        fields += ("num_attention_heads", "num_key_value_heads")
        text = dict(zip(fields, sizes[name])) | {"tie_word_embeddings": name == "onevision_0_5b"}
        config = hf.LlavaOnevisionConfig(
            vision_config=hf.SiglipVisionConfig(**VISION), text_config=hf.Qwen2Config(**text)
        )
        return hf.LlavaOnevisionForConditionalGeneration(config)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["llava_1_5_7b", "onevision_0_5b", "onevision_7b"])
def test_full_size_names_shapes_and_count(name):
    reference = full_size_reference(name)
    config = getattr(LlavaConfig, name)()
    abstract = tables.abstract_llava(config)
    theirs = {key: tuple(value.shape) for key, value in reference.named_parameters()}
    entries = bind(tables.llava_rows(config, "in_memory"), abstract)
    check_names({key: entry.shape for key, entry in entries.items()}, theirs, name)
    count = sum(math.prod(entry.shape) for entry in entries.values())
    assert count == sum(parameter.numel() for parameter in reference.parameters())
    assert count == {"llava_1_5_7b": 7_063_427_072, "onevision_0_5b": 893_675_552, "onevision_7b": 8_030_807_584}[name]
    for layout in ("published", "saved"):
        renamed = bind(tables.llava_rows(config, layout), abstract)
        assert [entry.shape for entry in renamed.values()] == [entry.shape for entry in entries.values()]
        assert tables.detect_layout(renamed) == layout


@pytest.fixture(scope="module")
def small(fixtures_dir):
    """(config, tensors in the published layout) of the fixture."""
    folder = fixtures_dir / "llava"
    config = tables.config_from_json(json.loads((folder / "config.json").read_text()))
    return config, open_safetensors(folder / "weights_published_layout.safetensors")


@pytest.mark.parametrize("layout", ["published", "saved", "in_memory"])
def test_export_gives_every_tensor_back(small, layout):
    config, tensors = small
    params = tables.import_llava(config, tensors, "fixture")
    exported = dict(tables.export_llava(config, params, layout))
    assert len(exported) == len(tensors.shapes)
    again = tables.import_llava(config, Tensors.from_arrays(exported), layout)
    for name, array in tables.export_llava(config, again, "published"):
        np.testing.assert_array_equal(array, tensors.read(name))


def test_saved_layout_is_what_transformers_writes(small, tmp_path):
    pytest.importorskip("torch")
    import transformers as hf

    config, tensors = small
    sizes = {"num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    vision = hf.CLIPVisionConfig(image_size=28, patch_size=14, **sizes)
    sizes |= {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    text = hf.LlamaConfig(vocab_size=96, **sizes)
    model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=95))
    model.save_pretrained(tmp_path)
    saved = open_safetensors(tmp_path)
    assert tables.detect_layout(saved.shapes) == "saved"
    entries = bind(tables.llava_rows(config, "saved"), tables.abstract_llava(config))
    check_names({name: entry.shape for name, entry in entries.items()}, saved.shapes, "save_pretrained")


def test_another_family_is_refused(small):
    with pytest.raises(ValueError, match="not a LLaVA checkpoint"):
        tables.detect_layout({"model.layers.0.self_attn.q_proj.weight": (4, 4)})
    raw = {"vision_config": {"model_type": "pixtral"}, "text_config": {"model_type": "mistral"}}
    with pytest.raises(ValueError, match=r"family \('pixtral', 'mistral'\), expected"):
        tables.config_from_json(raw)
    with pytest.raises(ValueError, match="missing     image_newline"):
        tables.import_llava(LlavaConfig.onevision_0_5b(), small[1], "a LLaVA-1.5 checkpoint")
    with pytest.raises(ValueError, match="layout 'hub' is not one of"):
        tables.llava_rows(small[0], "hub")
