# SPDX-License-Identifier: Apache-2.0
"""Puts a finished run's policy, simulator, reflector and calibration into the package, in half precision.

python experiments/quickstart.py --from_scratch --workdir=runs/from_scratch
python tools/export_pretrained.py runs/from_scratch
"""

import argparse
import shutil
from pathlib import Path

import numpy as np

from worldenv_jax import files
from worldenv_jax.params_file import load_params, save_params

ASSETS = Path(__file__).resolve().parents[1] / "worldenv_jax" / "assets" / "pretrained"
MODELS = ("policy", "simulator", "reflector")


def main() -> None:
    """Copies the three models and prints their sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path, help="a run whose simulator and reflector are trained")
    workdir = parser.parse_args().workdir
    world = files.read_json(workdir / "config.json")["environment"]["name"]
    for model in MODELS:
        target = ASSETS / world / f"{model}.safetensors"
        save_params(target, load_params(workdir / "params" / f"{model}.safetensors"), np.float16)
        print(f"{target.relative_to(ASSETS)}: {target.stat().st_size / 1e6:.1f} MB")
    shutil.copyfile(workdir / "calibration.json", ASSETS / world / "calibration.json")


if __name__ == "__main__":
    main()
