# SPDX-License-Identifier: Apache-2.0
"""The end of a run in numbers: success rates with intervals, summary.json, the table on the console, many runs as one.

A success rate is always stated as {"mean", "low", "high", "episodes"} with a 95 % Wilson interval, beside the hash of
the protocol that it was measured by.
"""

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldenv_jax import files
from worldenv_jax.envs.protocol import wilson_interval

Z_95 = 1.959964


def success_rate(successes: int, trials: int) -> dict[str, Any]:
    """A share with its 95 % Wilson interval: {"mean", "low", "high", "episodes"}; null numbers without trials."""
    successes, trials = int(successes), int(trials)
    if trials == 0:
        return {"mean": None, "low": None, "high": None, "episodes": 0}
    low, high = wilson_interval(successes, trials)
    return {"mean": successes / trials, "low": low, "high": high, "episodes": trials}


def paired_comparison(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Two policies on the same episodes.

    Args:
      before: bool [N], success of the first policy on each episode.
      after: bool [N], of the second.

    Returns:
      "gained", "lost" and "same" counts; the "difference" of the rates with its 95 % interval "low", "high" (adjusted
      Wald interval, Bonett & Price, Statistics in Medicine 31, 2012); "p_value" of McNemar's exact two-sided test.

    Raises:
      ValueError: the shapes differ or are not [N].
    """
    before, after = np.asarray(before, bool), np.asarray(after, bool)
    if before.shape != after.shape or before.ndim != 1 or before.size == 0:
        raise ValueError(f"paired outcomes must both be [N], got {list(before.shape)} and {list(after.shape)}")
    number = before.size
    gained, lost = int((~before & after).sum()), int((before & ~after).sum())
    share_gained, share_lost = (gained + 1) / (number + 2), (lost + 1) / (number + 2)
    centre = share_gained - share_lost
    half = Z_95 * math.sqrt((share_gained + share_lost - centre**2) / (number + 2))
    discordant = gained + lost
    tail = sum(math.comb(discordant, k) for k in range(min(gained, lost) + 1)) / 2**discordant
    return {
        "gained": gained,
        "lost": lost,
        "same": number - discordant,
        "difference": (gained - lost) / number,
        "low": max(-1.0, centre - half),
        "high": min(1.0, centre + half),
        "p_value": min(1.0, 2.0 * tail),
    }


def peak_rss_bytes() -> int:
    """The largest resident set so far of this process or of one of its ended children."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def make_summary(
    *,
    success_before: Mapping[str, Any],
    success_after: Mapping[str, Any],
    stages: Mapping[str, float],
    config: Mapping[str, Any],
    seed: int,
    protocol_hash: str,
    peak_rss: int,
    **extra: Any,
) -> dict[str, Any]:
    """The content of summary.json.

    Args:
      success_before: of the cloned policy, as `success_rate` returns it.
      success_after: of the post-trained policy.
      stages: stage -> seconds; "seconds" of the summary is their sum.
      config: the experiment's configuration as a nested dict.
      seed: of the run.
      protocol_hash: of the evaluation.
      peak_rss: bytes.
      extra: further JSON-able entries; "variant" names an ablation, "paired" holds a `paired_comparison`.
    """
    return {
        "success_before": dict(success_before),
        "success_after": dict(success_after),
        "stages": dict(stages),
        "seconds": float(sum(stages.values())),
        "peak_rss_bytes": int(peak_rss),
        "seed": seed,
        "protocol_hash": protocol_hash,
        **extra,
        "config": dict(config),
    }


def write_summary(workdir: str | Path, summary: Mapping[str, Any]) -> Path:
    """Writes `workdir/summary.json` atomically and returns its path."""
    path = Path(workdir) / "summary.json"
    files.write_json(path, summary)
    return path


def rate_text(rate: Mapping[str, Any]) -> str:
    """For example "63.0 % [56.1, 69.4]"; "not measured" without episodes."""
    if rate.get("mean") is None:
        return "not measured"
    mean, low, high = (100.0 * rate[name] for name in ("mean", "low", "high"))
    return f"{mean:.1f} % [{low:.1f}, {high:.1f}]"


