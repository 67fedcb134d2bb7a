# SPDX-License-Identifier: Apache-2.0
"""Flags of the scripts that repeat an experiment: `--seeds`, `--variants`."""

from collections.abc import Iterator
from dataclasses import replace

from absl import flags
from common import FLAGS

from worldenv_jax.configs import ExperimentConfig, apply_variant

flags.DEFINE_integer("seeds", 1, "Runs with the seeds 0, 1, ...", lower_bound=1)
flags.DEFINE_list("variants", ["full"], "Rows of the table: full and the ablations of configs.VARIANTS.")


def each_run(config: ExperimentConfig) -> Iterator[tuple[str, ExperimentConfig]]:
    """(name of its folder, config) of every seed of every variant."""
    for variant in FLAGS.variants:
        for seed in range(FLAGS.seeds):
            yield f"{variant}_seed{seed}", apply_variant(replace(config, seed=seed), variant)
