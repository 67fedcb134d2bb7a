# SPDX-License-Identifier: Apache-2.0
"""One self-contained report.html of a run, made from whatever its workdir holds at that moment.

What is read from the workdir, all of it optional::

    summary.json                 `summary.make_summary`
    aggregate.json               rows of `summary.aggregate`, where several runs are reported together
    evaluation/<policy>.json     "success" and "per_task" rates in the true environment
    gate.json                    `GateResult.to_dict` with "simulator", "reflector" and "action_sensitivity" figures
    agreement.json               `agreement.imagination_agreement`
    metrics/<stage>.jsonl        {"step": 10, "loss": ...} per line
    pictures/*                   .png .jpg .gif .webp .mp4; pictures/captions.json: {file name: caption}
    config.json  manifest.json

The page opens from disk without a network: pictures are data URIs, charts are SVG, there is no script.
"""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from worldenv_jax import files
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.evaluation.charts import Series, interval_chart, line_chart, number
from worldenv_jax.evaluation.summary import AGGREGATE_HEADER, aggregate_cells, rate_text, result_rows
from worldenv_jax.metrics import read_json_lines

STYLE = Path(__file__).resolve().parents[1] / "assets" / "report.css"
PICTURE_BYTES = 5_500_000  # of all embedded pictures together: in base64 one third more
MEDIA_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".mp4": "video/mp4",
}
FIRST_CHARTS = 6  # of a stage; the others are folded away
PREDICTORS = {"simulator": "simulator", "copy_last_frame": "copy last frame", "no_action": "zero actions"}


@dataclass(frozen=True)
class Picture:
    """A picture or video file with the words under it."""

    name: str
    caption: str
    media_type: str
    data: bytes


@dataclass(frozen=True)
class ReportData:
    """Everything that the report shows; empty entries leave their section out."""

    title: str
    summary: Mapping[str, Any] = field(default_factory=dict)
    aggregate: Sequence[Mapping[str, Any]] = ()
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    gate: Mapping[str, Any] = field(default_factory=dict)
    agreement: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # stage -> rows
    pictures: Sequence[Picture] = ()
    left_out: Sequence[str] = ()  # names of pictures that would have made the page too large
    config: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)


def write_report(workdir: str | Path, title: str | None = None) -> Path:
    """Writes `workdir/report.html` atomically and returns its path.

    Args:
      workdir: of a run, finished or not.
      title: by default "World-Env in JAX: " and the preset's name.

    Raises:
      WorldEnvError: the workdir does not exist, or one of its files cannot be read.
    """
    path = Path(workdir) / "report.html"
    files.write_text(path, render_report(load_report_data(workdir, title)))
    return path


