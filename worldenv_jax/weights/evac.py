# SPDX-License-Identifier: Apache-2.0
"""EVAC checkpoints (state-dict names only) to and from the simulator's parameters.

Two layouts are published: Lightning, {"state_dict": {name: tensor}}, and DeepSpeed, where every name carries the
prefix `_forward_module.` and the tensors may lie under "module". Tensors that the forward pass never reads (the
attention weights that each spatial block does not use, CLIP's last norm, projections and text tables, the schedule's
buffers) have no parameter here; `load_evac` hands them back so that `export_evac` can write a complete file.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from worldenv_jax.simulator.config import SimulatorConfig
from worldenv_jax.simulator.video_unet import Stage, unet_layout
from worldenv_jax.simulator.world_simulator import init_simulator
from worldenv_jax.types import Params
from worldenv_jax.weights.name_tables import (
    CONV2D,
    IDENTITY,
    LINEAR,
    Row,
    Tensors,
    Transform,
    export_tensors,
    import_params,
    leading_ones,
    patch_kernel,
)

DEEPSPEED_PREFIX = "_forward_module."
POINTWISE = Transform(  # 1x1 (or length 1) convolution as a linear layer
    lambda x: x.reshape(x.shape[:2]).T, lambda x: x.T[..., None, None]
)
POINTWISE_1D = Transform(lambda x: x[..., 0].T, lambda x: x.T[..., None])
TEMPORAL = Transform(  # (O, I, 3, 1, 1) <-> [3, I, O]
    lambda x: x[..., 0, 0].transpose(2, 1, 0), lambda x: x.transpose(2, 1, 0)[..., None, None]
)
CLASS_TOKEN = Transform(lambda x: x[None], lambda x: x[0])
BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "scale_arr",
)  # fmt: skip
CLIP_LEFTOVERS = ("ln_final", "logit_scale", "positional_embedding", "text_projection", "token_embedding")
UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "embedder.model."


def flatten_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of either layout (as `torch.load` returns it, or already flat) under their plain names.

    Raises ValueError where names have another prefix, or none of the model's parts is there.
    """
    for wrapper in ("state_dict", "module"):
        if wrapper in checkpoint:
            checkpoint = checkpoint[wrapper]
    if all(name.startswith(DEEPSPEED_PREFIX) for name in checkpoint):
        checkpoint = {name[len(DEEPSPEED_PREFIX) :]: tensor for name, tensor in checkpoint.items()}
    if not any(name.startswith(UNET) for name in checkpoint):
        found = sorted({name.split(".")[0] for name in checkpoint})
        raise ValueError(f"EVAC checkpoint: found top-level names {found}, expected {UNET}* among them")
    return dict(checkpoint)


def load_evac(config: SimulatorConfig, tensors: Mapping[str, np.ndarray]) -> tuple[Params, dict[str, np.ndarray]]:
    """A flat checkpoint to parameters.

    Args:
        config: of the model in the checkpoint.
        tensors: name to array, from `flatten_checkpoint`. Where CLIP is missing, pass {**tensors, **open_clip} with
            the tower's names prefixed by `embedder.model.`.

    Returns: parameters as from `init_simulator`, and the tensors that no parameter corresponds to.

    Raises: ValueError listing every name and shape that does not fit.
    """
    unused = {name: tensor for name, tensor in tensors.items() if is_unused(config, name)}
    used = Tensors.from_arrays({name: tensor for name, tensor in tensors.items() if name not in unused})
    abstract = jax.eval_shape(lambda key: init_simulator(config, key), jax.random.key(0))
    return import_params(evac_rows(config), abstract, used, "EVAC checkpoint"), unused


def export_evac(
    config: SimulatorConfig, params: Params, unused: Mapping[str, np.ndarray], layout: str = "lightning"
) -> dict[str, Any]:
    """Parameters and unused tensors to the object that `torch.save` would take, arrays in NumPy.

    Args:
        layout: "lightning" or "deepspeed".
    """
    if layout not in ("lightning", "deepspeed"):
        raise ValueError(f"EVAC checkpoint: layout {layout!r} is neither 'lightning' nor 'deepspeed'")
    tensors = {**dict(export_tensors(evac_rows(config), params)), **unused}
    if layout == "lightning":
        return {"state_dict": tensors}
    return {"module": {DEEPSPEED_PREFIX + name: tensor for name, tensor in tensors.items()}}


def is_unused(config: SimulatorConfig, name: str) -> bool:
    """Whether a checkpoint's tensor has no parameter here because nothing reads it."""
    if name in BUFFERS:
        return True
    if name.startswith(CLIP):
        tail = name[len(CLIP) :]
        return tail.split(".")[0] in CLIP_LEFTOVERS or tail.startswith(("visual.ln_post.", "visual.proj"))
    for stage, prefix in _named_stages(config):
        attention = f"{prefix}1.transformer_blocks.0.attn2."
        if stage.spatial is not None and name.startswith(attention):
            return name[len(attention) :].split(".")[0] in {"to_k", "to_v"} | {
                f"to_{x}_{_other_source(stage)}" for x in "kv"
            }
    return False


