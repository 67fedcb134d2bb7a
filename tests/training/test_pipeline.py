# SPDX-License-Identifier: Apache-2.0
"""Which stages a run has, and which are left with the shipped models."""

from dataclasses import replace

import pytest

from worldenv_jax.configs import apply_variant, get_config
from worldenv_jax.training import pipeline


def start_from_shipped(folder, variant):
    run = pipeline.Run(apply_variant(get_config("debug"), variant), folder)
    return run, pipeline.stages_after_pretrained(run)


@pytest.mark.parametrize("variant", ["full", "binary_judge", "no_early_stop"])
def test_shipped_models_are_not_trained_again(tmp_path, variant):
    _, stages = start_from_shipped(tmp_path, variant)
    assert stages[0] == "collect_exploration"
    assert not [name for name in stages if name.startswith("train_") or name == "clone_policy"]


def test_self_imitation_is_a_stage_where_post_training_starts_from_it(tmp_path):
    config = get_config("debug")
    assert "imitate_successes" not in pipeline.stages_of(config)
    post_training = replace(config.post_training, start_from="self_imitated")
    run = pipeline.Run(replace(config, post_training=post_training), tmp_path)
    stages = pipeline.stages_after_pretrained(run)  # it learns from demonstrations, too, which are not shipped
    assert stages[:3] == ("collect_demonstrations", "collect_exploration", "imitate_successes")


def test_mere_starts_are_a_stage_where_the_config_has_them():
    config = get_config("debug")
    assert "collect_starts" not in pipeline.stages_of(config)
    config = replace(config, collect=replace(config.collect, starts_per_task=1))
    stages = pipeline.stages_of(config)
    assert stages.index("collect_exploration") < stages.index("collect_starts") < stages.index("post_train")


def test_another_simulator_is_trained_where_its_data_is_ablated(tmp_path):
    """The shipped policy keeps the statistics that it was trained with, whatever is demonstrated here."""
    run, stages = start_from_shipped(tmp_path, "demonstrations_only")
    assert stages[:3] == ("collect_demonstrations", "collect_exploration", "train_simulator")
    assert not {"clone_policy", "train_reflector"} & set(stages)
    shipped = run.workdir.calibration["statistics"]
    pipeline.collect_demonstrations(run)
    assert run.demonstrations and run.workdir.calibration["statistics"] == shipped
