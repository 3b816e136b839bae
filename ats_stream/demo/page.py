"""The demo's report: what was converted, how the model learned, what it looked at, and the controls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ats_stream.io import open_pyramid
from ats_stream.report.curve import LineChart, Series
from ats_stream.report.merits import Judged
from ats_stream.report.page import Figure, Page, Section, Table, write_page
from ats_stream.report.panels import merit_section, task_sections
from ats_stream.report.predictions import THUMBNAIL_PX, Pixels, accuracy, slide_figure
from ats_stream.workers.metrics import read_metrics

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from ats_stream.predictions.record import PredictionInfo
    from ats_stream.workers.predict import Predicted


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the parts of the demo gave."""

    slide: Path
    """The converted slide."""
    slide_summary: str
    runs: dict[str, Path]
    """Run folders of the main model (``attention``) and of the control (``uniform``)."""
    info: PredictionInfo
    predictions: list[Predicted]
    """The main model on the test images."""
    shown: list[tuple[Predicted, npt.NDArray[Any]]]
    """Predictions to draw, with thumbnails (C, y, x)."""
    control_uniform: float
    control_low_resolution: float

    @property
    def accuracy(self) -> float:
        """Accuracy of the main model on the test images."""
        share = accuracy(one.is_right for one in self.predictions)
        return float("nan") if share is None else share


def write_report(path: Path, result: DemoResult) -> Path:
    """Write the report as one HTML file."""
    sections = (
        _result_section(result),
        _curves_section(result),
        *_prediction_sections(result),
        _slide_section(result),
    )
    page = Page(
        title="ats-stream demo",
        subtitle="Attention sampling on large images of handwritten digits, and a real slide as a pyramid",
        sections=sections,
    )
    return write_page(path, page)


def _result_section(result: DemoResult) -> Section:
    first = result.predictions[0]
    side = " x ".join(str(n) for n in first.full_shape[1:])
    rows = (
        ("patches drawn where attention looks", f"{result.accuracy:.3f}"),
        ("patches drawn uniformly over the mask", f"{result.control_uniform:.3f}"),
        ("the low-resolution view alone", f"{result.control_low_resolution:.3f}"),
    )
    return Section(
        heading="Result",
        text=(
            f"Each image has {side} pixels. A few amber plates carry digits that decide its class; "
            "blue plates carry clutter. The low-resolution view shows which plates are amber, not what "
            "they show. Three models with the same feature network and head, trained alike:"
        ),
        table=Table(header=("looks at", "test accuracy"), rows=rows),
    )


def _curves_section(result: DemoResult) -> Section:
    series = [_learning_curve(name, run) for name, run in result.runs.items()]
    chart = LineChart(
        series=tuple(series), x_label="epoch", y_label="accuracy on validation images", from_zero=True
    )
    return Section(heading="Learning", figures=(Figure(content=chart),))


def _learning_curve(name: str, run: Path) -> Series:
    records = [record for record in read_metrics(run) if record["phase"] == "val"]
    epochs = tuple(float(record["epoch"]) for record in records)
    return Series(name=name, x=epochs, y=tuple(record["accuracy"] for record in records))


def pixels_of(one: Predicted, thumbnail_CYX: npt.NDArray[Any]) -> Pixels:
    """What the picture of a prediction is made of."""
    return Pixels(thumbnail_CYX=thumbnail_CYX, attention_YX=one.attention_YX, crops_NCPP=one.crops_NCPP)


def _prediction_sections(result: DemoResult) -> tuple[Section, ...]:
    records = [one.record() for one in result.predictions]
    judged = Judged.of(result.info, records)
    figures = tuple(
        slide_figure(
            result.info,
            one.record(),
            pixels_of(one, thumbnail),
            f"{one.name}: predicted {one.predicted}, label {one.label}",
        )
        for one, thumbnail in result.shown
    )
    return (
        merit_section(result.info, records, judged),
        *task_sections(judged),
        Section(heading="What the model looked at", figures=figures),
    )


def _slide_section(result: DemoResult) -> Section:
    pyramid = open_pyramid(result.slide)
    thumbnail_YXC = np.moveaxis(pyramid.thumbnail(THUMBNAIL_PX), 0, -1)
    figures = [
        Figure(content=Image.fromarray(thumbnail_YXC), caption=pyramid.name, encoding="jpeg", narrow=True)
    ]
    if "tissue" in pyramid.label_names:
        mask_YX = pyramid.label("tissue").read(0)[0] != 0
        size = (thumbnail_YXC.shape[1], thumbnail_YXC.shape[0])
        mask = Image.fromarray((mask_YX * 255).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        figures.append(Figure(content=mask, caption="labels/tissue", narrow=True))
    levels = tuple(
        (level.index, " x ".join(str(n) for n in level.shape), f"{max(level.downsample):g}")
        for level in pyramid.levels
    )
    return Section(
        heading="The slide as a pyramid",
        text=result.slide_summary,
        figures=tuple(figures),
        table=Table(header=("level", "shape (c, y, x)", "downsample"), rows=levels),
    )
