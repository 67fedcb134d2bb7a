# SPDX-License-Identifier: Apache-2.0
"""The end table, summary.json, pooling over seeds, paired comparison."""

import json

import numpy as np
import pytest

from worldenv_jax.evaluation import summary


def example(seed=0, before=(100, 200), after=(140, 200), **extra):
    return summary.make_summary(
        success_before=summary.success_rate(*before),
        success_after=summary.success_rate(*after),
        stages={"collect": 10.0, "post_train": 32.5},
        config={"preset": "debug"},
        seed=seed,
        protocol_hash=extra.pop("protocol_hash", "0123456789ab"),
        peak_rss=3 * 2**30,
        **extra,
    )


def test_summary_file(tmp_path):
    path = summary.write_summary(tmp_path, example())
    content = json.loads(path.read_text())
    assert set(content["success_before"]) == {"mean", "low", "high", "episodes"}
    assert content["seconds"] == pytest.approx(42.5)
    assert content["stages"] == {"collect": 10.0, "post_train": 32.5}
    assert content["peak_rss_bytes"] == 3 * 2**30


def test_table_is_aligned():
    lines = summary.summary_table(example()).splitlines()
    assert "50.0 % [43.1, 56.9]" in lines[0]
    assert "+20.0 points" in lines[2]
    column = lines[0].index("50.0")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)


def test_pooling_over_seeds():
    rows = summary.aggregate([example(0), example(1, (90, 200), (150, 200)), example(0, variant="binary judge")])
    assert [row["variant"] for row in rows] == ["full", "binary judge"]
    assert rows[0]["before"]["mean"] == pytest.approx(190 / 400)
    assert rows[0]["after"]["mean"] == pytest.approx(290 / 400)
    alone = summary.success_rate(145, 200)  # the same 200 starts twice are not 400 starts
    assert [rows[0]["after"][name] for name in ("low", "high")] == pytest.approx([alone["low"], alone["high"]])
    assert rows[0]["difference_per_seed"] == pytest.approx([0.2, 0.3])
    assert rows[0]["apart"]
    assert "binary judge" in summary.aggregate_table(rows)


def test_a_refused_run_counts_with_the_policy_it_started_from():
    rows = summary.aggregate([example(0, (80, 200), (120, 200)), {**example(1, (80, 200), (80, 200)), "refused": True}])
    assert rows[0]["after"]["mean"] == pytest.approx((120 + 80) / 400)
    assert rows[0]["refused"] == [1] and "+20.0, refused" in summary.aggregate_table(rows)


def test_overlapping_intervals_are_not_apart():
    assert not summary.aggregate([example(0, (10, 20), (12, 20))])[0]["apart"]


def test_other_protocols_are_not_pooled():
    with pytest.raises(ValueError, match="0123456789ab, ffffffffffff"):
        summary.aggregate([example(), example(protocol_hash="ffffffffffff")])


def test_paired_comparison_by_hand():
    # 5 gained, 1 lost, 4 same. Exact McNemar: 2 (C(6,0) + C(6,1)) / 2^6 = 14 / 64.
    before = np.array([0] * 5 + [1] + [1, 1, 0, 0], bool)
    after = np.array([1] * 5 + [0] + [1, 1, 0, 0], bool)
    result = summary.paired_comparison(before, after)
    assert (result["gained"], result["lost"], result["same"]) == (5, 1, 4)
    assert result["difference"] == pytest.approx(0.4)
    assert result["p_value"] == pytest.approx(14 / 64)
    # Bonett-Price: (6 - 2) / 12 -+ 1.96 sqrt((8 / 12 - 1 / 9) / 12).
    assert result["low"] == pytest.approx(1 / 3 - 1.959964 * np.sqrt((8 / 12 - 1 / 9) / 12))
    assert result["high"] == pytest.approx(1 / 3 + 1.959964 * np.sqrt((8 / 12 - 1 / 9) / 12))


def test_paired_comparison_without_change():
    assert summary.paired_comparison(np.ones(4, bool), np.ones(4, bool))["p_value"] == 1.0


def test_peak_memory_is_plausible():
    assert 2**20 < summary.peak_rss_bytes() < 2**45
