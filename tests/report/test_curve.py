"""Line charts: ticks are round and cover the data, points land where the axes say, names are escaped."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ats_stream.errors import InputError
from ats_stream.report.curve import NUM_COLOURS, LineChart, Series, render_svg, ticks_for

NAN = float("nan")


def chart_of(*series: Series, **changes: object) -> LineChart:
    return LineChart(series=series, x_label="epoch", y_label="loss", **changes)  # type: ignore[arg-type]


def points_of(svg: str) -> list[tuple[float, float]]:
    return [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in ET.fromstring(svg).iter("circle")]


def tick_texts(svg: str, anchor: str) -> list[str]:
    found = [
        element.text or ""
        for element in ET.fromstring(svg).iter("text")
        if element.get("text-anchor") == anchor
    ]
    return [text for text in found if re.fullmatch(r"-?[\d.]+(e-?\d+)?[kM]?", text)]


@given(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30))
def test_ticks_cover_the_data_at_equal_steps(first: float, second: float) -> None:
    low, high = min(first, second), max(first, second)
    ticks = ticks_for(low, high)
    step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    assert 2 <= len(ticks) <= 12
    assert ticks[0] <= low + 1e-6 * step
    assert ticks[-1] >= high - 1e-6 * step
    assert all(math.isclose(b - a, step, rel_tol=1e-3) for a, b in itertools.pairwise(ticks))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, (0, 0.2, 0.4, 0.6, 0.8, 1)),
        (0, 30, (0, 5, 10, 15, 20, 25, 30)),
        (-1, 1, (-1, -0.5, 0, 0.5, 1)),
        (0.5, 0.5, (-1, 0, 1, 2)),
        (5000, 5000, (4950, 5000, 5050)),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: tuple[float, ...]) -> None:
    assert ticks_for(low, high) == expected


def test_points_land_where_the_axes_say() -> None:
    svg = render_svg(chart_of(Series(name="a", x=(0, 5, 10), y=(0.0, 1.0, 0.5))))
    (x0, y0), (x1, y1), (x2, y2) = points_of(svg)
    assert x0 < x1 < x2
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)  # places are rounded to a tenth
    assert y1 < y2 < y0  # up is less
    assert y0 - y2 == pytest.approx(y2 - y1, abs=0.11)
    path = ET.fromstring(svg).find("path[@d]")
    assert path is not None
    assert path.attrib["d"] == f"M{x0:g} {y0:g}L{x1:g} {y1:g}L{x2:g} {y2:g}"


def test_from_zero_widens_the_axis() -> None:
    line = Series(name="a", x=(0, 1), y=(90.0, 100.0))
    assert "0" not in tick_texts(render_svg(chart_of(line)), "end")
    assert "0" in tick_texts(render_svg(chart_of(line, from_zero=True)), "end")


def test_a_point_that_is_not_finite_breaks_the_line() -> None:
    svg = render_svg(chart_of(Series(name="a", x=(0, 1, 2, 3, 4), y=(1, 2, NAN, 3, 1e300))))
    path = ET.fromstring(svg).find("path[@d]")
    assert path is not None
    assert re.sub("[^ML]", "", path.attrib["d"]) == "MLM"
    assert len(points_of(svg)) == 3


@pytest.mark.parametrize(
    "series", [(), (Series(name="a", x=(), y=()),), (Series(name="a", x=(0,), y=(NAN,)),)]
)
def test_without_data_it_says_so(series: tuple[Series, ...]) -> None:
    assert "no data" in render_svg(chart_of(*series))


def test_every_series_differs_in_colour_or_dash_and_is_named() -> None:
    lines = [Series(name=f"line {index} <&>", x=(0, 1), y=(index, 1)) for index in range(3 * NUM_COLOURS)]
    root = ET.fromstring(render_svg(chart_of(*lines)))
    paths = [element for element in root.iter("path") if "L" in element.attrib["d"]]
    looks = {(path.attrib["style"], path.get("stroke-dasharray")) for path in paths}
    assert len(looks) == len(lines)
    texts = [element.text for element in root.iter("text")]
    assert [text for text in texts if text and text.startswith("line")] == [line.name for line in lines]
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for element in root.iter("text"):
        if element.get("x"):
            assert 0 <= float(element.attrib["x"]) <= width
            assert 0 <= float(element.attrib["y"]) <= height


@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=6), st.text(max_size=20), st.booleans())
def test_any_numbers_and_names_give_well_formed_finite_svg(
    points: list[tuple[float, float]], name: str, from_zero: bool
) -> None:
    name = "".join(letter for letter in name if letter.isprintable())
    line = Series(name=name, x=tuple(x for x, _ in points), y=tuple(y for _, y in points))
    svg = render_svg(chart_of(line, from_zero=from_zero))
    places = points_of(svg)
    assert len(places) == len(line.finite_points)
    assert all(0 <= x <= 640 and 0 <= y <= 400 for x, y in places)


def test_lengths_must_agree() -> None:
    with pytest.raises(InputError, match="series 'a': 2 values of x and 1 of y"):
        Series(name="a", x=(1, 2), y=(1,))


def paths_of(svg: str, kind: str) -> list[str]:
    """Paths of a class without the samples of the legend, which are horizontal strokes."""
    found = [p.attrib["d"] for p in ET.fromstring(svg).iter("path") if p.get("class") == kind]
    return [d for d in found if not re.fullmatch(r"M\S+ \S+h22", d)]


def test_steps_hold_their_height_dots_are_not_joined_guides_have_no_dots() -> None:
    points = {"x": (0.0, 1.0, 2.0), "y": (1.0, 0.5, 0.25)}
    (line,) = paths_of(render_svg(chart_of(Series(name="a", **points))), "line")
    (steps,) = paths_of(render_svg(chart_of(Series(name="a", kind="steps", **points))), "line")
    places = re.findall(r"[ML](\S+?) ([\d.]+)", line)
    first, *others = places
    assert steps == f"M{first[0]} {first[1]}" + "".join(f"H{x}V{y}" for x, y in others)
    dots = render_svg(chart_of(Series(name="a", kind="dots", **points)))
    assert paths_of(dots, "line") == []
    assert len(points_of(dots)) == 3
    guide = render_svg(chart_of(Series(name="a", kind="guide", **points)))
    assert paths_of(guide, "guide") == [line]
    assert points_of(guide) == []


def test_many_dots_stay_and_stay_small() -> None:
    x = tuple(float(n) for n in range(1000))
    svg = render_svg(chart_of(Series(name="a", kind="dots", x=x, y=x)))
    assert len(points_of(svg)) == 1000
    assert len(svg) < 100_000
