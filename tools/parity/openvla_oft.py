# SPDX-License-Identifier: Apache-2.0
"""The policy against OpenVLA-OFT and RIPT-VLA: features, hidden states, heads, log-probabilities, LoRA, diffusion."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from tools.parity import Result, compare, load_npz, unknown
from worldenv_jax.networks.llama import LlamaConfig
from worldenv_jax.networks.vision_transformer import ViTConfig
from worldenv_jax.policy import PolicyConfig, laplace_log_prob, merge_adapters
from worldenv_jax.policy import diffusion as schedule
from worldenv_jax.policy.functions import apply_policy, ddim_trajectory
from worldenv_jax.policy.laplace import clip_log_scale
from worldenv_jax.policy.model import Hidden, Inputs, Policy
from worldenv_jax.types import ACTION_DIM, PROPRIO_DIM, Params, Statistics, Text
from worldenv_jax.weights import openvla_oft as tables
from worldenv_jax.weights.name_tables import export_tensors, import_params
from worldenv_jax.weights.safetensors_files import open_safetensors

HIDDEN, PROJECTED, LOSS, EXACT = 3e-5, 5e-6, 1e-6, 1e-6
_BOUNDS = ("q01", "q99", "min", "max")
LOG_PROB, LOG_PROB_UNCLIPPED, DIFFUSION = 2e-4, 1e-3, 3e-4


def check(fixture: Path) -> Iterator[Result]:
    """Yields one result per reference array of the folder, and one per merged LoRA tensor."""
    config = json.loads((fixture / "config.json").read_text())
    inputs, outputs = load_npz(fixture / "inputs.npz"), load_npz(fixture / "outputs.npz")
    checks = Checks(fixture, config, inputs)
    for name, reference in outputs.items():
        quantity = checks.quantities().get(name)
        yield unknown(name) if quantity is None else quantity(reference)
    if (fixture / "lora_merged_expected.safetensors").is_file():
        yield from checks.merged_lora()
    if (fixture / "normalisation.npz").is_file():
        yield from _normalisation(load_npz(fixture / "normalisation.npz"))


class Checks:
    """One fixture folder: its configuration, its weights, and how each quantity is computed here."""

    def __init__(self, fixture: Path, config: dict, inputs: dict[str, np.ndarray]):
        self.fixture, self.raw, self.inputs = fixture, config, inputs
        self.config = policy_config(config)
        self.statistics = _statistics(config["norm_stats"][config["norm_stats_key"]])

    def quantities(self) -> dict[str, Callable[[np.ndarray], Result]]:
        """Name of a reference array -> comparison with it."""
        tolerances = {
            "patches_dino": HIDDEN,
            "patches_siglip": HIDDEN,
            "projected_patches": PROJECTED,
            "oft_action_hidden": HIDDEN,
            "oft_actions_normalised": HIDDEN,
            "train_action_hidden": HIDDEN,
            "train_actions_normalised": HIDDEN,
            "train_l1_loss": LOSS,
            "train_l1_loss_first_step": LOSS,
            "train_l1_loss_next_steps": LOSS,
            "ript_mean": HIDDEN,
            "ript_log_b": HIDDEN,
            "ript_log_prob": LOG_PROB,
            "ript_log_prob_unclipped": LOG_PROB_UNCLIPPED,
            "ript_log_prob_per_step": LOG_PROB,
            "ript_vs_oft_mean_diff": 2 * HIDDEN,
            "lora_action_hidden": HIDDEN,
            "lora_actions_normalised": HIDDEN,
            "diffusion_timesteps": 0.0,
            "diffusion_alphas_cumprod": EXACT,
            "diffusion_eps": DIFFUSION,
            "diffusion_x": DIFFUSION,
            "diffusion_actions_normalised": DIFFUSION,
            "diffusion_train_noisy": EXACT,
            "diffusion_time_embedding": EXACT,
        }
        compared = {
            name: lambda reference, name=name, tolerance=tolerance: compare(
                name, _reshaped(self.value(name), reference), reference, tolerance
            )
            for name, tolerance in tolerances.items()
        }
        environment = {
            "oft_actions": ("oft_actions_normalised", HIDDEN),
            "unnorm_out": ("unnorm_in", EXACT),
            "ript_actions_unnormalised": ("ript_mean", HIDDEN),
            "diffusion_actions": ("diffusion_actions_normalised", DIFFUSION),
        }
        compared |= {
            name: lambda reference, name=name, source=source, tolerance=tolerance: compare(
                name, _reshaped(self._unnormalised(source), reference), _to_environment(reference), tolerance
            )
            for name, (source, tolerance) in environment.items()
        }
        compared["oft_last_hidden"] = lambda reference: self._last_hidden("oft", reference)
        compared["train_last_hidden"] = lambda reference: self._last_hidden("train", reference)
        return compared

    def value(self, name: str):
        """Our value of a quantity, up to its shape."""
        group = "vision" if "patches" in name else name.split("_", 1)[0]
        return getattr(self, group)[name]

    @functools.cached_property
    def params(self) -> Params:
        """The model, the heads and the projector of proprioception that the folder holds."""
        weights = open_safetensors(self.fixture / "weights.safetensors")
        model = import_params(
            tables.model_rows(self.config), tables.abstract_model(self.config), weights, "weights.safetensors"
        )
        for name in tables.head_rows(self.config):
            if (self.fixture / f"{name}.safetensors").is_file():
                model["params"] |= self._head(self.config, name, f"{name}.safetensors")
        return model

    @functools.cached_property
    def vision(self) -> dict:
        """Features of the first input's images."""
        inputs = self._inputs("", "input_ids")
        features = apply_policy(self.config, self.params, inputs, method=Policy.vision_features)
        projected = apply_policy(self.config, self.params, inputs, method=Policy.encode).embeddings
        names = ("patches_dino", "patches_siglip")
        return dict(zip(names, features)) | {"projected_patches": projected[:, 1 : 1 + features[0].shape[1]]}

    @functools.cached_property
    def oft(self) -> dict:
        """The evaluation pass."""
        return self._forward("oft", self.config, self.params, self._inputs("", "input_ids"))

    @functools.cached_property
    def train(self) -> dict:
        """The padded training batch: prompts of different lengths."""
        values = self._forward("train", self.config, self.params, self._inputs("batch_", "batch_input_ids"))
        error = np.abs(np.asarray(values["train_actions_normalised"]) - self.inputs["batch_actions"])
        values["train_l1_loss"] = error.mean()
        values["train_l1_loss_first_step"] = error[:, 0].mean()
        values["train_l1_loss_next_steps"] = error[:, 1:].mean()
        return values

    @functools.cached_property
    def ript(self) -> dict:
        """Mean, scale and density under the prefix mask."""
        inputs, actions = self._inputs("ript_", "ript_input_ids"), self.inputs["ript_actions"]
        prefix = dataclasses.replace(self.config, attention="prefix")
        mean, log_b = apply_policy(prefix, self.params, inputs)
        clipped = clip_log_scale(log_b, *self.config.log_scale_range)
        log_prob = laplace_log_prob(actions, mean, clipped)
        bidirectional, _ = apply_policy(self.config, self.params, inputs)
        return {
            "ript_mean": mean,
            "ript_log_b": log_b,
            "ript_log_prob": log_prob,
            "ript_log_prob_per_step": log_prob.sum(-1),
            "ript_log_prob_unclipped": laplace_log_prob(actions, mean, log_b),
            # On the first row, which repeats the input of the evaluation pass.
            "ript_vs_oft_mean_diff": jnp.abs(mean - bidirectional)[0].max(),
        }

    @functools.cached_property
    def adapted(self) -> tuple[PolicyConfig, Params]:
        """The model with the folder's adapter beside it."""
        lora = self.raw["lora"]
        config = dataclasses.replace(self.config, lora_rank=lora["r"], lora_alpha=lora["alpha"])
        weights = open_safetensors(self.fixture / "lora_adapter.safetensors")
        adapter = import_params(
            tables.lora_rows(config), tables.abstract_adapter(config), weights, "lora_adapter.safetensors"
        )
        return config, {**self.params, "lora": adapter["lora"]}

    @functools.cached_property
    def lora(self) -> dict:
        """The evaluation pass with the adapter applied beside the kernels."""
        return self._forward("lora", *self.adapted, self._inputs("", "input_ids"))

    def merged_lora(self) -> Iterator[Result]:
        """The adapter added to the kernels."""
        config, params = self.adapted
        merged = merge_adapters(config, params)
        merged = {"params": {name: merged["params"][name] for name in tables.ADAPTED}, "unused": params["unused"]}
        ours = dict(export_tensors(tables.model_rows(config), merged))
        expected = open_safetensors(self.fixture / "lora_merged_expected.safetensors")
        for name in expected.shapes:
            yield compare(f"merged {name}", ours[name], expected.read(name), EXACT)

    @functools.cached_property
    def diffusion(self) -> dict:
        """Schedule, forward process and all DDIM steps from the given noise."""
        config = dataclasses.replace(self.config, head="diffusion", diffusion_steps=_steps(self.raw["diffusion"]))
        steps, width = config.diffusion_steps, config.llama.width
        params = {"params": {name: self.params["params"][name] for name in tables.ADAPTED}}
        if config.use_proprio:
            params["params"]["proprio_projector"] = self.params["params"]["proprio_projector"]
        params["params"] |= self._head(config, "action_head", "diffusion_action_head.safetensors")
        params["params"] |= self._head(config, "noisy_action_projector", "noisy_action_projector.safetensors")
        noise = jnp.asarray(self.inputs["diffusion_start_noise"])
        epsilon, x = ddim_trajectory(config, params, self._inputs("", "input_ids"), noise)
        values = {
            "diffusion_timesteps": np.arange(steps)[::-1],
            "diffusion_alphas_cumprod": schedule.alphas_cumprod(steps),
            "diffusion_eps": epsilon,
            "diffusion_x": x,
            "diffusion_actions_normalised": x[-1],
        }
        train = {name: array for name, array in self.inputs.items() if name.startswith("diffusion_train_")}
        if train:
            timestep = _only(train, "time").reshape(-1)
            actions, noise = _only(train, "action"), _only(train, "noise")
            values["diffusion_train_noisy"] = schedule.add_noise(actions, noise, timestep, steps)
            values["diffusion_time_embedding"] = schedule.timestep_embedding(timestep, width)
        return values

    def _forward(self, group: str, config: PolicyConfig, params: Params, inputs: Inputs) -> dict:
        hidden = apply_policy(config, params, inputs, method=_hidden)
        states = apply_policy(config, params, hidden, method=Policy.action_hidden)
        values = {f"{group}_hidden": hidden, f"{group}_action_hidden": states}
        if "action_head" in params["params"]:
            actions = apply_policy(config, params, states, method=lambda model, x: model.action_head(x))
            values[f"{group}_actions_normalised"] = actions
        return values

    def _last_hidden(self, group: str, reference: np.ndarray) -> Result:
        """Hidden states in the reference's order; what the reference has on padding is left out."""
        hidden: Hidden = getattr(self, group)[f"{group}_hidden"]
        rows, columns = np.nonzero(np.asarray(hidden.valid))
        ours = np.asarray(hidden.states)[rows, columns]
        places = np.asarray(hidden.positions)[rows, columns]
        return compare(f"{group}_last_hidden", ours, reference[rows, places], HIDDEN)

    def _unnormalised(self, source: str):
        actions = self.inputs[source] if source in self.inputs else self.value(source)
        return self.statistics.unnormalize_action(jnp.asarray(actions))

    def _inputs(self, prefix: str, ids: str) -> Inputs:
        """The model's inputs; a training batch also holds action tokens and </s>, which the model adds itself."""
        pixels = self.inputs[f"{prefix}pixel_values"]
        batch, size = len(pixels), self.config.image_size
        images = pixels.reshape(batch, self.config.views, 2, 3, size, size).transpose(0, 1, 2, 4, 5, 3)
        tokens = self.inputs[ids]
        lengths = np.full(batch, tokens.shape[1])
        if f"{prefix}attention_mask" in self.inputs:
            lengths = self.inputs[f"{prefix}attention_mask"].sum(1) - self.config.num_slots - 1
        tokens = tokens[:, : lengths.max()].astype(np.int32)
        text = Text(jnp.asarray(tokens), jnp.arange(tokens.shape[1]) < lengths[:, None])
        no_proprio = np.zeros((batch, self.config.proprio_dim), np.float32)
        proprio = self.inputs.get(f"{prefix}proprio", no_proprio)
        return Inputs(jnp.asarray(images[:, :, 0]), jnp.asarray(images[:, :, 1]), jnp.asarray(proprio), text)

    def _head(self, config: PolicyConfig, name: str, file: str) -> Params:
        rows, abstract = tables.head_rows(config)[name], tables.abstract_head(config, name)
        return import_params(rows, abstract, open_safetensors(self.fixture / file), file)["params"]


