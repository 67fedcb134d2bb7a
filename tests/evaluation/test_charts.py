# SPDX-License-Identifier: Apache-2.0
"""Charts: axes by hand, well-formed SVG, missing values."""

import math
import xml.etree.ElementTree as xml

import pytest

from worldenv_jax.evaluation import charts


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.5, 1.0]),
        (3.0, 37.0, [0.0, 10.0, 20.0, 30.0, 40.0]),
        (-0.013, 0.021, [-0.02, -0.01, 0.0, 0.01, 0.02, 0.03]),
    ],
)
def test_ticks_are_round_and_enclose_the_data(low, high, expected):
    assert charts.nice_ticks(low, high) == pytest.approx(expected)


def test_ticks_of_a_constant():
    ticks = charts.nice_ticks(5.0, 5.0)
    assert ticks[0] < 5.0 < ticks[-1]


def test_numbers_for_people():
    assert [charts.number(value) for value in (None, math.nan, 3.0, 0.12345, 12345.6)] == [
        "–",
        "–",
        "3",
        "0.123",
        "12,346",
    ]


def test_line_chart_places_points():
    figure = charts.line_chart(
        [charts.Series("a", [0, 10], [0.0, 1.0])], title="t", y_range=(0.0, 1.0), size=(300, 170)
    )
    path = next(node for node in xml.fromstring(figure).iter("path"))
    assert path.get("d") == "M46.0 136.0L290.0 8.0"


def test_missing_values_are_left_out():
    values = [1.0, None, math.nan, 2.0]
    figure = charts.line_chart([charts.Series("a", range(4), values)], title="t")
    assert next(xml.fromstring(figure).iter("path")).get("d").count("L") == 1
    assert "no data" in charts.line_chart([charts.Series("a", [1], [None])], title="t")


def test_long_series_are_averaged():
    long = charts.Series("a", range(10_000), [float(i % 2) for i in range(10_000)])
    path = next(xml.fromstring(charts.line_chart([long], title="t")).iter("path")).get("d")
    assert path.count("L") == charts.MAX_POINTS - 1


def test_names_are_escaped():
    series = [charts.Series("<b>", [1, 2], [1, 2]), charts.Series("&", [1, 2], [2, 1], dashed=True)]
    figure = charts.line_chart(series, title='"<i>"')
    xml.fromstring(figure)
    assert "<b>" not in figure and "<i>&" not in figure


def test_interval_chart():
    rates = {"before": {"mean": 0.5, "low": 0.4, "high": 0.6, "episodes": 10}, "none": {"mean": None}}
    figure = xml.fromstring(charts.interval_chart(rates, title="t"))
    assert len(list(figure.iter("rect"))) == 1
    left, right = 110, 560 - 58
    whisker = next(node for node in figure.iter("line") if node.get("class") == "whisker")
    assert float(whisker.get("x1")) == pytest.approx(left + 0.4 * (right - left), abs=0.1)
    assert float(whisker.get("x2")) == pytest.approx(left + 0.6 * (right - left), abs=0.1)
