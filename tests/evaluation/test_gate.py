# SPDX-License-Identifier: Apache-2.0
"""The gate passes good figures and names every bad one."""

import dataclasses
import json

import pytest

from worldenv_jax.evaluation.gate import GateConfig, GateRefused, evaluate_gate

JUDGE = {"auroc": 0.95, "false_positive_rate": 0.02, "calibration_error": 0.05, "episode_auroc": 0.95}
POLICY = {"imagined_success": {"mean": 0.3}, "true_success": {"mean": 0.4}}
OUTCOMES = {"imagined": {"correlation": 0.6}, "policy": POLICY}
CONFIG = GateConfig(copy_margin_success=3.0, copy_margin_failure=1.5, true_auroc=0.9, imagined_auroc=0.85)


def simulator_figures(success=27.0, failure=25.0):
    def predictors(own):
        return {
            "simulator": {"psnr": own},
            "copy_last_frame": {"psnr": 23.0},
            "no_action": {"psnr": 22.0},
        }

    return {"success": predictors(success), "failure": predictors(failure)}


def test_good_figures_pass():
    result = evaluate_gate(simulator_figures(), {"true": JUDGE, "imagined": JUDGE}, OUTCOMES, CONFIG)
    assert result.passed
    result.check()
    assert len(result.rows) == 13
    assert result.rows[0].figure == pytest.approx(4.0)
    assert result.rows[-1].figure == pytest.approx(0.75)


def test_a_policy_that_imagination_confuses_is_refused():
    """Whoever recorded the episodes is asked; where it was somebody else, nobody."""
    judges = {"true": JUDGE, "imagined": JUDGE}
    lost = OUTCOMES | {"policy": {**POLICY, "imagined_success": {"mean": 0.1}}}
    with pytest.raises(GateRefused, match="imagined successes of the policy per true one: 0.25, must be at least 0.5"):
        evaluate_gate(simulator_figures(), judges, lost, CONFIG).check()
    never = OUTCOMES | {"policy": {**POLICY, "true_success": {"mean": 0.0}}}
    assert not evaluate_gate(simulator_figures(), judges, never, CONFIG).passed
    by_others = evaluate_gate(simulator_figures(), judges, {"imagined": {"correlation": 0.6}}, CONFIG)
    assert by_others.passed and len(by_others.rows) == 12


def test_refusal_lists_every_failed_row_and_the_flag():
    judges = {"true": JUDGE, "imagined": {**JUDGE, "auroc": 0.71, "false_positive_rate": 0.4}}
    result = evaluate_gate(simulator_figures(failure=23.5), judges, OUTCOMES, CONFIG)
    assert not result.passed
    with pytest.raises(GateRefused) as refusal:
        result.check()
    message = str(refusal.value)
    assert "PSNR above copy-last-frame, failure episodes: 0.5 dB, must be at least 1.5 dB" in message
    assert "AUROC, imagined frames: 0.71, must be at least 0.85" in message
    assert "false-positive rate at eta, imagined frames: 0.4, must be at most 0.15" in message
    assert "true frames" not in message
    assert "--ignore_gate" in message


def test_a_judge_that_knows_only_the_time_is_refused():
    clock = {**JUDGE, "auroc": 0.94, "episode_auroc": 0.72}
    with pytest.raises(GateRefused, match="AUROC of whole episodes, true frames: 0.72, must be at least 0.9"):
        evaluate_gate(simulator_figures(), {"true": clock, "imagined": JUDGE}, OUTCOMES, CONFIG).check()


def test_what_was_not_measured_fails():
    figures = simulator_figures()
    figures["success"]["simulator"]["psnr"] = None
    result = evaluate_gate(figures, {"true": JUDGE}, {"imagined": {"correlation": None}}, CONFIG)
    assert sum(not row.passed for row in result.rows) == 2 + 3 + 1
    with pytest.raises(GateRefused, match="AUROC, imagined frames: not measured"):
        result.check()
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["rows"][0]["figure"] is None


def test_every_threshold_is_used():
    good = evaluate_gate(simulator_figures(), {"true": JUDGE, "imagined": JUDGE}, OUTCOMES, GateConfig())
    thresholds = {row.threshold for row in good.rows}
    assert thresholds == {getattr(GateConfig(), field.name) for field in dataclasses.fields(GateConfig)}