def policy_config(raw: dict) -> PolicyConfig:
    """Every size from a fixture's config.json."""
    llm, head = raw["llm"], raw["action_head"]
    return PolicyConfig(
        dino=_tower(raw, "dino"),
        siglip=_tower(raw, "siglip"),
        llama=LlamaConfig(
            vocab_size=llm["vocab_size"],
            width=llm["hidden_size"],
            mlp_width=llm["intermediate_size"],
            layers=llm["num_hidden_layers"],
            heads=llm["num_attention_heads"],
            kv_heads=llm["num_key_value_heads"],
            max_positions=llm["max_position_embeddings"],
            rope_theta=llm["rope_theta"],
            rms_eps=llm["rms_norm_eps"],
        ),
        head_width=head["hidden_dim"],
        head_blocks=head["num_blocks"],
        views=raw["num_images_in_input"],
        chunk=raw["num_actions_chunk"],
        action_dim=raw["action_dim"],
        proprio_dim=raw["proprio_dim"],
        use_proprio=raw["use_proprio"],
        log_scale_range=tuple(raw["log_scale_clip"]),
        last_token=raw["empty_token_id"],
        stop_token=raw["stop_token_id"],
    )


def _tower(raw: dict, name: str) -> ViTConfig:
    tower = raw[name]
    return ViTConfig(
        image_size=raw["image_size"],
        patch_size=raw["patch_size"],
        width=tower["width"],
        layers=tower["depth"],
        heads=tower["heads"],
        mlp_width=tower.get("mlp_hidden", int(tower["width"] * tower["mlp_ratio"])),
        class_token=tower["class_token"],
        register_tokens=tower["num_register_tokens"],
        layer_scale=tower["layer_scale"],
        norm_eps=tower["norm_eps"],
        output_layer=tower["feature_block"] - tower["depth"],
    )


