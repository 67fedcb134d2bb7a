# SPDX-License-Identifier: Apache-2.0
"""Which stages a run with the shipped models has left."""

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


def test_another_simulator_is_trained_where_its_data_is_ablated(tmp_path):
    """The shipped policy keeps the statistics that it was trained with, whatever is demonstrated here."""
    run, stages = start_from_shipped(tmp_path, "demonstrations_only")
    assert stages[:3] == ("collect_demonstrations", "collect_exploration", "train_simulator")
    assert not {"clone_policy", "train_reflector"} & set(stages)
    shipped = run.workdir.calibration["statistics"]
    pipeline.collect_demonstrations(run)
    assert run.demonstrations and run.workdir.calibration["statistics"] == shipped
