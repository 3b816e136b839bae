"""A small line chart as inline SVG, for learning curves.

Colours are CSS variables with values for light and dark, so the chart follows the page it stands in. All
text is escaped; the same chart gives the same bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

from ats_stream.errors import InputError

_WIDTH_PX, _PLOT_PX = 640, 244  # the whole chart, and the height between the axes' ends
_LEFT_PX, _RIGHT_PX, _BOTTOM_PX = 72, 24, 52
_LEGEND_PX = 20  # one row of the legend
_LETTER_PX = 7.2  # mean width of a letter of a label, for placing the legend
_MAX_DOTS = 40
_HUGE = 1e100  # what a float can hold but no axis can show; drawn as not finite
NUM_COLOURS = 6
_DASHES = ("", "7 4", "2 4")  # each round through the colours has its own dash


@dataclass(frozen=True, kw_only=True)
class Series:
    """One named line; a point whose x or y is not finite breaks it."""

    name: str
    """Name in the legend."""
    x: tuple[float, ...]
    """Horizontal positions."""
    y: tuple[float, ...]
    """Vertical positions, one for each x."""
    kind: Literal["line", "steps", "dots", "guide"] = "line"
    """``steps`` keep their height up to the next point, ``dots`` are not joined, a ``guide`` is dashed and
    stays in the background."""

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise InputError(f"series {self.name!r}: {len(self.x)} values of x and {len(self.y)} of y")

    @property
    def finite_points(self) -> tuple[tuple[float, float], ...]:
        """The points that can be drawn."""
        pairs = zip(self.x, self.y, strict=True)
        return tuple((x, y) for x, y in pairs if _is_drawable(x, y))


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """What a chart shows."""

    series: tuple[Series, ...]
    """The lines, in the order of the legend."""
    x_label: str
    """Name and unit of the horizontal axis."""
    y_label: str
    """Name and unit of the vertical axis."""
    from_zero: bool = False
    """Whether the vertical axis holds zero even where the lines are far from it."""


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """Ticks of one axis and the map from values to pixels."""

    ticks: tuple[float, ...]
    start_px: float
    stop_px: float

    def place(self, value: float) -> float:
        """The pixel of `value`."""
        low, high = self.ticks[0], self.ticks[-1]
        return self.start_px + (value - low) / (high - low) * (self.stop_px - self.start_px)


def ticks_for(low: float, high: float, num_wanted: int = 5) -> tuple[float, ...]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, that cover `low` to `high`.

    >>> ticks_for(0.12, 0.93)
    (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    >>> ticks_for(3, 3)
    (2.0, 3.0, 4.0)
    """
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1 / _HUGE):
        half = abs(low) * 0.01 if abs(low) > 1e3 else 1.0
        low, high = low - half, high + half
        num_wanted = 2
    rough = (high - low) / num_wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda size: abs(math.log(size / rough)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return tuple(round(index * step, decimals) + 0.0 for index in range(first, last + 1))


def render_svg(chart: LineChart) -> Markup:
    """Draw `chart` as an `<svg>` element that scales with its container; colours come from the page's style.

    A point that is not finite leaves a gap. A chart without any finite point says "no data".
    """
    points = [point for line in chart.series for point in line.finite_points]
    label = f"{chart.y_label} over {chart.x_label}"
    legend, top = _legend(chart.series)
    bottom = top + _PLOT_PX
    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            _WIDTH_PX, bottom + _BOTTOM_PX, label
        )
    ]
    if points:
        xs, ys = zip(*points, strict=True)
        low = min(0.0, *ys) if chart.from_zero else min(ys)
        x_axis = _Axis(ticks=ticks_for(min(xs), max(xs), 6), start_px=_LEFT_PX, stop_px=_WIDTH_PX - _RIGHT_PX)
        y_axis = _Axis(ticks=ticks_for(low, max(ys)), start_px=bottom, stop_px=top)
        parts += _axes(x_axis, y_axis)
        for index, line in enumerate(chart.series):
            parts += _line(index, line, x_axis, y_axis)
    else:
        parts.append(_text(_WIDTH_PX / 2, top + _PLOT_PX / 2, "no data", "middle"))
    parts += legend
    parts.append(_text((_LEFT_PX + _WIDTH_PX - _RIGHT_PX) / 2, bottom + 42, chart.x_label, "middle"))
    turn = f"translate(15 {_number(top + _PLOT_PX / 2)}) rotate(-90)"
    turned = Markup('<text class="label" transform="{}" text-anchor="middle">{}</text>')
    parts.append(turned.format(turn, chart.y_label))
    parts.append(Markup("</svg>"))
    return Markup("\n").join(parts)