def evac_rows(config: SimulatorConfig) -> list[Row]:
    """The name table of every tensor that has a parameter."""
    rows = _unet_rows(config) + _autoencoder_rows(config) + _clip_rows(config)
    rows += _resampler_rows("cond_stage_model.", "denoiser/action_resampler/")
    return rows + _resampler_rows("image_proj_model.", "denoiser/image_resampler/")


def _linear(name: str, path: str, kernel: Transform = LINEAR) -> list[Row]:
    """Weight and bias of a layer; a bias that the model lacks matches nothing."""
    return [Row(f"{name}.weight", f"{path}/kernel", kernel), Row(f"{name}.bias", f"{path}/bias")]


def _norm(name: str, path: str) -> list[Row]:
    return [Row(f"{name}.weight", f"{path}/scale"), Row(f"{name}.bias", f"{path}/bias")]


def _source(stage: Stage) -> str:
    """Which context a spatial block reads: "ip" image tokens, "tp" action (trajectory) tokens."""
    return "ip" if stage.spatial % 2 else "tp"


def _other_source(stage: Stage) -> str:
    return "tp" if stage.spatial % 2 else "ip"


def _named_stages(config: SimulatorConfig) -> list[tuple[Stage, str]]:
    """Every stage with the checkpoint's prefix for it."""
    layout = unet_layout(config.unet)
    numbered = lambda stage, kind: f"{UNET}{kind}_blocks.{stage.name[len(kind) :]}."
    stages = [(stage, numbered(stage, "input")) for stage in layout.down]
    stages += [(layout.middle, f"{UNET}middle_block.")]
    return stages + [(stage, numbered(stage, "output")) for stage in layout.up]


def _unet_rows(config: SimulatorConfig) -> list[Row]:
    root = "denoiser/unet/"
    rows = [Row(f"{UNET}domain_embedding.weight", f"{root}domain_embedding/embedding")]
    for theirs, ours in (("time_embed", "time_embedding"), ("fps_embedding", "rate_embedding")):
        rows += _linear(f"{UNET}{theirs}.0", f"{root}{ours}/fc1") + _linear(f"{UNET}{theirs}.2", f"{root}{ours}/fc2")
    stem = f"{UNET}input_blocks.0.0."
    rows += [Row(f"{stem}weight", f"{root}stem_kernel", CONV2D), Row(f"{stem}bias", f"{root}stem_bias")]
    rows += _transformer_rows(f"{UNET}init_attn.0.", f"{root}init_attention/", projection=POINTWISE_1D)
    for stage, prefix in _named_stages(config):
        path = f"{root}{stage.name}/"
        if stage.kind == "down":
            rows += _linear(f"{prefix}0.op", f"{root}{stage.name}", CONV2D)
            continue
        rows += _res_rows(f"{prefix}0.", f"{path}res/")
        if stage.spatial is not None:
            rows += _transformer_rows(f"{prefix}1.", f"{path}spatial/", suffix=f"_{_source(stage)}")
            rows += _transformer_rows(f"{prefix}2.", f"{path}temporal/")
        if stage.name == "middle":
            rows += _res_rows(f"{prefix}3.", f"{path}res2/")
        if stage.up:
            position = 1 if stage.spatial is None else 3
            rows += _linear(f"{prefix}{position}.conv", f"{path}up", CONV2D)
    return rows + _norm(f"{UNET}out.0", f"{root}norm_out") + _linear(f"{UNET}out.2", f"{root}conv_out", CONV2D)


def _res_rows(name: str, path: str) -> list[Row]:
    rows = _norm(f"{name}in_layers.0", f"{path}norm1") + _linear(f"{name}in_layers.2", f"{path}conv1", CONV2D)
    rows += _linear(f"{name}emb_layers.1", f"{path}embedding")
    rows += _norm(f"{name}out_layers.0", f"{path}norm2") + _linear(f"{name}out_layers.3", f"{path}conv2", CONV2D)
    rows += _linear(f"{name}skip_connection", f"{path}skip", POINTWISE)
    for i in range(1, 5):
        temporal = f"{name}temopral_conv.conv{i}"  # spelled so in the checkpoint
        rows += _norm(f"{temporal}.0", f"{path}temporal_norm{i}")
        rows += _linear(f"{temporal}.{2 if i == 1 else 3}", f"{path}temporal_conv{i}", TEMPORAL)
    return rows


