# SPDX-License-Identifier: Apache-2.0
"""Flags that every script has, and how a script starts: `--config`, `--set`, `--workdir`."""

import os
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging

from worldenv_jax.configs import ExperimentConfig, get_config
from worldenv_jax.errors import WorldEnvError, run_main
from worldenv_jax.mesh import initialize_hosts, use_every_core
from worldenv_jax.overrides import apply_overrides
from worldenv_jax.training import pipeline

FLAGS = flags.FLAGS
flags.DEFINE_string("config", "tabletop", "Preset: see worldenv_jax/configs.py.")
flags.DEFINE_multi_string("set", [], "Override, repeatable: --set=post_training.iterations=40")
flags.DEFINE_string("workdir", None, "Where the run keeps everything; runs/<config> by default.")
flags.DEFINE_bool("ignore_gate", False, "Post-train although the gate refuses.")
flags.DEFINE_bool("distributed", False, "Join the other processes of this run: TPU pod, SLURM, Open MPI.")
flags.DEFINE_string("coordinator", None, "host:port of process 0, where the environment does not tell it.")
flags.DEFINE_integer("processes", None, "How many, with --coordinator.")
flags.DEFINE_integer("process", None, "Number of this one, with --coordinator.")

flags.DEFINE_list(
    "policy", ["after"], "Cloned (before), self_imitated, post-trained (after), or that in the true world (after_true)."
)


def config_from_flags() -> ExperimentConfig:
    """The preset with the overrides."""
    return apply_overrides(get_config(FLAGS.config), FLAGS.set)


def workdir_from_flags() -> Path:
    """--workdir, or runs/<config>."""
    return Path(FLAGS.workdir or Path("runs") / FLAGS.config)


def policies_from_flags(*others: str) -> list[str]:
    """--policy: names of `pipeline.POLICIES`, or some of `others`.

    Raises:
      WorldEnvError: an unknown name.
    """
    known = (*pipeline.POLICIES, *others)
    unknown = [name for name in FLAGS.policy if name not in known]
    if unknown or not FLAGS.policy:
        raise WorldEnvError(f"--policy={','.join(FLAGS.policy)}: expected {', '.join(known)}")
    return FLAGS.policy


def run_script(main: Callable[[], int | None]) -> None:
    """Parses the flags and runs `main`; errors that a user can correct are one line and exit code 2."""

    def parsed(_: list[str]) -> int | None:
        logging.set_verbosity(logging.WARNING)
        use_compilation_cache()
        several_hosts = FLAGS.distributed or FLAGS.coordinator
        if config_from_flags().mesh.data == 0 and not several_hosts:
            use_every_core()
        if several_hosts:
            initialize_hosts(FLAGS.coordinator, FLAGS.processes, FLAGS.process)
        return main()

    run_main(lambda: app.run(parsed))


def use_compilation_cache() -> None:
    """Compiled programs are kept between runs, unless JAX_COMPILATION_CACHE_DIR says where to keep them."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "worldenv_jax" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))


def run_stages(*names: str) -> None:
    """Runs stages of `pipeline.STAGES` in the workdir of the flags."""
    run = pipeline.Run(config_from_flags(), workdir_from_flags())
    try:
        pipeline.start(run)
        for name in names:
            pipeline.STAGES[name](run)
    finally:
        run.close()
