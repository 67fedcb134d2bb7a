# SPDX-License-Identifier: Apache-2.0
"""Where training starts: published checkpoints of the three models, named in the config, or random parameters.

    --set=pretrained.policy=FOLDER          OpenVLA-OFT's layout (`weights/openvla_folder.py`), statistics included
    --set=pretrained.simulator=FILE.pt      EVAC's checkpoint, either layout (`weights/evac.py`)
    --set=pretrained.image_encoder=FILE     open_clip's ViT-H/14, where the file above lacks it
    --set=pretrained.reflector=FOLDER       LLaVA-1.5 or LLaVA-OneVision (`weights/llava.py`)

A stage of 0 steps (`cloning.steps=0`) takes its model as published. What the checkpoint lacks (adapters, the scale
head, the reward head) starts as without one. `tools/export_checkpoint.py` goes the other way.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.configs import ExperimentConfig, PretrainedConfig
from worldenv_jax.data.statistics import STATISTICS_FILE, load_statistics
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.mesh import Mesh, shardings
from worldenv_jax.policy import init_policy
from worldenv_jax.reflector import ReflectorConfig, init_reflector
from worldenv_jax.simulator import init_simulator
from worldenv_jax.training.train_state import trainable_mask
from worldenv_jax.types import Array, Params, Statistics
from worldenv_jax.weights import evac, llava
from worldenv_jax.weights import openvla_oft as tables
from worldenv_jax.weights.openvla_folder import load_policy, read_config
from worldenv_jax.weights.safetensors_files import open_safetensors
from worldenv_jax.weights.torch_files import load_torch_file


def complete_config(config: ExperimentConfig) -> ExperimentConfig:
    """The config with the constants that its checkpoints state: norms, rotary base, pixels, tokenizers.

    Raises:
      WorldEnvError: a folder is missing, or states other sizes than the config; the message lists all of them.
    """
    paths = config.pretrained
    if paths.policy:
        with _explained(paths.policy):
            config = replace(config, policy=read_config(Path(paths.policy), config.policy))
    if paths.reflector:
        with _explained(paths.reflector):
            config = replace(config, reflector=_complete_reflector(Path(paths.reflector), config.reflector))
    return config


def _complete_reflector(folder: Path, config: ReflectorConfig) -> ReflectorConfig:
    """LLaVA's sizes and constants as the folder states them; activation types and rematerialisation as configured."""
    preprocessor = folder / "preprocessor_config.json"
    pixels = json.loads(preprocessor.read_text()) if preprocessor.is_file() else None
    stated = llava.config_from_json(json.loads((folder / "config.json").read_text()), pixels)
    keep = lambda new, old: replace(new, dtype=old.dtype, remat=old.remat)
    stated = replace(
        stated,
        vision=keep(stated.vision, config.llava.vision),
        language=keep(stated.language, config.llava.language),
        frame_grid=config.llava.frame_grid,
    )
    tokenizer = folder / "tokenizer.json"
    return replace(config, llava=stated, **({"tokenizer": str(tokenizer)} if tokenizer.is_file() else {}))


def published_statistics(paths: PretrainedConfig) -> Statistics | None:
    """The statistics that the policy's checkpoint was trained with; None where it starts from random parameters.

    Raises:
      WorldEnvError: the file is missing or damaged, or has several datasets and none or another is named.
    """
    return load_statistics(Path(paths.policy) / STATISTICS_FILE, paths.statistics or None) if paths.policy else None


def initial_policy(config: ExperimentConfig, key: Array, mesh: Mesh) -> Params:
    """The policy before cloning, laid out on the mesh: published parameters as stored, what is trained in float32.

    Raises:
      WorldEnvError: names or shapes do not fit the config; the message lists all of them.
    """
    init = partial(init_policy, config.policy)
    if not config.pretrained.policy:
        return init(key)
    folder = Path(config.pretrained.policy)
    with _explained(folder):
        layout = shardings(tables.abstract_policy(config.policy), mesh)
        loaded = load_policy(folder, config.policy, layout)["params"]

    optimizers = (config.cloning.optimizer, config.scale_head.optimizer, config.post_training.optimizer)
    return _complete(init, loaded, tuple({pattern for o in optimizers for pattern in o.trainable}), key, mesh)


def initial_simulator(config: ExperimentConfig, key: Array) -> Params:
    """The simulator before training, random or EVAC's.

    Raises:
      WorldEnvError: as `initial_policy`.
    """
    paths = config.pretrained
    if not paths.simulator:
        return init_simulator(config.simulator, key)
    with _explained(paths.simulator):
        tensors = evac.flatten_checkpoint(load_torch_file(Path(paths.simulator)))
        if paths.image_encoder:
            encoder = _read_tensors(Path(paths.image_encoder))
            tensors |= {f"{evac.CLIP}{name}": tensor for name, tensor in encoder.items()}
        loaded, _ = evac.load_evac(config.simulator, tensors)
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), loaded)


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".safetensors":
        file = open_safetensors(path)
        return {name: file.read(name) for name in file.shapes}
    return dict(load_torch_file(path))


def initial_reflector(config: ExperimentConfig, key: Array, mesh: Mesh) -> Params:
    """The reflector before training, LLaVA's parameters in the place of random ones.

    Raises:
      WorldEnvError: as `initial_policy`.
    """
    init = partial(init_reflector, config.reflector)
    if not config.pretrained.reflector:
        return init(key)
    folder, model = Path(config.pretrained.reflector), config.reflector.llava
    with _explained(folder):
        layout = shardings(llava.abstract_llava(model), mesh)
        loaded = llava.import_llava(model, open_safetensors(folder), str(folder), layout)["params"]
    return _complete(init, {"llava": loaded}, config.reflector_training.optimizer.trainable, key, mesh)


def _complete(
    init: Callable[[Array], Params], loaded: Params, trainable: tuple[str, ...], key: Array, mesh: Mesh
) -> Params:
    """`loaded`, and what init(key) has beside it; what is trained in float32."""

    def absent(key: Array) -> Params:  # compiled, so that what is loaded is not made
        params = init(key)
        return {**params, "params": {name: leaf for name, leaf in params["params"].items() if name not in loaded}}

    params = jax.jit(absent, out_shardings=shardings(jax.eval_shape(absent, key), mesh))(key)
    params = {**params, "params": {**loaded, **params["params"]}}
    trained = trainable_mask(params, trainable)
    return jax.tree.map(lambda leaf, chosen: leaf.astype(jnp.float32) if chosen else leaf, params, trained)


@contextlib.contextmanager
def _explained(path: Path | str) -> Iterator[None]:
    """Errors of the readers as errors of the user's, with the path."""
    try:
        yield
    except (OSError, ValueError) as error:
        text = str(error)
        raise WorldEnvError(text if str(path) in text else f"{path}: {text}") from error