def _hidden(model: Policy, inputs: Inputs) -> Hidden:
    return model.decode(model.encode(inputs))


def _reshaped(ours, reference: np.ndarray) -> np.ndarray:
    """In the reference's shape, where the sizes allow it: references differ in how they group axes."""
    ours = np.asarray(ours)
    return ours.reshape(reference.shape) if ours.size == reference.size else ours


def _statistics(entry: dict) -> Statistics:
    """Quantiles of a statistics entry; a dimension that is constant by its minimum and maximum has equal ones."""
    bounds = []
    for group, size in (("action", ACTION_DIM), ("proprio", PROPRIO_DIM)):
        values = {name: np.asarray(entry.get(group, {}).get(name, np.zeros(size)), np.float32) for name in _BOUNDS}
        varies = values["min"] < values["max"]
        bounds += [np.where(varies, values[name], values["min"]) for name in ("q01", "q99")]
    return Statistics(*(jnp.asarray(bound) for bound in bounds))


def _steps(diffusion: dict) -> int:
    """The number of diffusion steps, under whichever of its names the folder has."""
    return max(value for name, value in diffusion.items() if "step" in name and isinstance(value, int))


def _only(arrays: dict[str, np.ndarray], word: str) -> np.ndarray:
    """The one array whose name contains a word."""
    (array,) = (array for name, array in arrays.items() if word in name)
    return array