def load_report_data(workdir: str | Path, title: str | None = None) -> ReportData:
    """Collects what the workdir holds (see the module's docstring).

    Raises:
      WorldEnvError: the workdir does not exist, or one of its files cannot be read.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise WorldEnvError(f"there is no run to report: {workdir} is not a folder")
    config = _optional_json(workdir / "config.json", {})
    pictures, left_out = _load_pictures(workdir / "pictures")
    return ReportData(
        title=title or f"World-Env in JAX: {config.get('preset', workdir.resolve().name)}",
        summary=_optional_json(workdir / "summary.json", {}),
        aggregate=_optional_json(workdir / "aggregate.json", []),
        evaluations={path.stem: files.read_json(path) for path in sorted((workdir / "evaluation").glob("*.json"))},
        gate=_optional_json(workdir / "gate.json", {}),
        agreement=_optional_json(workdir / "agreement.json", {}),
        metrics={path.stem: read_json_lines(path) for path in _oldest_first(workdir / "metrics")},
        pictures=pictures,
        left_out=left_out,
        config=config,
        manifest=_optional_json(workdir / "manifest.json", {}),
    )


def render_report(data: ReportData) -> str:
    """The whole page."""
    sections = {
        "Result": _result_section(data),
        "Seeds and variants": _aggregate_section(data.aggregate),
        "Pictures": _picture_section(data),
        "Gate": _gate_section(data.gate),
        "Simulator": _simulator_section(data.gate),
        "Reflector": _reflector_section(data.gate.get("reflector", {})),
        "Imagination agreement": _agreement_section(data.agreement),
        "Learning curves": _curve_section(data.metrics),
        "Tasks": _task_section(data.evaluations),
        "Configuration": _configuration_section(data),
    }
    shown = {name: body for name, body in sections.items() if body}
    links = "".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in shown)
    bodies = "".join(f'<section id="{_anchor(name)}"><h2>{name}</h2>{body}</section>' for name, body in shown.items())
    style = STYLE.read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(data.title)}</title><style>\n{style}</style></head>\n<body><main>"
        f'<header><h1>{html.escape(data.title)}</h1><p class="muted">{_subtitle(data)}</p><nav>{links}</nav></header>'
        f"{_tiles(data)}{bodies}</main></body></html>\n"
    )


def _subtitle(data: ReportData) -> str:
    starts = data.manifest.get("starts") or [{}]
    facts = {
        "seed": data.summary.get("seed", data.config.get("seed")),
        "protocol": data.summary.get("protocol_hash"),
        "commit": (starts[-1].get("git_commit") or "")[:10],
        "device": starts[-1].get("device"),
        "started": starts[0].get("time"),
    }
    known = [f"{name} {html.escape(str(fact))}" for name, fact in facts.items() if fact not in (None, "")]
    return " · ".join(known)


def _tiles(data: ReportData) -> str:
    """The figures that a reader looks for first."""
    tiles = []
    if data.summary:
        before, after = data.summary["success_before"], data.summary["success_after"]
        for name, rate in (("before", before), ("after", after)):
            tiles.append(_tile(f"success {name}", _percent(rate), f"{rate['episodes']} episodes"))
        if before.get("mean") is not None and after.get("mean") is not None:
            change = 100.0 * (after["mean"] - before["mean"])
            tiles.append(_tile("difference", f"{change:+.1f}", "points, after minus before", _kind(change > 0)))
        memory = f"{data.summary['peak_rss_bytes'] / 2**30:.2f} GiB peak memory"
        tiles.append(_tile("time", _duration(data.summary["seconds"]), memory))
    if data.gate:
        failed = sum(not row["passed"] for row in data.gate["rows"])
        words = f"{len(data.gate['rows']) - failed} of {len(data.gate['rows'])} checks"
        tiles.append(_tile("gate", "pass" if data.gate["passed"] else "fail", words, _kind(data.gate["passed"])))
    if data.agreement:
        rate = data.agreement["agreement"]
        tiles.append(_tile("imagination agrees", _percent(rate), f"{rate['episodes']} replayed trajectories"))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _result_section(data: ReportData) -> str:
    if not data.summary:
        return ""
    summary = data.summary
    rates = {"before": summary["success_before"], "after": summary["success_after"]}
    chart = interval_chart(rates, title="Success in the true environment, 95 % Wilson intervals")
    rows = [(name.strip(), value) for name, value in result_rows(summary)]
    times = [row for row in rows if row[0].startswith("seconds") or row[0] == "peak memory"]
    scores = [row for row in rows if row not in times]
    return f'{chart}<div class="columns">{_table(scores)}{_table(times)}</div>'


def _aggregate_section(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    note = "<p>Rates are pooled over the seeds' episodes; differences are in points.</p>"
    return note + _table(aggregate_cells(rows), AGGREGATE_HEADER)


def _task_section(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    measured = {name: result["per_task"] for name, result in evaluations.items() if result.get("per_task")}
    if not measured:
        return ""
    count = max(len(rates) for rates in measured.values())
    rows = []
    for task in range(count):
        cells = [_task_cell(rates[task]) if task < len(rates) else "–" for rates in measured.values()]
        rows.append((str(task), *cells))
    return _table(rows, ("task", *measured))


def _task_cell(rate: Mapping[str, Any]) -> str:
    errors = rate.get("errors", 0)
    return rate_text(rate) + (f", {errors} could not be run" if errors else "")


def _gate_section(gate: Mapping[str, Any]) -> str:
    if not gate:
        return ""
    verdict = "Every check passed." if gate["passed"] else "Post-training is refused unless the gate is overridden."
    rows = [
        (
            html.escape(row["name"]),
            f"{number(row['figure'])}{row['unit']}",
            f"{'≥' if row['at_least'] else '≤'} {row['threshold']:g}{row['unit']}",
            _badge(row["passed"]),
        )
        for row in gate["rows"]
    ]
    note = f"<p>Held-out episodes, over the horizon that post-training uses. {verdict}</p>"
    return note + _table(rows, ("check", "measured", "threshold", "result"), escape=False, wide=1)


def _simulator_section(gate: Mapping[str, Any]) -> str:
    figures = gate.get("simulator", {})
    if not figures:
        return ""
    rows, charts = [], []
    for outcome, predictors in figures.items():
        for name, score in predictors.items():
            cells = [number(score[part]) for part in ("psnr", "ssim", "drift")]
            rows.append((f"{outcome} episodes", PREDICTORS.get(name, name), *cells, str(score["episodes"])))
        for part, label in (("psnr", "PSNR in dB"), ("ssim", "SSIM")):
            lines = [
                Series(
                    words, range(1, len(predictors[name][f"{part}_per_step"]) + 1), predictors[name][f"{part}_per_step"]
                )
                for name, words in PREDICTORS.items()
                if name in predictors
            ]
            title = f"{label}, {outcome} episodes"
            charts.append(line_chart(lines, title=title, x_label="horizon step", size=(440, 210)))
    header = ("episodes", "predictor", "PSNR, dB", "SSIM", "drift, dB/step", "count")
    sensitivity = gate.get("action_sensitivity", {})
    note = ""
    if sensitivity.get("preference") is not None:
        note = (
            f"<p>Action sensitivity: other actions change the predicted frames by {number(sensitivity['change'])} grey "
            f"levels (RMS); the recorded actions' future is the nearer one in {100 * sensitivity['preference']:.1f} % "
            "of the steps.</p>"
        )
    drift = [value for value in gate.get("proprioception", {}).get("position", []) if value is not None]
    if drift:
        note += (
            f"<p>The hand, advanced from actions alone, is {1000 * drift[0]:.1f} mm from where it was after one chunk, "
            f"{1000 * drift[-1]:.1f} mm after {len(drift)}.</p>"
        )
    return f'{note}<div class="pair">{"".join(charts)}</div>{_table(rows, header)}'


def _reflector_section(figures: Mapping[str, Any]) -> str:
    """Scalars as a table with one column per kind of frames."""
    if not figures:
        return ""
    names = [name for kind in figures.values() for name, value in kind.items() if isinstance(value, int | float)]
    rows = [
        (name.replace("_", " "), *(number(kind.get(name)) for kind in figures.values()))
        for name in dict.fromkeys(names)
    ]
    charts = []
    for kind, judge in figures.items():
        if "sweep" in judge:
            reliability, sweep = judge["reliability"], judge["sweep"]
            lines = [
                Series("judged", reliability["probability"], reliability["share"]),
                Series("perfect", (0, 1), (0, 1), dashed=True),
            ]
            title = f"reliability, {kind} frames: share of successes"
            charts.append(line_chart(lines, title=title, x_label="R", y_range=(0, 1), size=(440, 210)))
            rates = {"false_positive_rate": "false positives", "false_negative_rate": "false negatives"}
            lines = [Series(words, sweep["threshold"], sweep[name]) for name, words in rates.items()]
            title = f"false-positive and false-negative rate, {kind} frames"
            charts.append(line_chart(lines, title=title, x_label="threshold η", y_range=(0, 1), size=(440, 210)))
    table = _table(rows, ("figure", *(f"{kind} frames" for kind in figures)))
    return f'<div class="pair">{"".join(charts)}</div>{table}'


def _agreement_section(agreement: Mapping[str, Any]) -> str:
    if not agreement:
        return ""
    names = {
        "agreement": "verdict and outcome agree",
        "false_successes": "imagined successes that the world denies",
        "false_failures": "imagined failures that the world denies",
        "imagined_success": "success in imagination",
        "true_success": "success of the same actions in the world",
    }
    rows = [(words, rate_text(agreement[name]), str(agreement[name]["episodes"])) for name, words in names.items()]
    counts = agreement["counts"]
    cases = [
        ("imagined success", str(counts["both_success"]), str(counts["false_success"])),
        ("imagined failure", str(counts["false_failure"]), str(counts["both_failure"])),
    ]
    phi = agreement["correlation"]
    note = (
        "<p>The actions of imagined trajectories, replayed in the true environment from the same starts. Independent "
        f"outcomes at these rates would agree in {agreement['by_chance']:.0%}; correlation of verdict and outcome: "
        f"{'undefined' if phi is None else f'{phi:.2f}'} (0: imagination teaches nothing).</p>"
    )
    table = _table(rows, ("share", "95 % interval", "of"), wide=1)
    return f'{note}<div class="columns">{table}{_table(cases, ("counts", "true success", "true failure"))}</div>'


def _picture_section(data: ReportData) -> str:
    if not data.pictures:
        return ""
    legend = (
        "<p>Green border: given to the model. Red: imagined. Blue: the trajectory ends here. Yellow: the reflector's "
        "success probability, dashed its threshold; green bar: true success.</p>"
    )
    figures = "".join(_picture(picture) for picture in data.pictures)
    more = ""
    if data.left_out:
        more = f'<p class="muted">In the pictures folder, too large for this page: {_escape_list(data.left_out)}.</p>'
    return f'{legend}<div class="pictures">{figures}</div>{more}'


def _picture(picture: Picture) -> str:
    uri = f"data:{picture.media_type};base64,{base64.b64encode(picture.data).decode()}"
    caption = html.escape(picture.caption)
    if picture.media_type.startswith("video"):
        return f'<figure><figcaption>{caption}</figcaption><video controls loop muted src="{uri}"></video></figure>'
    with Image.open(BytesIO(picture.data)) as image:
        width, height = image.size
    kind = ' class="full"' if width > 2 * height else ""
    picture_tag = f'<img alt="{caption}" width="{width}" height="{height}" src="{uri}">'
    return f"<figure{kind}><figcaption>{caption}</figcaption>{picture_tag}</figure>"


def _curve_section(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    parts = []
    for stage, rows in metrics.items():
        names = [name for row in rows for name in row if name not in ("step", "time")]
        charts = [
            line_chart([Series(name, [row["step"] for row in rows], [row.get(name) for row in rows])], title=name)
            for name in dict.fromkeys(names)
        ]
        if not charts:
            continue
        parts.append(f"<h3>{html.escape(stage)}</h3>{_charts(charts[:FIRST_CHARTS])}")
        if rest := charts[FIRST_CHARTS:]:
            parts.append(f"<details><summary>{len(rest)} more</summary>{_charts(rest)}</details>")
    return "".join(parts)


def _configuration_section(data: ReportData) -> str:
    parts = []
    for name, content in (("config.json", data.config), ("manifest.json", data.manifest)):
        if content:
            text = html.escape(json.dumps(content, indent=2))
            parts.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    return "".join(parts)


def _charts(charts: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>'


def _table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), *, escape: bool = True, wide: int = 0) -> str:
    """A table; the first `wide` columns may break their lines."""

    def line(tag: str, cells: Sequence[str], escape: bool) -> str:
        text = [html.escape(cell) if escape else cell for cell in cells]
        kinds = [' class="words"' if column < wide else "" for column in range(len(text))]
        return "<tr>" + "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, text)) + "</tr>"

    head = f"<thead>{line('th', header, True)}</thead>" if header else ""
    body = "".join(line("td", row, escape) for row in rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _tile(name: str, value: str, note: str, kind: str = "") -> str:
    return f'<div class="tile"><span class="name">{name}</span><b class="{kind}">{value}</b><small>{note}</small></div>'


def _badge(passed: bool) -> str:
    return f'<span class="badge {_kind(passed)}">{"pass" if passed else "fail"}</span>'


def _kind(good: bool) -> str:
    return "good" if good else "bad"


def _percent(rate: Mapping[str, Any]) -> str:
    return "–" if rate.get("mean") is None else f"{100.0 * rate['mean']:.1f} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _escape_list(names: Sequence[str]) -> str:
    return html.escape(", ".join(names))


def _optional_json(path: Path, default: Any) -> Any:
    return files.read_json(path) if path.is_file() else default


def _oldest_first(folder: Path) -> list[Path]:
    """Curves in the order in which their stages began."""
    first_time = lambda path: next((row.get("time", 0.0) for row in read_json_lines(path)), 0.0)
    return sorted(folder.glob("*.jsonl"), key=lambda path: (first_time(path), path.name))


def _load_pictures(folder: Path) -> tuple[list[Picture], list[str]]:
    """Pictures in the order of captions.json, then by name, as long as their bytes fit; and names of the others."""
    captions = _optional_json(folder / "captions.json", {})
    present = sorted(path.name for path in folder.glob("*") if path.suffix in MEDIA_TYPES and path.name[0] != ".")
    order = [name for name in captions if name in present] + [name for name in present if name not in captions]
    pictures, left_out, used = [], [], 0
    for name in order:
        data = (folder / name).read_bytes()
        if used + len(data) > PICTURE_BYTES:
            left_out.append(name)
            continue
        used += len(data)
        pictures.append(Picture(name, captions.get(name, name), MEDIA_TYPES[Path(name).suffix], data))
    return pictures, left_out
