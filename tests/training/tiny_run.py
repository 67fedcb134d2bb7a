# SPDX-License-Identifier: Apache-2.0
"""A training script of a few milliseconds per step, for tests that kill it: `tiny_run.py WORKDIR STEPS [PAUSE]`."""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax import mesh as meshes
from worldenv_jax.checkpoints import Checkpointer
from worldenv_jax.errors import run_main
from worldenv_jax.metrics import make_writer
from worldenv_jax.training.loop import run_stage
from worldenv_jax.training.train_state import OptimizerConfig, init_train_state, make_train_step

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=5, ema_decay=0.9, weight_decay=0.1)


def loss_fn(params, key, batch):
    noise = 0.1 * jax.random.normal(key, batch.shape)
    prediction = jnp.tanh((batch + noise) @ params["w"]) @ params["v"]
    return jnp.mean((prediction - batch.sum(-1, keepdims=True)) ** 2), {"first": batch[0, 0]}


def batch_fn(step: int) -> np.ndarray:
    return np.random.default_rng([7, step]).normal(size=(16, 8)).astype(np.float32)


def initial_state(seed: int = 0):
    w, v, run = jax.random.split(jax.random.key(seed), 3)
    params = {"w": jax.random.normal(w, (8, 64)) / 3, "v": jax.random.normal(v, (64, 1)) / 8}
    return init_train_state(params, OPTIMIZER, run)


def train(workdir: Path, steps: int, save_every: int = 3, callbacks=(), batch_fn=batch_fn, mesh=None, rules=()):
    state, shardings = initial_state(), None
    if mesh is not None:
        state, shardings = meshes.shard_state(state, mesh, rules), meshes.shardings(state, mesh, rules)
    step_fn = make_train_step(loss_fn, OPTIMIZER, shardings)
    with Checkpointer(workdir / "checkpoints", {"width": 64}) as saver, make_writer(workdir, "tiny") as writer:
        return run_stage(
            "tiny", state, step_fn, batch_fn, steps, checkpointer=saver, writer=writer, save_every=save_every,
            log_every=2, metadata={"data": "tiny"}, callbacks=callbacks,
        )  # fmt: skip


def main() -> None:
    pause = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0

    def slow_batch(step):
        time.sleep(pause)
        return batch_fn(step)

    state = train(Path(sys.argv[1]), int(sys.argv[2]), batch_fn=slow_batch)
    print("finished at", int(state.step))


if __name__ == "__main__":
    run_main(main)