def _transformer_rows(name: str, path: str, suffix: str = "", projection: Transform = LINEAR) -> list[Row]:
    """A spatial or temporal transformer; `suffix` names the keys and values that the second attention reads."""
    rows = _norm(f"{name}norm", f"{path}norm")
    rows += _linear(f"{name}proj_in", f"{path}proj_in", projection)
    rows += _linear(f"{name}proj_out", f"{path}proj_out", projection)
    name, path = f"{name}transformer_blocks.0.", f"{path}block/"
    for i in (1, 2):
        theirs, ours, end = f"{name}attn{i}.", f"{path}attention{i}/", suffix if i == 2 else ""
        rows += _linear(f"{theirs}to_q", f"{ours}to_q") + _linear(f"{theirs}to_out.0", f"{ours}to_out")
        rows += _linear(f"{theirs}to_k{end}", f"{ours}to_k") + _linear(f"{theirs}to_v{end}", f"{ours}to_v")
    for i in (1, 2, 3):
        rows += _norm(f"{name}norm{i}", f"{path}norm{i}")
    return rows + _linear(f"{name}ff.net.0.proj", f"{path}fc1") + _linear(f"{name}ff.net.2", f"{path}fc2")


def _autoencoder_rows(config: SimulatorConfig) -> list[Row]:
    rows, root = [], "autoencoder/"
    rows += _linear(f"{VAE}quant_conv", f"{root}quant", POINTWISE)
    rows += _linear(f"{VAE}post_quant_conv", f"{root}post_quant", POINTWISE)
    for half, group, sampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        theirs, ours = f"{VAE}{half}.", f"{root}{half}/"
        rows += _linear(f"{theirs}conv_in", f"{ours}conv_in", CONV2D)
        rows += _linear(f"{theirs}conv_out", f"{ours}conv_out", CONV2D)
        rows += _norm(f"{theirs}norm_out", f"{ours}norm_out")
        for i in (1, 2):
            rows += _plain_res_rows(f"{theirs}mid.block_{i}.", f"{ours}middle/block{i}/")
        rows += _norm(f"{theirs}mid.attn_1.norm", f"{ours}middle/attention/norm")
        for layer in ("q", "k", "v", "proj_out"):
            rows += _linear(f"{theirs}mid.attn_1.{layer}", f"{ours}middle/attention/{layer}", POINTWISE)
        for level in range(len(config.autoencoder.multipliers)):
            for i in range(config.autoencoder.res_blocks + (half == "decoder")):
                block = f"{theirs}{group}.{level}.block.{i}."
                rows += _plain_res_rows(block, f"{ours}level{level}_block{i}/")
            rows += _linear(f"{theirs}{group}.{level}.{sampler}.conv", f"{ours}level{level}_{group}", CONV2D)
    return rows


def _plain_res_rows(name: str, path: str) -> list[Row]:
    rows = _norm(f"{name}norm1", f"{path}norm1") + _linear(f"{name}conv1", f"{path}conv1", CONV2D)
    rows += _norm(f"{name}norm2", f"{path}norm2") + _linear(f"{name}conv2", f"{path}conv2", CONV2D)
    return rows + _linear(f"{name}nin_shortcut", f"{path}skip", POINTWISE)


def _resampler_rows(name: str, path: str) -> list[Row]:
    rows = [Row(f"{name}latents", f"{path}queries", leading_ones(1))]
    rows += _linear(f"{name}proj_in", f"{path}proj_in") + _linear(f"{name}proj_out", f"{path}proj_out")
    attention, mlp, ours = f"{name}layers.{{i}}.0.", f"{name}layers.{{i}}.1.", f"{path}layers/"
    rows += _norm(f"{attention}norm1", f"{ours}norm_tokens") + _norm(f"{attention}norm2", f"{ours}norm_latents")
    for layer in ("to_q", "to_kv", "to_out"):
        rows += _linear(f"{attention}{layer}", f"{ours}{layer}")
    rows += _norm(f"{mlp}0", f"{ours}norm_mlp") + _linear(f"{mlp}1", f"{ours}fc1") + _linear(f"{mlp}3", f"{ours}fc2")
    return rows + _norm(f"{name}norm_out", f"{path}norm_out")


def _clip_rows(config: SimulatorConfig) -> list[Row]:
    name, path = f"{CLIP}visual.", "image_encoder/"
    rows = [
        Row(f"{name}class_embedding", f"{path}class_token", CLASS_TOKEN),
        Row(f"{name}positional_embedding", f"{path}position_embedding"),
        Row(f"{name}conv1.weight", f"{path}patch_embed/kernel", patch_kernel(config.image_encoder.patch_size)),
    ]
    rows += _norm(f"{name}ln_pre", f"{path}norm_pre")
    name, path = f"{name}transformer.resblocks.{{i}}.", f"{path}blocks/"
    rows += [
        Row(f"{name}attn.in_proj_weight", f"{path}qkv/kernel", LINEAR),
        Row(f"{name}attn.in_proj_bias", f"{path}qkv/bias", IDENTITY),
    ]
    rows += _linear(f"{name}attn.out_proj", f"{path}proj")
    rows += _norm(f"{name}ln_1", f"{path}norm1") + _norm(f"{name}ln_2", f"{path}norm2")
    return rows + _linear(f"{name}mlp.c_fc", f"{path}fc1") + _linear(f"{name}mlp.c_proj", f"{path}fc2")
