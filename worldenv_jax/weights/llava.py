# SPDX-License-Identifier: Apache-2.0
"""Name tables of LLaVA-1.5 and LLaVA-OneVision checkpoints, in three layouts. Source: transformers 5.

"published": the files on the model hub. "saved": what `save_pretrained` of transformers 5 writes. "in_memory": its
`state_dict()`. Tensors that no forward pass reads (blocks behind the one that is read, the tower's last norm) are
carried under the key "unused" of our parameters, by their published names, so that an export is complete.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.networks.llama import LlamaConfig
from worldenv_jax.networks.vision_transformer import ViTConfig
from worldenv_jax.reflector.llava import Llava, LlavaConfig
from worldenv_jax.types import Params
from worldenv_jax.weights.name_tables import (
    LINEAR,
    Row,
    Tensors,
    Transform,
    export_tensors,
    import_params,
    patch_kernel,
)

TOWER, LANGUAGE, LM_HEAD = "vision_tower.vision_model.", "language_model.model.", "language_model.lm_head."
PROJECTOR, NEWLINE = "multi_modal_projector.", "image_newline"
ROW_VECTOR = Transform(lambda x: x[None], lambda x: x.reshape(x.shape[1:]))  # (D,) <-> [1, D]
# What the prefixes of the published layout are called in the others.
LAYOUTS = {
    "published": {},
    "saved": {TOWER: "vision_tower."},
    "in_memory": {
        TOWER: "model.vision_tower.",
        LANGUAGE: "model.language_model.",
        LM_HEAD: "lm_head.",
        PROJECTOR: "model.multi_modal_projector.",
        NEWLINE: "model.image_newline",
    },
}


def llava_rows(config: LlavaConfig, layout: str = "published") -> list[Row]:
    """The table for the tree of `abstract_llava`. Raises ValueError on an unknown layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not one of {sorted(LAYOUTS)}")
    rows = _tower_rows(config.vision) + _language_rows()
    for name in ("linear_1", "linear_2"):
        rows += _linear(f"{PROJECTOR}{name}", f"params/projector/{name}")
    rows.append(Row(NEWLINE, "params/image_newline"))
    rows += [Row(name, f"unused/{name}") for name in unused_tensors(config)]
    return [row._replace(name=_renamed(row.name, layout)) for row in rows]


def unused_tensors(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of the tower's tensors that no forward pass reads."""
    vision = config.vision
    width, hidden = vision.width, vision.mlp_width
    linear = lambda name, outputs, inputs: {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    norm = lambda name: {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    shapes = {} if vision.final_norm else norm(f"{TOWER}post_layernorm")
    for block in (f"{TOWER}encoder.layers.{i}" for i in range(vision.depth, vision.layers)):
        shapes |= norm(f"{block}.layer_norm1") | norm(f"{block}.layer_norm2")
        shapes |= linear(f"{block}.mlp.fc1", hidden, width) | linear(f"{block}.mlp.fc2", width, hidden)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{block}.self_attn.{name}", width, width)
    return shapes


def abstract_llava(config: LlavaConfig) -> Params:
    """Shapes of {"params": of `reflector.llava.Llava`, "unused"}."""
    size = config.vision.image_size
    tokens, mask = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), bool)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    initialise = lambda key, *inputs: Llava(config).init(key, *inputs, video=False)
    params = jax.eval_shape(initialise, jax.random.key(0), tokens, mask, images)["params"]
    unused = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in unused_tensors(config).items()}
    return {"params": params, "unused": unused}


def detect_layout(names: Iterable[str]) -> str:
    """The layout of a checkpoint. Raises ValueError where the names belong to none of the three."""
    names = set(names)
    for layout, prefixes in LAYOUTS.items():
        tower, language = prefixes.get(TOWER, TOWER), prefixes.get(LANGUAGE, LANGUAGE)
        if {f"{tower}embeddings.position_embedding.weight", f"{language}norm.weight"} <= names:
            return layout
    raise ValueError(
        f"not a LLaVA checkpoint: expected names like {TOWER}embeddings.position_embedding.weight and "
        f"{LANGUAGE}norm.weight, got {sorted(names)[:3]} ..."
    )


def import_llava(
    config: LlavaConfig, tensors: Tensors, source: str, shardings: Params | None = None, dtype: str | None = None
) -> Params:
    """Reads a checkpoint in any layout; arguments as in `import_params`.

    Returns: {"params", "unused"}; a reflector takes "params" as its params["params"]["llava"].

    Raises: ValueError listing every name and shape that does not fit the config.
    """
    layout = detect_layout(tensors.shapes)
    if config.language.tie_embeddings:  # a state_dict lists the tied head a second time
        tied = _renamed(f"{LM_HEAD}weight", layout)
        tensors = tensors._replace(shapes={name: shape for name, shape in tensors.shapes.items() if name != tied})
    return import_params(llava_rows(config, layout), abstract_llava(config), tensors, source, shardings, dtype)


