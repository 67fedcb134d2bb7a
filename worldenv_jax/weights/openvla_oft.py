# SPDX-License-Identifier: Apache-2.0
"""Name tables of OpenVLA-OFT and RIPT-VLA checkpoints. Sources: moojink/openvla-oft, Ariostgx/ript-vla, PEFT.

Four groups of foreign tensors, each in files of its own: the model, the PEFT adapter, the heads and projectors.
Tensors that no forward pass reads (the last block and pooling of each tower, `lm_head`) are carried under the key
"unused" of our parameters, by their foreign names, so that an export is complete.
"""

import jax

from worldenv_jax.networks.vision_transformer import ViTConfig
from worldenv_jax.policy.config import PolicyConfig
from worldenv_jax.policy.functions import ADAPTED, init_policy
from worldenv_jax.types import Params
from worldenv_jax.weights.name_tables import LINEAR, Row, Transform, leading_ones, patch_kernel

TOWERS = {"dino": "vision_backbone.featurizer", "siglip": "vision_backbone.fused_featurizer"}
ADAPTER = "base_model.model."
LM_HEAD = "language_model.lm_head"
# PEFT's second factor of a patch convolution: (O, rank, 1, 1) <-> [rank, O].
POINTWISE = Transform(lambda x: x.reshape(x.shape[:2]).T, lambda x: x.T.reshape(*x.T.shape, 1, 1))


def model_rows(config: PolicyConfig) -> list[Row]:
    """The towers, the projector and the decoder, as in `model-*.safetensors`."""
    rows = [row for ours, theirs in TOWERS.items() for row in _tower_rows(getattr(config, ours), ours, theirs)]
    for number in (1, 2, 3):
        rows += _linear(f"projector.fc{number}", f"params/projector/fc{number}")
    layer, ours = "language_model.model.layers.{i}", "params/llama/layers"
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        rows.append(Row(f"{layer}.self_attn.{name}.weight", f"{ours}/{name}/kernel", LINEAR))
    for name in ("gate_proj", "up_proj", "down_proj"):
        rows.append(Row(f"{layer}.mlp.{name}.weight", f"{ours}/{name}/kernel", LINEAR))
    for name in ("input_layernorm", "post_attention_layernorm"):
        rows.append(Row(f"{layer}.{name}.weight", f"{ours}/{name}/scale"))
    rows.append(Row("language_model.model.embed_tokens.weight", "params/llama/embed_tokens"))
    rows.append(Row("language_model.model.norm.weight", "params/llama/norm/scale"))
    return rows + [Row(name, f"unused/{name}") for name in unused_tensors(config)]


def lora_rows(config: PolicyConfig) -> list[Row]:
    """The PEFT adapter: one pair per linear layer and patch convolution of the model."""
    rows = []
    for row in model_rows(config):
        if row.path.startswith("params/") and row.path.endswith("/kernel"):
            name = ADAPTER + row.name.removesuffix(".weight")
            path = "lora/" + row.path.removeprefix("params/").removesuffix("/kernel")
            second = LINEAR if row.transform is LINEAR else POINTWISE
            rows.append(Row(f"{name}.lora_A.weight", f"{path}/a", row.transform))
            rows.append(Row(f"{name}.lora_B.weight", f"{path}/b", second))
    return rows + [Row(name, f"unused/{name}") for name in unused_adapter_tensors(config)]


def head_rows(config: PolicyConfig) -> dict[str, list[Row]]:
    """The modules saved in files of their own, by the stem of the file's name."""
    prefix = "model." if config.head == "l1" else "noise_predictor.mlp_resnet."
    projector = lambda path: [row for fc in ("fc1", "fc2") for row in _linear(fc, f"params/{path}/{fc}")]
    tables = {"action_head": _resnet_rows(prefix, "params/action_head")}
    if config.use_proprio:
        tables["proprio_projector"] = projector("proprio_projector")
    if config.head == "diffusion":
        tables["noisy_action_projector"] = projector("noisy_action_projector")
    else:
        log_b_head = _linear("log_b_head", "params/scale_head/log_b_head")
        tables["scale_head"] = _resnet_rows("trunk.", "params/scale_head/trunk") + log_b_head
    return tables


