# SPDX-License-Identifier: Apache-2.0
"""The reflector's vision-language model against `transformers`: vision features, hidden states, logits."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from tools.parity import Result, compare, load_npz, unknown
from worldenv_jax.networks.vision_transformer import VisionTransformer
from worldenv_jax.reflector.llava import Llava, LlavaConfig, llava_forward
from worldenv_jax.types import Params
from worldenv_jax.weights.llava import config_from_json, import_llava
from worldenv_jax.weights.safetensors_files import open_safetensors

TOLERANCE = 5e-5


def check(fixture: Path) -> Iterator[Result]:
    """Yields one result per reference array and key layout found in the folder."""
    raw = json.loads((fixture / "config.json").read_text())
    config = config_from_json(raw)
    inputs, outputs = load_npz(fixture / "inputs.npz"), load_npz(fixture / "outputs.npz")
    for file in sorted(fixture.glob("weights*.safetensors")):
        params = import_llava(config, open_safetensors(file), file.name)
        layout = file.stem.removeprefix("weights_")
        ours = {name: array for case in raw["cases"] for name, array in _compute(config, params, case, inputs).items()}
        for name, reference in outputs.items():
            yield _compare(f"{layout} {name}", ours.get(name), reference)


def _compute(config: LlavaConfig, params: Params, case: str, inputs: dict[str, np.ndarray]) -> dict[str, tuple]:
    """Quantity -> (ours, which positions count) for one case."""
    tokens = inputs[f"{case}_input_ids"].astype(np.int32)
    mask = inputs[f"{case}_attention_mask"].astype(bool)
    images = jnp.asarray(inputs[f"{case}_pixel_values"].transpose(0, 2, 3, 1))
    variables = {"params": params["params"]}
    hidden, logits = llava_forward(config, variables, tokens, mask, images)
    features = Llava(config).apply(variables, images, method="image_features")
    tower = {"params": params["params"]["vision_tower"]}
    vision = VisionTransformer(config.vision).apply(tower, images)
    return {
        f"{case}_logits": (logits, mask),
        f"{case}_last_hidden": (hidden, mask),
        f"{case}_image_features": (features.reshape(-1, features.shape[-1]), np.True_),
        f"{case}_vision_hidden_minus2": (vision, np.True_),
    }


def _compare(name: str, ours: tuple | None, reference: np.ndarray) -> Result:
    if ours is None:
        return unknown(name)
    array, counted = np.asarray(ours[0]), ours[1]
    if array.shape != reference.shape:
        return compare(name, array, reference, TOLERANCE)
    return compare(name, array[counted], reference[counted], TOLERANCE)
