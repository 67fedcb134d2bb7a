# SPDX-License-Identifier: Apache-2.0
"""Demonstrations and cloning on the debug preset, for tests that kill it: `debug_run.py WORKDIR STEPS`."""

import sys
from dataclasses import replace
from pathlib import Path

from worldenv_jax.configs import debug
from worldenv_jax.errors import run_main
from worldenv_jax.training import pipeline


def main() -> None:
    config, steps = debug(), int(sys.argv[2])
    cloning = replace(config.cloning, steps=steps, save_every=3)
    collect = replace(config.collect, demonstrations_per_task=4)
    config = replace(config, cloning=cloning, scale_head=replace(config.scale_head, steps=0), collect=collect)
    run = pipeline.Run(config, Path(sys.argv[1]))
    try:
        pipeline.start(run)
        for name in ("collect_demonstrations", "clone_policy"):
            pipeline.STAGES[name](run)
    finally:
        run.close()


if __name__ == "__main__":
    run_main(main)