def _axes(x_axis: _Axis, y_axis: _Axis) -> list[Markup]:
    parts = []
    for tick in y_axis.ticks:
        y = y_axis.place(tick)
        parts.append(_stroke("grid", _LEFT_PX, y, _WIDTH_PX - _RIGHT_PX, y))
        parts.append(_text(_LEFT_PX - 9, y + 4, _tick_text(tick), "end"))
    floor = y_axis.start_px
    parts.append(_stroke("axis", _LEFT_PX, floor, _WIDTH_PX - _RIGHT_PX, floor))
    for tick in x_axis.ticks:
        x = x_axis.place(tick)
        parts.append(_stroke("axis", x, floor, x, floor + 5))
        parts.append(_text(x, floor + 20, _tick_text(tick), "middle"))
    return parts


def _line(index: int, line: Series, x_axis: _Axis, y_axis: _Axis) -> list[Markup]:
    style = _style(index)
    path = "" if line.kind == "dots" else _path(line, x_axis, y_axis)
    if line.kind == "guide":
        return [Markup('<path class="guide" d="{}"/>').format(path)] if path else []
    parts = [Markup('<path class="line" d="{}"{}/>').format(path, style)] if path else []
    if line.kind == "dots" and len(line.finite_points) > _MAX_DOTS:
        point = Markup('<circle class="dot faint" cx="{}" cy="{}" r="2.4"{}/>')
        places = [(_number(x_axis.place(x)), _number(y_axis.place(y))) for x, y in line.finite_points]
        parts += [point.format(x, y, style) for x, y in places]
    elif line.kind != "steps" and len(line.finite_points) <= _MAX_DOTS:
        dot = Markup('<circle class="dot" cx="{}" cy="{}" r="3.2"{}><title>{}: {} at {}</title></circle>')
        parts += [
            dot.format(
                _number(x_axis.place(x)), _number(y_axis.place(y)), style, line.name, f"{y:.6g}", f"{x:.10g}"
            )
            for x, y in line.finite_points
        ]
    return parts


def _path(line: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    parts, pen = [], "M"
    for x, y in zip(line.x, line.y, strict=True):
        if not _is_drawable(x, y):
            pen = "M"
            continue
        place = _number(x_axis.place(x)), _number(y_axis.place(y))
        parts.append(
            f"H{place[0]}V{place[1]}" if line.kind == "steps" and pen == "L" else f"{pen}{' '.join(place)}"
        )
        pen = "L"
    return "".join(parts)


def _legend(series: tuple[Series, ...]) -> tuple[list[Markup], float]:
    """The legend, in as many rows as its names need, and the height where the plot may start."""
    parts, left, row = [], float(_LEFT_PX), 18.0
    for index, line in enumerate(series):
        room = 29 + _LETTER_PX * len(line.name)
        if left > _LEFT_PX and left + room > _WIDTH_PX - _RIGHT_PX:
            left, row = float(_LEFT_PX), row + _LEGEND_PX
        kind, style = ("guide", "") if line.kind == "guide" else ("line", _style(index))
        swatch = Markup('<path class="{}" d="M{} {}h22"{}/>')
        parts.append(swatch.format(kind, _number(left), _number(row), style))
        parts.append(_text(left + 29, row + 4, line.name, "start"))
        left += room + 22
    return parts, row + 26


def _style(index: int) -> Markup:
    """The colour of series `index` and, from the second round on, its dash, as attributes."""
    dash = _DASHES[index // NUM_COLOURS % len(_DASHES)]
    dashes = Markup(' stroke-dasharray="{}"').format(dash) if dash else Markup("")
    return Markup(' style="--line: var(--series-{})"{}').format(index % NUM_COLOURS, dashes)


def _stroke(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    line = Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>')
    return line.format(kind, *map(_number, (x1, y1, x2, y2)))


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    element = Markup('<text class="label" x="{}" y="{}" text-anchor="{}">{}</text>')
    return element.format(_number(x), _number(y), anchor, escape(text))


def _is_drawable(x: float, y: float) -> bool:
    return abs(x) < _HUGE and abs(y) < _HUGE  # false for NaN, too


def _tick_text(value: float) -> str:
    """A tick's value, in thousands or millions where it would not fit its place.

    >>> _tick_text(0.25), _tick_text(20000.0), _tick_text(1.5e6), _tick_text(3e-5)
    ('0.25', '20k', '1.5M', '3e-05')
    """
    if 1e4 <= abs(value) < 1e6:
        return f"{value / 1e3:.6g}k"
    return f"{value / 1e6:.6g}M" if 1e6 <= abs(value) < 1e9 else f"{value:.6g}"


def _number(value: float) -> str:
    """Pixels to a tenth, without a useless end, so files stay small and equal on every machine.

    >>> _number(12.0), _number(-0.04), _number(3.14159)
    ('12', '0', '3.1')
    """
    text = f"{round(value, 1) + 0.0:.1f}"
    return text.removesuffix(".0")