def unused_tensors(config: PolicyConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's tensors that no forward pass reads."""
    shapes = {}
    for ours, theirs in TOWERS.items():
        shapes |= {f"{theirs}.{name}": shape for name, shape in _unused_of_tower(getattr(config, ours)).items()}
    return shapes | {f"{LM_HEAD}.weight": (config.llama.vocab_size, config.llama.width)}


def unused_adapter_tensors(config: PolicyConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapter's tensors that no forward pass reads."""
    shapes = {}
    for name, shape in unused_tensors(config).items():
        if len(shape) == 2:
            module = ADAPTER + name.removesuffix(".weight")
            shapes[f"{module}.lora_A.weight"] = (config.lora_rank, shape[1])
            shapes[f"{module}.lora_B.weight"] = (shape[0], config.lora_rank)
    # PEFT saves an adapted output layer in full.
    return shapes | {f"{ADAPTER}{LM_HEAD}.base_layer.weight": (config.llama.vocab_size, config.llama.width)}


def abstract_model(config: PolicyConfig) -> Params:
    """Shapes of {"params": towers, projector, decoder; "unused"}: the tree of `model_rows`."""
    params = _abstract(config)["params"]
    unused = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in unused_tensors(config).items()}
    return {"params": {name: params[name] for name in ADAPTED}, "unused": unused}


def abstract_policy(config: PolicyConfig) -> Params:
    """Shapes of {"params", "unused"}, the model and every head: what `openvla_folder` loads and saves."""
    policy = abstract_model(config)
    for name in head_rows(config):
        policy["params"] |= abstract_head(config, name)["params"]
    return policy


def abstract_adapter(config: PolicyConfig) -> Params:
    """Shapes of {"lora", "unused"}: the tree of `lora_rows`."""
    shapes = unused_adapter_tensors(config)
    return {
        "lora": _abstract(config)["lora"],
        "unused": {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()},
    }


def abstract_head(config: PolicyConfig, name: str) -> Params:
    """Shapes of one head or projector: the tree of `head_rows(config)[name]`."""
    return {"params": {name: _abstract(config)["params"][name]}}


def _abstract(config: PolicyConfig) -> Params:
    return jax.eval_shape(lambda key: init_policy(config, key), jax.random.key(0))


def _linear(name: str, path: str) -> list[Row]:
    return [Row(f"{name}.weight", f"{path}/kernel", LINEAR), Row(f"{name}.bias", f"{path}/bias")]


def _norm(name: str, path: str) -> list[Row]:
    return [Row(f"{name}.weight", f"{path}/scale"), Row(f"{name}.bias", f"{path}/bias")]


def _tower_rows(config: ViTConfig, ours: str, theirs: str) -> list[Row]:
    path, block, blocks = f"params/{ours}", f"{theirs}.blocks.{{i}}", f"params/{ours}/blocks"
    return [
        Row(f"{theirs}.cls_token", f"{path}/class_token", leading_ones(1)),
        Row(f"{theirs}.reg_token", f"{path}/register_tokens", leading_ones(1)),
        Row(f"{theirs}.pos_embed", f"{path}/position_embedding", leading_ones(1)),
        Row(f"{theirs}.patch_embed.proj.weight", f"{path}/patch_embed/kernel", patch_kernel(config.patch_size)),
        Row(f"{theirs}.patch_embed.proj.bias", f"{path}/patch_embed/bias"),
        *_norm(f"{block}.norm1", f"{blocks}/norm1"),
        *_linear(f"{block}.attn.qkv", f"{blocks}/qkv"),
        *_linear(f"{block}.attn.proj", f"{blocks}/proj"),
        Row(f"{block}.ls1.scale_factor", f"{blocks}/scale1"),
        *_norm(f"{block}.norm2", f"{blocks}/norm2"),
        *_linear(f"{block}.mlp.fc1", f"{blocks}/fc1"),
        *_linear(f"{block}.mlp.fc2", f"{blocks}/fc2"),
        Row(f"{block}.ls2.scale_factor", f"{blocks}/scale2"),
    ]


def _unused_of_tower(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """The blocks behind the one that is read, the final norm and, without a class token, the attention pooling."""
    width, hidden = config.width, config.mlp_width
    linear = lambda name, outputs, inputs: {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    norm = lambda name: {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    mlp = lambda name: linear(f"{name}.fc1", hidden, width) | linear(f"{name}.fc2", width, hidden)
    shapes = norm("norm")
    for block in (f"blocks.{i}" for i in range(config.depth, config.layers)):
        shapes |= norm(f"{block}.norm1") | norm(f"{block}.norm2") | mlp(f"{block}.mlp")
        shapes |= linear(f"{block}.attn.qkv", 3 * width, width) | linear(f"{block}.attn.proj", width, width)
        if config.layer_scale:
            shapes |= {f"{block}.ls1.scale_factor": (width,), f"{block}.ls2.scale_factor": (width,)}
    if not config.class_token:
        shapes |= {"attn_pool.latent": (1, 1, width)} | norm("attn_pool.norm") | mlp("attn_pool.mlp")
        shapes |= linear("attn_pool.q", width, width) | linear("attn_pool.kv", 2 * width, width)
        shapes |= linear("attn_pool.proj", width, width)
    return shapes


def _resnet_rows(prefix: str, path: str) -> list[Row]:
    return [
        *_norm(f"{prefix}layer_norm1", f"{path}/layer_norm1"),
        *_linear(f"{prefix}fc1", f"{path}/fc1"),
        *_norm(f"{prefix}mlp_resnet_blocks.{{i}}.ffn.0", f"{path}/block_{{i}}_norm"),
        *_linear(f"{prefix}mlp_resnet_blocks.{{i}}.ffn.1", f"{path}/block_{{i}}_fc"),
        *_norm(f"{prefix}layer_norm2", f"{path}/layer_norm2"),
        *_linear(f"{prefix}fc2", f"{path}/fc2"),
    ]
