"""Sections of a report on predictions: merits, curves of each task, what was read, what was skipped.

Shape letters: B images, K values of the head.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ats_stream.report.curve import LineChart, Series
from ats_stream.report.merits import merits, resamples_for
from ats_stream.report.page import Figure, Section, Table
from ats_stream.report.statistics import LEVEL, NUM_RESAMPLES, calibration, roc_points, survival_curve

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from ats_stream.predictions.record import PredictionInfo, SlideRecord
    from ats_stream.report.merits import Judged

MAX_CURVES = 6
MAX_POINTS = 1500  # of a chart; more would only make the file large
MAX_BAD_ROWS = 100
_CHANCE = Series(name="chance", x=(0.0, 1.0), y=(0.0, 1.0), kind="guide")
_IDEAL = Series(name="ideal", x=(0.0, 1.0), y=(0.0, 1.0), kind="guide")

Cell = str | int | float | None


def merit_section(
    info: PredictionInfo,
    records: Sequence[SlideRecord],
    judged: Judged,
    *,
    num_resamples: int = NUM_RESAMPLES,
) -> Section:
    """How many images, how good, how much was read."""
    good = [one for one in records if not one.is_bad]
    num_resamples = resamples_for(judged, num_resamples)
    found = merits(judged, num_resamples=num_resamples)
    facts: list[tuple[str, str | int | float]] = [("images", len(good))]
    if len(records) > len(good):
        facts.append(("images that could not be read", len(records) - len(good)))
    if found:
        facts.append((found[0][0], str(found[0][1])))
    if good:
        share = float(np.mean([one.read_share for one in good]))
        facts.append(("pixels of full resolution read, per image", f"{share:.3%}"))
    rows: list[tuple[Cell, ...]] = [(name, str(one)) for name, one in found]
    how = f"{info.num_draws} draws" if info.num_draws > 1 else "1 draw"
    text = f"{info.task}, {how} of {info.num_patches} patches ({info.scheme})."
    if found:
        unit = "groups" if judged.groups else "images"
        text += (
            f"\n\nOf {len(judged)} images with a label. In brackets the interval that holds {LEVEL:.0%} of "
            f"{num_resamples} resamples of the {unit} with replacement (percentile bootstrap)."
        )
    table = Table(header=("", f"value ({LEVEL:.0%} interval)"), rows=tuple(rows)) if rows else None
    return Section(heading="Predictions", text=text, key_values=tuple(facts), table=table)


def task_sections(judged: Judged) -> tuple[Section, ...]:
    """What belongs to the task: curves and confusion, or scatter; nothing without labels."""
    if not len(judged):
        return ()
    if judged.info.task == "regression":
        return (_regression_section(judged),)
    if judged.info.task == "survival":
        return (_survival_section(judged),)
    sections = [_roc_section(judged), _calibration_section(judged)]
    if judged.info.task == "classification":
        sections.append(_confusion_section(judged))
    return tuple(section for section in sections if section is not None)


def confusion_table(judged: Judged) -> Table:
    """How often each label was predicted as each class, and the share of each label that was right."""
    classes = judged.info.outputs
    counts = Counter((one.label, one.predicted) for one in judged.records)
    totals = Counter(one.label for one in judged.records)
    rows: list[tuple[Cell, ...]] = []
    for label in classes:
        share = f"{counts[label, label] / totals[label]:.1%}" if totals[label] else None
        rows.append((label, *(counts[label, guess] for guess in classes), share))
    return Table(header=("label", *(f"predicted {name}" for name in classes), "right"), rows=tuple(rows))


def read_section(info: PredictionInfo, records: Sequence[SlideRecord]) -> Section | None:
    """Where bytes and time went: least, middle and most of the images."""
    good = [one for one in records if not one.is_bad]
    if not good:
        return None
    kinds: dict[str, list[float]] = {
        "megapixels of the image": [one.height * one.width / 1e6 for one in good],
        "share of pixels read": [one.read_share for one in good],
        "megabytes fetched": [one.stored_bytes / 1e6 for one in good],
        "megabytes decoded": [one.decoded_bytes / 1e6 for one in good],
        "seconds to read, attend and draw": [one.seconds for one in good],
    }
    if info.num_draws > 1:
        kinds["standard error of the draws, mean over outputs"] = [
            float(np.mean(one.standard_error_K)) for one in good if one.standard_error_K
        ]
    rows: list[tuple[Cell, ...]] = []
    for name, values in kinds.items():
        least, middle, most = (float(v) for v in np.quantile(values, [0, 0.5, 1])) if values else (None,) * 3
        rows.append((name, least, middle, most, float(np.sum(values)) if "share" not in name else None))
    return Section(
        heading="What was read",
        table=Table(header=("", "least", "median", "most", "sum"), rows=tuple(rows)),
    )


def skipped_section(bad: Sequence[tuple[str, str]]) -> Section | None:
    """Images (name, reason) that were left out; None if there are none."""
    if not bad:
        return None
    reasons = Counter(reason for _, reason in bad)
    more = f" The first {MAX_BAD_ROWS} are shown." if len(bad) > MAX_BAD_ROWS else ""
    return Section(
        heading="What was skipped and why",
        text=f"{_counted(len(bad), 'image')}, {_counted(len(reasons), 'reason')}.{more}",
        table=Table(header=("image", "reason"), rows=tuple(bad[:MAX_BAD_ROWS])),
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _curves(judged: Judged) -> list[tuple[str, npt.NDArray[Any], npt.NDArray[Any]]]:
    """(class, score, is positive) of each curve; of two exclusive classes one says it all."""
    values, targets = judged.values, judged.targets
    numbers = range(len(judged.info.outputs))
    if judged.info.task == "classification" and len(numbers) == 2:
        numbers = range(1, 2)
    found = [(judged.info.outputs[k], values[:, k], targets[:, k]) for k in numbers]
    return [(name, score, of) for name, score, of in found if of.any() and not of.all()][:MAX_CURVES]


def _roc_section(judged: Judged) -> Section | None:
    series = []
    for name, score, is_positive in _curves(judged):
        false, true = roc_points(score, is_positive)
        area = float(np.trapezoid(true, false))
        x, y = _thinned(false, true)
        series.append(Series(name=f"{name} ({area:.3f})", x=x, y=y))
    if not series:
        return None
    chart = LineChart(
        series=(*series, _CHANCE), x_label="false positive rate", y_label="true positive rate", from_zero=True
    )
    return Section(
        heading="ROC",
        text="Each class against the rest; in brackets the area under its curve.",
        figures=(Figure(content=chart),),
    )


def _calibration_section(judged: Judged) -> Section | None:
    series, errors = [], []
    for name, score, is_true in _curves(judged):
        bins = calibration(score, is_true)
        errors.append(f"{name} {bins.error:.3f}")
        series.append(Series(name=name, x=bins.predicted, y=bins.observed))
    if not series:
        return None
    chart = LineChart(
        series=(*series, _IDEAL),
        x_label="predicted probability, mean of the bin",
        y_label="share that is true",
        from_zero=True,
    )
    return Section(
        heading="Calibration",
        text=f"Ten bins of equal width; expected calibration error: {', '.join(errors)}.",
        figures=(Figure(content=chart),),
    )


def _confusion_section(judged: Judged) -> Section:
    return Section(heading="Confusion", table=confusion_table(judged))


def _regression_section(judged: Judged) -> Section:
    label, value = judged.targets[:, 0], judged.values[:, 0]
    low, high = float(min(label.min(), value.min())), float(max(label.max(), value.max()))
    x, y = _thinned(label, value)
    chart = LineChart(
        series=(
            Series(name="images", x=x, y=y, kind="dots"),
            Series(name="equal", x=(low, high), y=(low, high), kind="guide"),
        ),
        x_label="label",
        y_label="predicted",
    )
    return Section(heading="Predicted and true", figures=(Figure(content=chart),))


def _survival_section(judged: Judged) -> Section:
    risk, time, event = judged.values[:, 0], judged.times, judged.targets[:, 0] > 0.5
    is_high = risk > np.median(risk)
    halves = []
    for name, of in (("higher risk", is_high), ("lower risk", ~is_high)):
        if of.any():
            moments, share = survival_curve(time[of], event[of])
            last = float(time[of].max())
            x, y = _thinned(np.r_[moments, last], np.r_[share, share[-1]])
            halves.append(Series(name=f"{name} ({int(of.sum())})", x=x, y=y, kind="steps"))
    curves = LineChart(series=tuple(halves), x_label="time", y_label="without an event", from_zero=True)
    dots = []
    for name, of in (("event", event), ("censored", ~event)):
        x, y = _thinned(time[of], risk[of])
        dots.append(Series(name=name, x=x, y=y, kind="dots"))
    scatter = LineChart(series=tuple(dots), x_label="time", y_label=judged.info.outputs[0])
    return Section(
        heading="Survival",
        text="Kaplan-Meier curves of the halves above and below the median risk, and the risk of each image.",
        figures=(Figure(content=curves), Figure(content=scatter)),
    )


def _thinned(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """At most MAX_POINTS points, evenly taken, the first and the last among them."""
    if len(x) > MAX_POINTS:
        kept = np.linspace(0, len(x) - 1, MAX_POINTS).round().astype(np.int64)
        x, y = x[kept], y[kept]
    return tuple(x.tolist()), tuple(y.tolist())