def paired_text(paired: Mapping[str, Any]) -> str:
    """For example "gained 9, lost 2: +3.5 points [-0.1, +7.0], p = 0.065" of a `paired_comparison`."""
    difference, low, high = (100.0 * paired[name] for name in ("difference", "low", "high"))
    counts = f"gained {paired['gained']}, lost {paired['lost']}"
    return f"{counts}: {difference:+.1f} points [{low:+.1f}, {high:+.1f}], p = {paired['p_value']:.2g}"


def result_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) rows of the end table: success, episodes, protocol, seconds per stage, peak memory."""
    before, after = summary["success_before"], summary["success_after"]
    rows = [("success before", rate_text(before)), ("success after", rate_text(after))]
    if before.get("mean") is not None and after.get("mean") is not None:
        rows.append(("difference", f"{100.0 * (after['mean'] - before['mean']):+.1f} points"))
    if "paired" in summary:
        rows.append(("  paired, 95 %", paired_text(summary["paired"])))
    rows.append(("episodes", f"{before['episodes']} before, {after['episodes']} after"))
    rows.append(("protocol", str(summary["protocol_hash"])))
    rows += [(f"seconds, {name}", f"{seconds:.1f}") for name, seconds in summary["stages"].items()]
    rows.append(("seconds, total", f"{summary['seconds']:.1f}"))
    rows.append(("peak memory", f"{summary['peak_rss_bytes'] / 2**30:.2f} GiB"))
    return rows


def summary_table(summary: Mapping[str, Any]) -> str:
    """The end table for the console."""
    return align_columns(result_rows(summary))


def aggregate(summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs over several seeds and variants as one row per variant, in order of appearance.

    Args:
      summaries: contents of summary.json files; the entry "variant" (default "full") names the ablation, "refused"
        (default False) says that the gate refused and "after" is "before".

    Returns:
      Rows {"variant", "seeds", "refused" (those seeds), "before", "after", "difference", "difference_per_seed",
      "apart"}: mean rates over the seeds, with Wilson intervals for the starts of one run, which all seeds share;
      "apart" says that the interval after lies above the one before.

    Raises:
      ValueError: runs measured by different protocols, which must not be pooled.
    """
    hashes = sorted({str(summary["protocol_hash"]) for summary in summaries})
    if len(hashes) > 1:
        raise ValueError(f"scores by different protocols cannot be compared: got {', '.join(hashes)}")
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for summary in summaries:
        groups.setdefault(summary.get("variant", "full"), []).append(summary)
    return [_aggregate_variant(variant, runs) for variant, runs in groups.items()]


def aggregate_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `aggregate` for the console."""
    return align_columns(aggregate_cells(rows), header=AGGREGATE_HEADER)


AGGREGATE_HEADER = ("variant", "seeds", "before", "after", "difference", "per seed", "intervals apart")


def aggregate_cells(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of `aggregate` as text, one cell per entry of AGGREGATE_HEADER."""
    return [
        (
            row["variant"],
            ", ".join(str(seed) for seed in row["seeds"]),
            rate_text(row["before"]),
            rate_text(row["after"]),
            f"{100.0 * row['difference']:+.1f}",
            ", ".join(
                "refused" if seed in row["refused"] else f"{100.0 * value:+.1f}"
                for seed, value in zip(row["seeds"], row["difference_per_seed"])
            ),
            "yes" if row["apart"] else "no",
        )
        for row in rows
    ]


def align_columns(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Left-aligned columns separated by two spaces; a header is underlined."""
    lines = [list(row) for row in ([header] if header else []) + list(rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    if header:
        lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _aggregate_variant(variant: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    before, after = _pool([run["success_before"] for run in runs]), _pool([run["success_after"] for run in runs])
    return {
        "variant": variant,
        "seeds": [run["seed"] for run in runs],
        "refused": [run["seed"] for run in runs if run.get("refused")],
        "before": before,
        "after": after,
        "difference": after["mean"] - before["mean"],
        "difference_per_seed": [run["success_after"]["mean"] - run["success_before"]["mean"] for run in runs],
        "apart": after["low"] > before["high"],
    }


def _pool(rates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean rate; every seed is tested on the same starts, so the interval is as wide as that of one run."""
    episodes = min(rate["episodes"] for rate in rates)
    mean = float(np.mean([rate["mean"] for rate in rates]))
    low, high = wilson_interval(mean * episodes, episodes)
    return {"mean": mean, "low": low, "high": high, "episodes": sum(rate["episodes"] for rate in rates)}
