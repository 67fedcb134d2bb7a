# SPDX-License-Identifier: Apache-2.0
"""The claim's script on the debug preset."""

import json

from script_runs import run


def test_the_claim_evaluates_every_policy_on_the_same_starts(tmp_path):
    """With a gate that passes and one that refuses: then the cloned policy is the result."""
    run("claim", tmp_path, "--ignore_gate")
    content = json.loads((tmp_path / "claim.json").read_text())
    assert [row["variant"] for row in content["table"]] == [
        "full, in imagination, shifted starts",
        "full, in the true world, shifted starts",
    ]
    folder = tmp_path / "full_seed0"
    results = {
        name: json.loads((folder / "evaluation" / f"{name}.json").read_text()) for name in ("before", "after_true")
    }
    assert content["table"][1]["before"]["mean"] == results["before"]["success"]["mean"]
    assert content["table"][1]["after"]["mean"] == results["after_true"]["success"]["mean"]
    run("claim", tmp_path)  # models that learned nothing do not pass
    content = json.loads((tmp_path / "claim.json").read_text())
    assert not content["runs"][0]["gate_passed"]
    assert (
        content["runs"][0]["paired"]["in imagination, shifted starts"]["same"]
        == results["before"]["success"]["episodes"]
    )