def _to_environment(actions: np.ndarray) -> np.ndarray:
    """Un-normalised actions as OpenVLA-OFT's evaluation sends them on; ours are clipped to the command's range."""
    gripper = np.where(actions[..., 6:] > 0.5, -1.0, 1.0)
    return np.concatenate([np.clip(actions[..., :6], -1.0, 1.0), gripper], axis=-1)


def _normalisation(arrays: dict[str, np.ndarray]) -> Iterator[Result]:
    """Standardised and normalised actions and proprioception, by quantiles and by minimum and maximum."""
    raw, proprio = jnp.asarray(arrays["in_raw_action"]), jnp.asarray(arrays["in_raw_proprio"])
    ends = {"q99": ("q01", "q99"), "minmax": ("min", "max")}
    for name, reference in arrays.items():
        group, kind = name.removeprefix("out_").split("_", 1)
        if name.startswith("in_"):
            continue
        if name == "out_standardised_action":
            unit = Statistics(-jnp.ones(7), jnp.ones(7), -jnp.ones(8), jnp.ones(8))
            ours = unit.normalize_action(raw)
        elif kind in ends and group in ("action", "proprio"):
            sources = {"q01": ends[kind][0], "q99": ends[kind][1], "min": "min", "max": "max"}
            entry = {
                part: {ours: arrays[f"in_{part}_{theirs}"] for ours, theirs in sources.items()}
                for part in ("action", "proprio")
            }
            statistics = _statistics(entry)
            ours = statistics.normalize_action(raw).clip(-1.0, 1.0)
            ours = ours if group == "action" else statistics.normalize_proprio(proprio)
        else:
            yield unknown(name)
            continue
        yield compare(name, ours, reference, EXACT)