def export_llava(config: LlavaConfig, params: Params, layout: str = "published") -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, array) of a whole checkpoint; params as from `import_llava`."""
    return export_tensors(llava_rows(config, layout), params)


def config_from_json(raw: dict, preprocessor: dict | None = None) -> LlavaConfig:
    """The config of a checkpoint.

    Args:
        raw: its `config.json`; keys that it leaves out have transformers' defaults.
        preprocessor: its `preprocessor_config.json`, for the mean and standard deviation of the pixels.

    Raises: ValueError where the tower or the language model is of another family.
    """
    vision, text = raw["vision_config"], raw["text_config"]
    families = (vision["model_type"], text["model_type"])
    if families not in _DEFAULTS:
        raise ValueError(
            f"config.json is of family {families}, expected ('clip_vision_model', 'llama') for LLaVA-1.5 or "
            "('siglip_vision_model', 'qwen2') for LLaVA-OneVision"
        )
    vision, text = _DEFAULTS[families][0] | vision, _DEFAULTS[families][1] | text
    onevision = text["model_type"] == "qwen2"
    base = LlavaConfig.onevision_0_5b() if onevision else LlavaConfig.llava_1_5_7b()
    tower = _tower_config(vision, base.vision, raw.get("vision_feature_layer", base.vision.output_layer))
    pixels = preprocessor or {"image_mean": base.pixel_mean, "image_std": base.pixel_std}
    return replace(
        base,
        vision=tower,
        language=_language_config(text, raw),
        image_token=raw.get("image_token_index", raw.get("image_token_id")),
        frame_grid=-(-tower.grid // 2) if onevision else tower.grid,
        pixel_mean=tuple(pixels["image_mean"]),
        pixel_std=tuple(pixels["image_std"]),
    )


def _tower_config(vision: dict, base: ViTConfig, output_layer: int) -> ViTConfig:
    return replace(
        base,
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        width=vision["hidden_size"],
        layers=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        mlp_width=vision["intermediate_size"],
        activation=_ACTIVATIONS[vision["hidden_act"]],
        norm_eps=vision["layer_norm_eps"],
        output_layer=output_layer,
        dtype="float32",
    )


def _language_config(text: dict, raw: dict) -> LlamaConfig:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"config.json scales rotary positions ({rope['rope_type']!r}), expected 'default'")
    return LlamaConfig(
        vocab_size=text["vocab_size"],
        width=text["hidden_size"],
        mlp_width=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
        max_positions=text["max_position_embeddings"],
        rope_theta=rope.get("rope_theta", text.get("rope_theta", 1e4)),
        rms_eps=text["rms_norm_eps"],
        qkv_bias=text["model_type"] == "qwen2",
        tie_embeddings=raw.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False),
    )


_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP = {**_VISION, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP = {**_VISION, "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_TEXT = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6}
_LLAMA = {**_TEXT, "vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048}
_QWEN2 = {**_TEXT, "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
# transformers' defaults of the keys that a config.json may leave out.
_DEFAULTS = {
    ("clip_vision_model", "llama"): (_CLIP, _LLAMA),
    ("siglip_vision_model", "qwen2"): (_SIGLIP, _QWEN2 | {"num_key_value_heads": 32}),
}


def _renamed(name: str, layout: str) -> str:
    for published, prefix in LAYOUTS[layout].items():
        if name.startswith(published):
            return prefix + name.removeprefix(published)
    return name


def _linear(name: str, path: str) -> list[Row]:
    return [Row(f"{name}.weight", f"{path}/kernel", LINEAR), Row(f"{name}.bias", f"{path}/bias")]


def _norm(name: str, path: str) -> list[Row]:
    return [Row(f"{name}.weight", f"{path}/scale"), Row(f"{name}.bias", f"{path}/bias")]


def _tower_rows(config: ViTConfig) -> list[Row]:
    path, block = "params/vision_tower", f"{TOWER}encoder.layers.{{i}}"
    blocks = f"{path}/blocks"
    rows = [
        Row(f"{TOWER}embeddings.class_embedding", f"{path}/class_token", ROW_VECTOR),
        Row(f"{TOWER}embeddings.patch_embedding.weight", f"{path}/patch_embed/kernel", patch_kernel(config.patch_size)),
        Row(f"{TOWER}embeddings.patch_embedding.bias", f"{path}/patch_embed/bias"),
        Row(f"{TOWER}embeddings.position_embedding.weight", f"{path}/position_embedding"),
        *_norm(f"{TOWER}pre_layrnorm", f"{path}/norm_pre"),  # transformers' spelling
        *_norm(f"{TOWER}post_layernorm", f"{path}/norm"),
        *_norm(f"{block}.layer_norm1", f"{blocks}/norm1"),
        *_norm(f"{block}.layer_norm2", f"{blocks}/norm2"),
        *_linear(f"{block}.self_attn.out_proj", f"{blocks}/proj"),
        *_linear(f"{block}.mlp.fc1", f"{blocks}/fc1"),
        *_linear(f"{block}.mlp.fc2", f"{blocks}/fc2"),
    ]
    for third, name in enumerate(("q_proj", "k_proj", "v_proj")):
        fused = _linear(f"{block}.self_attn.{name}", f"{blocks}/qkv")
        rows += [row._replace(part=(third, 3)) for row in fused]
    return rows


def _language_rows() -> list[Row]:
    path, layer, layers = "params/language_model", f"{LANGUAGE}layers.{{i}}", "params/language_model/layers"
    rows = [
        Row(f"{LANGUAGE}embed_tokens.weight", f"{path}/embed_tokens"),
        Row(f"{LANGUAGE}norm.weight", f"{path}/norm/scale"),
        Row(f"{LM_HEAD}weight", f"{path}/lm_head/kernel", LINEAR),
        Row(f"{layer}.input_layernorm.weight", f"{layers}/input_layernorm/scale"),
        Row(f"{layer}.post_attention_layernorm.weight", f"{layers}/post_attention_layernorm/scale"),
    ]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        rows += _linear(f"{layer}.self_attn.{name}", f"{layers}/{name}")
    for name in ("gate_proj", "up_proj", "down_proj"):
        rows += _linear(f"{layer}.mlp.{name}", f"{layers}/{name}")
    return rows
