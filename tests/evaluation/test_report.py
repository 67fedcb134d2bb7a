# SPDX-License-Identifier: Apache-2.0
"""The report: self-contained, complete, made at any time of a run."""

import html.parser
import json
import re

import numpy as np
import pytest

from worldenv_jax import files
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.evaluation import agreement, gate, reflector_quality, report, strips, summary, video_quality

VOID = {"meta", "img", "br", "input"}


class Checker(html.parser.HTMLParser):
    """Collects links and checks that HTML elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.sources = [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(path):
    text = path.read_text()
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert all(source.startswith(("data:", "#")) for source in checker.sources)
    assert "<script" not in text and "@import" not in text and "://" not in text
    return text


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run, as the stages leave it."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    before, after = summary.success_rate(90, 200), summary.success_rate(131, 200)
    config = {"preset": "debug & <co>", "seed": 3}
    content = summary.make_summary(
        success_before=before,
        success_after=after,
        stages={"collect": 3.0, "post_train": 70.0},
        config=config,
        seed=3,
        protocol_hash="0123456789ab",
        peak_rss=2**30,
    )
    summary.write_summary(folder, content)
    files.write_json(folder / "aggregate.json", summary.aggregate([content]))
    files.write_json(folder / "evaluation" / "cloned.json", {"success": before, "per_task": [before, after]})
    frames = rng.integers(0, 256, (2, 4, 1, 16, 16, 3), np.uint8)
    valid, other = np.ones((2, 4), bool), 255 - frames
    figures = video_quality.open_loop_quality(
        frames[:, 0], frames, valid, np.array([True, False]), {"simulator": other, "no_action": other}
    )
    judge = {"auroc": 0.5, "false_positive_rate": 0.4, "calibration_error": 0.3}
    curves = reflector_quality.judge_curves(np.array([[0.2, 0.9]]), np.array([[False, True]]), np.ones((1, 2), bool))
    result = gate.evaluate_gate(figures, {"true": judge}, {"imagined": {"correlation": 0.5}}, gate.GateConfig())
    sensitivity = video_quality.action_sensitivity(frames, valid, frames, other)
    files.write_json(
        folder / "gate.json",
        {
            **result.to_dict(),
            "simulator": figures,
            "reflector": {"true": {**judge, **curves}},
            "action_sensitivity": sensitivity,
            "proprioception": {"position": [0.001, 0.0204, None]},
        },
    )
    files.write_json(
        folder / "agreement.json", agreement.imagination_agreement(np.array([True, False]), np.array([True, True]))
    )
    rows = [{"step": step, "time": 1.0, **{f"metric_{i}": step * i for i in range(8)}} for step in range(5)]
    files.write_text(folder / "metrics" / "denoiser.jsonl", "".join(json.dumps(row) + "\n" for row in rows) + '{"ste')
    strip = strips.Strip(frames[0, :, 0], frames[1, :, 0])
    strips.save_image(folder / "pictures" / "replay.png", strips.draw_strip(strip, cell=32))
    strips.save_video(folder / "pictures" / "imagined.gif", strips.draw_video(strip, cell=32))
    files.write_json(folder / "pictures" / "captions.json", {"replay.png": "Replayed: put <it> there"})
    files.write_json(folder / "config.json", config)
    files.write_json(folder / "manifest.json", {"starts": [{"git_commit": None, "device": "1 x cpu", "time": "now"}]})
    return folder


def test_report_is_complete_and_self_contained(workdir):
    text = check_page(report.write_report(workdir))
    assert "World-Env in JAX: debug &amp; &lt;co&gt;" in text
    for words in ("45.0 % [38.3, 51.9]", "0123456789ab", "Seeds and variants", "copy last frame", "metric_7"):
        assert words in text
    assert text.count(">fail</span>") == sum(
        not row["passed"] for row in files.read_json(workdir / "gate.json")["rows"]
    )
    assert "is 1.0 mm from where it was after one chunk, 20.4 mm after 2." in text
    assert "reliability, true frames" in text and "false-positive and false-negative rate, true frames" in text
    assert "Replayed: put &lt;it&gt; there" in text and "imagined.gif" in text
    assert text.count("data:image/png") == 1 and text.count("data:image/gif") == 1


def test_report_of_an_empty_workdir(tmp_path):
    text = check_page(report.write_report(tmp_path, title="nothing yet"))
    assert "nothing yet" in text and "<section" not in text


def test_report_during_training(workdir, tmp_path):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "denoiser.jsonl").write_bytes((workdir / "metrics" / "denoiser.jsonl").read_bytes())
    text = check_page(report.write_report(tmp_path))
    assert re.findall('<section id="([a-z-]+)">', text) == ["learning-curves"]


def test_large_pictures_are_named_instead(workdir, monkeypatch):
    monkeypatch.setattr(report, "PICTURE_BYTES", (workdir / "pictures" / "replay.png").stat().st_size)
    data = report.load_report_data(workdir)
    assert [picture.name for picture in data.pictures] == ["replay.png"]
    assert data.left_out == ["imagined.gif"]
    assert "too large for this page: imagined.gif" in report.render_report(data)


def test_missing_workdir(tmp_path):
    with pytest.raises(WorldEnvError, match="is not a folder"):
        report.write_report(tmp_path / "nowhere")


def test_broken_summary_names_the_file(tmp_path):
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(WorldEnvError, match="summary.json"):
        report.write_report(tmp_path)
