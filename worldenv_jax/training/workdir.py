# SPDX-License-Identifier: Apache-2.0
"""Where a run keeps things, and how stages find what earlier stages made.

Layout::

    config.json  manifest.json  calibration.json       what the run is
    data/demonstrations/  data/exploration/            RLDS folders, each written atomically
    checkpoints/<stage>/                               to resume from: `checkpoints.Checkpointer`
    params/<model>.safetensors                         finished models, for later stages
    metrics/<stage>.jsonl  metrics/tensorboard/        curves
    seconds/<stage>.json                               wall-clock time, summed over restarts
    gate.json  agreement.json  evaluation/<policy>.json
    pictures/*.png|*.gif  pictures/captions.json
    summary.json  report.html
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from worldenv_jax import files
from worldenv_jax.checkpoints import Checkpointer
from worldenv_jax.configs import MeshConfig, StageConfig
from worldenv_jax.data.episodes import Episode
from worldenv_jax.data.rlds import open_episodes
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.mesh import make_mesh, own_rows, shard_batch, shard_state, shardings
from worldenv_jax.metrics import make_writer
from worldenv_jax.overrides import diff_configs
from worldenv_jax.params_file import load_params, save_params
from worldenv_jax.training.loop import run_stage
from worldenv_jax.training.train_state import LossFn, ema_params, init_train_state, make_train_step
from worldenv_jax.types import Array, Params

MADE_BY = {
    "policy": "experiments/clone_policy.py",
    "self_imitated": "experiments/imitate_successes.py",
    "simulator": "experiments/train_simulator.py",
    "reflector": "experiments/train_reflector.py",
    "post_trained": "experiments/post_train.py",
    "post_trained_true": "experiments/post_train.py --world=true",
}


# What may differ between two starts in one workdir: how long and where, not what.
MAY_CHANGE = ("steps", "iterations", "log_every", "save_every", "slots", "data", "fsdp", "tensor")


def _may_change(key: str) -> bool:
    return key.rpartition(".")[2] in MAY_CHANGE


class Workdir:
    """The folder of one run.

    Args:
      folder: made by `save_config` if missing.
      config: JSON form of the run's config. A folder that was made with another config is refused; the keys of
        `MAY_CHANGE` may differ.

    Raises:
      WorldEnvError: the folder belongs to another config.
    """

    def __init__(self, folder: str | Path, config: dict[str, Any]):
        self.folder = Path(folder)
        self.config = config
        saved = self.folder / "config.json"
        if saved.exists():
            differences = diff_configs(files.read_json(saved), config)
            differences = [line for line in differences if not _may_change(line.partition(":")[0])]
            if differences:
                raise WorldEnvError(
                    f"{self.folder} was made with another config: {'; '.join(differences)}. "
                    "Use that config or another --workdir."
                )

    def save_config(self) -> None:
        """Writes config.json; not before, so that a script that refuses its inputs leaves nothing behind."""
        files.write_json(self.folder / "config.json", self.config)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def checkpointer(self, stage: str) -> Checkpointer:
        """The checkpoints of a stage. Any config of the run may resume it: the folder has checked the config."""
        return Checkpointer(self / "checkpoints" / stage)

    def save_params(self, model: str, params: Params) -> None:
        """Hands a finished model on to later stages: "policy", "simulator", "reflector" or "post_trained"."""
        save_params(self / "params" / f"{model}.safetensors", params)

    def params(self, model: str) -> Params:
        """A finished model's parameters as NumPy arrays.

        Raises:
          WorldEnvError: the stage that makes it has not finished.
        """
        path = self / "params" / f"{model}.safetensors"
        if not path.exists():
            raise WorldEnvError(f"{path} does not exist: run {MADE_BY[model]} first, with the same --workdir")
        return load_params(path)

    def has_finished(self, stage: str) -> bool:
        """Whether a stage has run to its end."""
        return (self / "seconds" / f"{stage}.json").exists() and files.read_json(self / "seconds" / f"{stage}.json")[
            "finished"
        ]

    def episodes(self, kind: str) -> Sequence[Episode]:
        """Recorded episodes: "demonstrations" or "exploration".

        Raises:
          WorldEnvError: they have not been collected.
        """
        folder = self / "data" / kind
        if not folder.exists():
            raise WorldEnvError(f"{folder} does not exist: run experiments/collect.py --what={kind} first")
        return open_episodes(folder)

    @property
    def calibration(self) -> dict[str, Any]:
        """Numbers measured on data that belong to the models: see `pipeline.Run.models`."""
        saved = self / "calibration.json"
        return files.read_json(saved) if saved.exists() else {}

    def calibrate(self, **numbers: Any) -> None:
        """Adds to `calibration`."""
        files.write_json(self / "calibration.json", {**self.calibration, **numbers})

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> wall-clock seconds so far, in the order of their first start."""
        records = sorted((self / "seconds").glob("*.json"), key=lambda path: files.read_json(path)["began"])
        return {path.stem: files.read_json(path)["seconds"] for path in records}

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the block's wall-clock time to the stage's; the stage counts as finished when the block ends well."""
        saved = self / "seconds" / f"{stage}.json"
        before = files.read_json(saved) if saved.exists() else {"seconds": 0.0, "began": time.time()}
        began, finished = time.monotonic(), False
        try:
            yield
            finished = True
        finally:
            with contextlib.suppress(WorldEnvError):  # a full disk must not hide the error under way
                seconds = before["seconds"] + time.monotonic() - began
                files.write_json(saved, {**before, "seconds": seconds, "finished": finished})

    def add_picture(self, name: str, caption: str) -> Path:
        """Registers a picture for the report; returns the path to write it to."""
        folder = self / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        captions = folder / "captions.json"
        known = files.read_json(captions) if captions.exists() else {}
        files.write_json(captions, {**known, name: caption})
        return folder / name


def run_training(
    workdir: Workdir,
    stage: str,
    config: StageConfig,
    mesh: Mesh,
    params: Params,
    loss: LossFn,
    batch_fn: Callable[[int], Any],
    key: Array,
) -> Params:
    """A supervised stage with the workdir's checkpoints, metrics and clock, on a mesh.

    Args:
      workdir: of the run.
      stage: name of the checkpoints and metrics.
      config: steps, batch, optimiser.
      mesh: parameters and optimiser state are laid out by `mesh.DEFAULT_RULES`, batches over data and fsdp.
      params: before the first step.
      loss: what is minimised.
      batch_fn: step -> NumPy batch, a pure function.
      key: of the run's randomness.

    Returns:
      The parameters after the last step (moving averages where the stage keeps them).
    """
    state = shard_state(init_train_state(params, config.optimizer, key), mesh)
    step = make_train_step(loss, config.optimizer, shardings(state, mesh))
    with (
        workdir.timed(stage),
        workdir.checkpointer(stage) as checkpointer,
        make_writer(workdir / "metrics", stage) as writer,
        jax.set_mesh(mesh),
    ):
        state = run_stage(
            stage,
            state,
            step,
            lambda number: shard_batch(own_rows(batch_fn(number), mesh), mesh),
            config.steps,
            checkpointer=checkpointer,
            writer=writer,
            save_every=config.save_every,
            log_every=config.log_every,
        )
    return ema_params(state)


def mesh_from_config(config: MeshConfig) -> Mesh:
    """The mesh of a run: the first data x fsdp x tensor devices, or all of them with data=0."""
    count = config.data * config.fsdp * config.tensor
    devices = jax.devices()[:count] if config.data else None
    return make_mesh(config.data, config.fsdp, config.tensor, devices)
