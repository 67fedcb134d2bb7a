# SPDX-License-Identifier: Apache-2.0
"""Writes a run's model in the layout of its PyTorch original, for the code of others to load.

    python tools/export_checkpoint.py --workdir=runs/x --model=post_trained --to=exported

    policy, post_trained, post_trained_true   OpenVLA-OFT's folder: adapters merged, heads as .pt, statistics
    simulator                                 EVAC's Lightning file `evac.pt`
    reflector                                 LLaVA's published folder, and `reward_head.safetensors`

Tensors that no forward pass reads come from the checkpoint that the run started from (`pretrained.*`), or are zeros;
the other files of that folder (configs, tokenizer, code) are copied.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

from worldenv_jax import files  # noqa: E402
from worldenv_jax.configs import ExperimentConfig  # noqa: E402
from worldenv_jax.data.statistics import STATISTICS_FILE, statistics_to_dict  # noqa: E402
from worldenv_jax.errors import WorldEnvError, run_main  # noqa: E402
from worldenv_jax.networks.lora import merge_lora  # noqa: E402
from worldenv_jax.overrides import from_dict  # noqa: E402
from worldenv_jax.params_file import save_params  # noqa: E402
from worldenv_jax.policy import merge_adapters  # noqa: E402
from worldenv_jax.training.pipeline import Run  # noqa: E402
from worldenv_jax.types import Params  # noqa: E402
from worldenv_jax.weights import evac, llava  # noqa: E402
from worldenv_jax.weights import openvla_oft as tables  # noqa: E402
from worldenv_jax.weights.name_tables import Row, Tensors, bind, import_params  # noqa: E402
from worldenv_jax.weights.openvla_folder import save_policy  # noqa: E402
from worldenv_jax.weights.safetensors_files import SINGLE, open_safetensors, save_safetensors  # noqa: E402
from worldenv_jax.weights.torch_files import load_torch_file, save_torch_file  # noqa: E402

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".index.json")


def export_policy(run: Run, model: str, folder: Path) -> None:
    """An OpenVLA-OFT folder."""
    config, source = run.config.policy, run.config.pretrained.policy
    params = run.params(model)
    if "lora" in params:
        params = merge_adapters(config, params)
    abstract = tables.abstract_model(config)["unused"]
    params = {**params, "unused": _unused(tables.model_rows(config), abstract, source)}
    dataset = run.config.pretrained.statistics or run.config.environment.suite or run.config.environment.name
    save_policy(folder, config, params, {dataset: statistics_to_dict(run.models.statistics)})
    _copy_rest(source, folder)


def export_simulator(run: Run, folder: Path) -> None:
    """EVAC's file."""
    source, unused = run.config.pretrained.simulator, {}
    if source:
        tensors = evac.flatten_checkpoint(load_torch_file(Path(source)))
        unused = {name: tensor for name, tensor in tensors.items() if evac.is_unused(run.config.simulator, name)}
    save_torch_file(folder / "evac.pt", evac.export_evac(run.config.simulator, run.params("simulator"), unused))


def export_reflector(run: Run, folder: Path) -> None:
    """A LLaVA folder and the reward head."""
    config, source = run.config.reflector, run.config.pretrained.reflector
    params = run.params("reflector")
    merged = params["params"]["llava"]
    if "lora" in params:
        merged = merge_lora(merged, params["lora"]["llava"], config.lora_alpha / config.lora_rank)
    rows = llava.llava_rows(config.llava)
    unused = _unused(rows, llava.abstract_llava(config.llava)["unused"], source)
    tensors = dict(llava.export_llava(config.llava, {"params": merged, "unused": unused}))
    shapes = {name: array.shape for name, array in tensors.items()}
    dtypes = {name: array.dtype.name for name, array in tensors.items()}
    save_safetensors(folder / SINGLE, shapes, dtypes, tensors.items())
    save_params(folder / "reward_head.safetensors", params["params"]["reward_head"])
    _copy_rest(source, folder)


def _unused(rows: list[Row], abstract: Mapping[str, Any], source: str) -> Params:
    """{name: tensor} of what no forward pass reads: from the folder `source`, or zeros."""
    if not source:
        return {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in abstract.items()}
    rows = [row for row in rows if row.path.startswith("unused/")]
    stored = open_safetensors(Path(source))
    names = bind(rows, {"unused": abstract})
    tensors = Tensors({name: stored.shapes[name] for name in names}, stored.read)
    return import_params(rows, {"unused": abstract}, tensors, source)["unused"]


def _copy_rest(source: str, folder: Path) -> None:
    for path in Path(source).iterdir() if source else ():
        if path.is_file() and not path.name.endswith(WEIGHTS) and path.name != STATISTICS_FILE:
            shutil.copyfile(path, folder / path.name)


def main(arguments: list[str] | None = None) -> None:
    """Exports one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="of the run")
    models = ("policy", "self_imitated", "post_trained", "post_trained_true", "simulator", "reflector")
    parser.add_argument("--model", choices=models, required=True)
    parser.add_argument("--to", type=Path, required=True, help="new folder")
    options = parser.parse_args(arguments)
    if options.to.exists():
        raise WorldEnvError(f"{options.to} exists already: choose another folder")
    config = from_dict(ExperimentConfig, files.read_json(options.workdir / "config.json"))
    run = Run(config, options.workdir)
    with files.atomic_folder(options.to) as folder:
        try:
            if options.model == "simulator":
                export_simulator(run, folder)
            elif options.model == "reflector":
                export_reflector(run, folder)
            else:
                export_policy(run, options.model, folder)
        except ValueError as error:  # the run's config has parts that the layout has no names for
            raise WorldEnvError(f"the {options.model} does not fit its original's layout: {error}") from error
    print(f"{options.model}: {options.to}")


if __name__ == "__main__":
    run_main(main)
