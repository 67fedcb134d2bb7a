# SPDX-License-Identifier: Apache-2.0
"""Small SVG charts for the report: they follow the page's light or dark colours, scale, and need no script.

Colours come from the style sheet: series i has the class `s<i>`.
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

MAX_POINTS = 300  # a longer series is averaged in bins


class Series(NamedTuple):
    """One line: positions and values of one length; values that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


class _Frame(NamedTuple):
    """Maps data to pixels."""

    left: float
    right: float
    top: float
    bottom: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        across = (x - x0) / (x1 - x0)
        up = (y - y0) / (y1 - y0)
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "step",
    y_range: tuple[float, float] | None = None,
    size: tuple[int, int] = (300, 170),
) -> str:
    """Lines over a common axis; a legend when there is more than one series.

    Args:
      series: at most six.
      title: above the chart.
      x_label: below the chart.
      y_range: limits of the vertical axis; by default those of the data.
      size: width and height of the view box in pixels.

    Returns:
      A `<figure>`; with the words "no data" where no series has a finite value.
    """
    lines = [line for line in (_finite_points(one) for one in series) if line.x]
    caption = f"<figcaption>{html.escape(title)}{_legend(lines)}</figcaption>"
    if not lines:
        return f'<figure class="chart">{caption}<p class="muted">no data</p></figure>'
    width, height = size
    xs, ys = np.concatenate([line.x for line in lines]), np.concatenate([line.y for line in lines])
    y_ticks = nice_ticks(*(y_range or (ys.min(), ys.max())))
    x_range = (xs.min(), xs.max()) if xs.max() > xs.min() else (xs.min() - 0.5, xs.min() + 0.5)
    frame = _Frame(46, width - 10, 8, height - 34, x_range, y_range or (y_ticks[0], y_ticks[-1]))
    parts = [_grid(frame, y_ticks, x_label)]
    for index, line in enumerate(lines):
        points = [frame.at(x, y) for x, y in zip(line.x, line.y)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        style = ' stroke-dasharray="5 4"' if line.dashed else ""
        parts.append(f'<path class="line s{index}" d="{path}"{style}><title>{html.escape(line.name)}</title></path>')
        x, y = points[-1]
        label = f"{line.name}: {number(line.y[-1])} at {number(line.x[-1])}"
        parts.append(f'<circle class="dot s{index}" cx="{x:.1f}" cy="{y:.1f}" r="3">')
        parts.append(f"<title>{html.escape(label)}</title></circle>")
    return f'<figure class="chart">{caption}{_svg(size, parts, title)}</figure>'


def interval_chart(rates: Mapping[str, Mapping[str, Any]], *, title: str) -> str:
    """Shares with 95 % intervals as horizontal bars with whiskers.

    Args:
      rates: name -> {"mean", "low", "high", "episodes"} as `summary.success_rate` returns it.
      title: above the chart.
    """
    measured = {name: rate for name, rate in rates.items() if rate.get("mean") is not None}
    row_height, width, left = 34, 560, 110
    size = (width, row_height * len(measured) + 30)
    frame = _Frame(left, width - 58, 6, size[1] - 24, (0.0, 1.0), (0.0, 1.0))
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = frame.at(tick, 0.0)[0]
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" y2="{frame.bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{size[1] - 8}" text-anchor="middle">{100 * tick:.0f} %</text>')
    for row, (name, rate) in enumerate(measured.items()):
        middle = frame.top + row_height * (row + 0.5)
        low, mean, high = (frame.at(rate[part], 0.0)[0] for part in ("low", "mean", "high"))
        parts.append(f'<text x="{left - 10}" y="{middle + 4}" text-anchor="end">{html.escape(name)}</text>')
        parts.append(
            f'<rect class="bar s{row % 6}" x="{left}" y="{middle - 9}" width="{mean - left:.1f}" height="18" rx="3"/>'
        )
        parts.append(f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>')
        for x in (low, high):
            parts.append(f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{middle - 5}" y2="{middle + 5}"/>')
        parts.append(f'<text x="{width - 50}" y="{middle + 4}">{100 * rate["mean"]:.1f} %</text>')
    return (
        f'<figure class="chart wide"><figcaption>{html.escape(title)}</figcaption>{_svg(size, parts, title)}</figure>'
    )


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high]; about `count` steps."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float | None) -> str:
    """A number for people: three significant digits, or whole with separators from 1000 on; "–" for null."""
    if value is None or not math.isfinite(value):
        return "–"
    if (float(value).is_integer() or abs(value) >= 1000) and abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _finite_points(series: Series) -> Series:
    """Without missing values, and averaged in bins where there are more than MAX_POINTS."""
    pairs = [(x, y) for x, y in zip(series.x, series.y) if y is not None and math.isfinite(y)]
    points = np.array(pairs, float).reshape(-1, 2)
    if len(points) > MAX_POINTS:
        points = np.array([part.mean(0) for part in np.array_split(points, MAX_POINTS)])
    return series._replace(x=points[:, 0].tolist(), y=points[:, 1].tolist())


def _legend(lines: Sequence[Series]) -> str:
    if len(lines) < 2:
        return ""
    keys = "".join(f'<span><i class="key s{i}"></i>{html.escape(line.name)}</span>' for i, line in enumerate(lines))
    return f'<span class="legend">{keys}</span>'


def _grid(frame: _Frame, y_ticks: Sequence[float], x_label: str) -> str:
    parts = []
    for tick in y_ticks:
        if frame.y_range[0] <= tick <= frame.y_range[1]:
            y = frame.at(frame.x_range[0], tick)[1]
            parts.append(f'<line class="grid" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{frame.left - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    y = frame.bottom + 15
    low, high = frame.x_range
    parts.append(f'<text x="{frame.left}" y="{y}">{number(low)}</text>')
    parts.append(f'<text x="{frame.right}" y="{y}" text-anchor="end">{number(high)}</text>')
    middle = (frame.left + frame.right) / 2
    parts.append(f'<text x="{middle}" y="{y}" text-anchor="middle">{html.escape(x_label)}</text>')
    return "".join(parts)


def _svg(size: tuple[int, int], parts: Sequence[str], title: str) -> str:
    return f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
