# SPDX-License-Identifier: Apache-2.0
"""OpenVLA-OFT's published folder layout, in and out. Sources: moojink/openvla-oft (`finetune.py`), Ariostgx/ript-vla.

    config.json, dataset_statistics.json, tokenizer.json, preprocessor_config.json
    model-0000k-of-0000n.safetensors and model.safetensors.index.json, or model.safetensors
    action_head--{step}_checkpoint.pt, proprio_projector--..., noisy_action_projector--..., scale_head--...
    lora_adapter/{adapter_config.json, adapter_model.safetensors}

In a published folder the adapter is already merged into the model: it is a record, and `load_policy` leaves it alone.
`load_adapter` is for adapters that are still to be applied, such as RIPT-VLA's on top of an OpenVLA-OFT model.
`data/statistics.py` reads dataset_statistics.json.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.policy.config import PolicyConfig
from worldenv_jax.types import Params
from worldenv_jax.weights import openvla_oft as tables
from worldenv_jax.weights.name_tables import (
    Row,
    Tensors,
    bind,
    check_names,
    export_tensors,
    import_params,
    name_differences,
)
from worldenv_jax.weights.safetensors_files import INDEX, open_safetensors, save_safetensors
from worldenv_jax.weights.torch_files import load_torch_file, save_torch_file

SHARD_BYTES = 5_000_000_000


def load_policy(
    folder: Path, config: PolicyConfig, shardings: Params | None = None, dtype: str | None = None
) -> Params:
    """Reads the model and every head the configuration has, one tensor at a time, onto the devices.

    Args:
        folder: in the layout above.
        config: what the folder is expected to hold; see `read_config`.
        shardings: nested dict of Sharding over {"params", "unused"}, or None for the default device.
        dtype: of the parameters; None: as stored.

    Returns: {"params", "unused"}. A scale head that the folder lacks is left out: OpenVLA-OFT has none.

    Raises: ValueError listing every missing, unexpected and misshapen name of all files together.
    """
    parts = {"model": (tables.model_rows(config), tables.abstract_model(config), open_safetensors(folder))}
    problems = []
    for name, rows in tables.head_rows(config).items():
        if path := find_head(folder, name):
            tensors = Tensors.from_arrays(flat_head(load_torch_file(path), name))
            parts[path.name] = (rows, tables.abstract_head(config, name), tensors)
        elif name != "scale_head":
            problems.append(f"missing     {name}--*.pt")
    for source, (rows, abstract, tensors) in parts.items():
        expected = {name: entry.shape for name, entry in bind(rows, abstract).items()}
        problems += [f"{line}  [{source}]" for line in name_differences(expected, tensors.shapes)]
    if problems:
        raise ValueError(
            f"{folder} does not fit the policy config ({len(problems)} names):\n  " + "\n  ".join(problems)
        )
    params = {"params": {}}
    for source, (rows, abstract, tensors) in parts.items():
        part = import_params(rows, abstract, tensors, source, _select(shardings, abstract), dtype)
        params = {**params, **part, "params": params["params"] | part["params"]}
    return params


def load_head(
    path: Path, config: PolicyConfig, name: str, shardings: Params | None = None, dtype: str | None = None
) -> Params:
    """Reads one head from a `.pt` / `.pth` file: {name: parameters}.

    Accepts the original layout (names with or without DistributedDataParallel's "module."), RIPT-VLA's scale head
    ({"scale_trunk", "log_b_head"}) and RIPT-VLA's `openvla_headers.pt` ({"action_header", "scale_header"}).
    """
    tensors = Tensors.from_arrays(flat_head(load_torch_file(path), name))
    abstract = tables.abstract_head(config, name)
    placed = _select(shardings, abstract)
    return import_params(tables.head_rows(config)[name], abstract, tensors, str(path), placed, dtype)["params"]


def load_adapter(folder: Path, config: PolicyConfig, shardings: Params | None = None) -> Params:
    """Reads a PEFT adapter (adapter_config.json, adapter_model.safetensors): {"lora", "unused"}.

    Raises: ValueError where rank or alpha differ from the configuration's, or names or shapes do not fit.
    """
    stored = json.loads((folder / "adapter_config.json").read_text())
    expected = {"r": config.lora_rank, "lora_alpha": config.lora_alpha}
    wrong = [f"{key}: got {stored.get(key)}, expected {value}" for key, value in expected.items()]
    wrong = [line for line, key in zip(wrong, expected) if stored.get(key) != expected[key]]
    if wrong:
        raise ValueError(f"{folder}/adapter_config.json does not fit the policy config: {'; '.join(wrong)}")
    tensors = open_safetensors(folder / "adapter_model.safetensors")
    return import_params(tables.lora_rows(config), tables.abstract_adapter(config), tensors, str(folder), shardings)


def save_policy(
    folder: Path,
    config: PolicyConfig,
    params: Params,
    statistics: Mapping,
    step: int | str = "latest",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the model, the heads and the statistics; the adapter must be merged (`policy.merge_adapters`) first.

    Args:
        params: {"params", "unused"}, as `load_policy` returns it.
        statistics: the content of dataset_statistics.json.
        step: goes into the names of the heads' files.
        shard_bytes: most bytes of tensors in one safetensors file.

    Raises: ValueError where `params` still has adapters, or lacks tensors that the layout needs.
    """
    if "lora" in params:
        raise ValueError("save_policy writes a merged model: call policy.merge_adapters first (or save_adapter)")
    model = {"params": {name: params["params"][name] for name in tables.ADAPTED}, "unused": params.get("unused", {})}
    shapes = lambda tree: {name: entry.shape for name, entry in bind(tables.model_rows(config), tree).items()}
    check_names(shapes(tables.abstract_model(config)), shapes(model), "the policy to be saved")
    folder.mkdir(parents=True, exist_ok=True)
    _save_shards(folder, tables.model_rows(config), model, shard_bytes)
    for name, rows in tables.head_rows(config).items():
        if name in params["params"]:
            tensors = dict(export_tensors(rows, {"params": {name: params["params"][name]}}))
            # The original loader strips DistributedDataParallel's prefix and insists on it.
            tensors = {f"module.{key}": array for key, array in tensors.items()}
            save_torch_file(folder / f"{name}--{step}_checkpoint.pt", tensors)
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics, indent=2) + "\n")


def save_adapter(folder: Path, config: PolicyConfig, adapter: Params) -> None:
    """Writes {"lora", "unused"} as a PEFT adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = tables.lora_rows(config)
    entries, dtypes = bind(rows, adapter), _dtypes(rows, adapter)
    shapes = {name: entry.shape for name, entry in entries.items()}
    save_safetensors(folder / "adapter_model.safetensors", shapes, dtypes, export_tensors(rows, adapter))
    modules = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name in shapes if ".lora_A" in name}
    settings = {"peft_type": "LORA", "r": config.lora_rank, "lora_alpha": config.lora_alpha, "lora_dropout": 0.0}
    settings |= {"bias": "none", "init_lora_weights": "gaussian", "target_modules": sorted(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def read_config(folder: Path, config: PolicyConfig) -> PolicyConfig:
    """Completes a configuration from the folder's own files, and compares what both state.

    Takes the decoder's constants from config.json (`text_config`), the image constants from
    preprocessor_config.json and the tokenizer's path.

    Raises: ValueError listing every difference in sizes, and an attention implementation that is causal in
        OpenVLA-OFT's fork of transformers.
    """
    raw = json.loads((folder / "config.json").read_text())
    text = raw.get("text_config", {})
    llama = dataclasses.replace(
        config.llama,
        rms_eps=text.get("rms_norm_eps", config.llama.rms_eps),
        rope_theta=text.get("rope_theta", config.llama.rope_theta),
        max_positions=text.get("max_position_embeddings", config.llama.max_positions),
    )
    sizes = {
        "vocab_size": llama.vocab_size,
        "hidden_size": llama.width,
        "intermediate_size": llama.mlp_width,
        "num_hidden_layers": llama.layers,
        "num_attention_heads": llama.heads,
        "num_key_value_heads": llama.kv_heads,
    }
    wrong = [f"text_config.{k}: got {text[k]}, expected {v}" for k, v in sizes.items() if text.get(k, v) != v]
    image_sizes = raw.get("image_sizes", [config.image_size] * 2)
    if set(image_sizes) != {config.image_size}:
        wrong.append(f"image_sizes: got {image_sizes}, expected {config.image_size}")
    for where, section in (("", raw), ("text_config.", text)):
        implementation = section.get("attn_implementation", section.get("_attn_implementation", "sdpa"))
        if implementation != "sdpa":
            wrong.append(
                f"{where}attn_implementation: got {implementation!r}, which is causal in OpenVLA-OFT; expected 'sdpa'"
            )
    if wrong:
        raise ValueError(f"{folder}/config.json does not fit the policy config:\n  " + "\n  ".join(wrong))
    changes = {"llama": llama}
    if (folder / "tokenizer.json").is_file():
        changes["tokenizer"] = str(folder / "tokenizer.json")
    if (folder / "preprocessor_config.json").is_file():
        towers = json.loads((folder / "preprocessor_config.json").read_text())["tvf_normalize_params"]
        for name, tower in zip(("dino", "siglip"), towers):
            changes[f"{name}_mean"], changes[f"{name}_std"] = tuple(tower["mean"]), tuple(tower["std"])
    return dataclasses.replace(config, **changes)


def find_head(folder: Path, name: str) -> Path | None:
    """The file of a head with the highest step (`latest` above all), or None."""
    step = lambda path: int(number[0]) if (number := re.findall(r"--(\d+)_", path.name)) else math.inf
    return max(folder.glob(f"{name}--*.pt"), key=step, default=None)


def flat_head(stored: Mapping, name: str) -> dict[str, np.ndarray]:
    """One flat dictionary of tensors from any of the three layouts."""
    stored = stored.get({"action_head": "action_header", "scale_head": "scale_header"}.get(name, name), stored)
    if "scale_trunk" in stored:
        parts = {"trunk.": stored["scale_trunk"], "log_b_head.": stored["log_b_head"]}
        stored = {prefix + key: array for prefix, part in parts.items() for key, array in part.items()}
    return {re.sub(r"(^|\.)module\.", r"\1", key): array for key, array in stored.items()}


def _select(shardings: Params | None, abstract: Params) -> Params | None:
    """The part of `shardings` that has the nesting of `abstract`."""
    if shardings is None:
        return None
    return {key: {name: shardings[key][name] for name in names} for key, names in abstract.items()}


def _dtypes(rows: list[Row], params: Params) -> dict[str, str]:
    """The dtype of every foreign tensor: that of the parameter it comes from."""
    leaves = {
        tuple(part.key for part in path): leaf.dtype.name
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    return {name: leaves[entry.path] for name, entry in bind(rows, params).items()}


def _save_shards(folder: Path, rows: list[Row], params: Params, shard_bytes: int) -> None:
    """Writes shards and their index; tensors stay in the order of our parameters."""
    dtypes = _dtypes(rows, params)
    shapes = {name: entry.shape for name, entry in bind(rows, params).items()}
    sizes = {name: math.prod(shape) * jnp.dtype(dtypes[name]).itemsize for name, shape in shapes.items()}
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if filled + size > shard_bytes and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    tensors, weight_map = export_tensors(rows, params), {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        pick = lambda table, names=names: {name: table[name] for name in names}
        save_safetensors(folder / file, pick(shapes), pick(dtypes), (next(tensors) for _ in names))
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
