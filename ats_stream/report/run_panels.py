"""Sections of a report on a training: how it learned, how it drew, where the time went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ats_stream.report.curve import LineChart, Series
from ats_stream.report.page import Figure, Section, Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Record = Mapping[str, Any]

PHASES = {"train": "training", "val": "validation"}
# numbers of the metrics, what they are called, and what the chart's axis says
SCORES = {
    "accuracy": "accuracy",
    "auroc": "area under ROC",
    "concordance": "concordance",
    "r2": "variance explained",
    "mae": "mean absolute error",
}


def summary_section(records: Sequence[Record]) -> Section:
    """Epochs, steps, the last validation, and how long it took."""
    facts: list[tuple[str, str | int | float]] = []
    train, val = _of(records, "train"), _of(records, "val")
    if train:
        facts.append(("epochs", int(train[-1]["epoch"])))
        facts.append(("steps", int(train[-1]["step"])))
    facts += [
        (f"validation {text}", f"{val[-1][name]:.3f}")
        for name, text in SCORES.items()
        if val and name in val[-1]
    ][:2]
    seconds = sum(float(one.get("seconds", 0.0)) for one in train)
    if seconds:
        facts.append(("training time", _duration(seconds)))
    return Section(heading="Training", key_values=tuple(facts))


def settings_section(config: Mapping[str, Any]) -> Section | None:
    """All settings; None if they are not known."""
    rows = tuple(
        (part, name, _shown(value))
        for part, values in config.items()
        if isinstance(values, dict)
        for name, value in values.items()
    )
    if not rows:
        return None
    return Section(heading="Settings", table=Table(header=("part", "setting", "value"), rows=rows))


def learning_section(records: Sequence[Record]) -> Section | None:
    """Loss and scores over the epochs."""
    charts = [_chart(records, {"loss": "loss"}, "loss")]
    charts += [_chart(records, {name: text}, text, from_zero=name != "r2") for name, text in SCORES.items()]
    charts.append(_chart(records, {"lr": "learning rate"}, "learning rate", from_zero=True))
    return _section("Learning", "", charts)


def drawing_section(records: Sequence[Record]) -> Section | None:
    """Sampled mass, effective sample size, staleness and entropy of the attention."""
    shares = {"effective_share": "effective sample size, of N", "sampled_mass": "attention on drawn patches"}
    text = (
        "Attention that is older than the one that trains draws patches that count for less: the effective "
        "sample size says how many fresh ones they are worth, as a share of those drawn."
    )
    return _section(
        "Drawing",
        text,
        [
            _chart(records, shares, "share", from_zero=True),
            _chart(records, {"staleness": "staleness"}, "steps behind, mean", from_zero=True),
            _chart(records, {"entropy": "entropy of attention"}, "nats"),
        ],
    )


def time_section(records: Sequence[Record]) -> Section | None:
    """Speed, waiting and bytes."""
    train = _of(records, "train")
    rows: list[tuple[str | float, ...]] = []
    seconds = sum(float(one.get("seconds", 0.0)) for one in train)
    timed = [one for one in train if "wait_share" in one and "seconds" in one]
    if timed:
        waited = sum(one["wait_share"] * one["seconds"] for one in timed)
        rows += [("waiting for patches", waited), ("computing", seconds - waited)]
    charts = [
        _chart(train, {"wait_share": "waiting for patches"}, "share of the time", from_zero=True),
        _chart(train, {"images_per_s": "images"}, "images / s", from_zero=True),
        _chart(train, {"sampler_s": "reading and drawing"}, "seconds an image, of a sampler", from_zero=True),
        _chart(
            [{**one, **_megabytes(one)} for one in train],
            {"stored_mb": "fetched", "decoded_mb": "decoded"},
            "megabytes an image",
            from_zero=True,
        ),
    ]
    section = _section("Where the time went", "", charts)
    if section is None or not rows:
        return section
    table = Table(header=("", "seconds"), rows=tuple(rows))
    return Section(heading=section.heading, figures=section.figures, table=table)


def missing_section(missing: Sequence[str]) -> Section | None:
    """What should be there and is not; None if all is."""
    if not missing:
        return None
    return Section(heading="What is missing", table=Table(header=("",), rows=tuple((m,) for m in missing)))


def _of(records: Sequence[Record], phase: str) -> list[Record]:
    return [one for one in records if one.get("phase") == phase]


def _chart(
    records: Sequence[Record], names: Mapping[str, str], label: str, *, from_zero: bool = False
) -> LineChart | None:
    """Lines of some numbers over the epochs, one for each phase that has them."""
    series = []
    for phase, phase_name in PHASES.items():
        for name, text in names.items():
            points = [one for one in _of(records, phase) if _is_number(one.get(name)) and "epoch" in one]
            if points:
                alone = len(names) == 1 and label != "learning rate"
                series.append(
                    Series(
                        name=phase_name if alone else text,
                        x=tuple(float(one["epoch"]) for one in points),
                        y=tuple(float(one[name]) for one in points),
                    )
                )
    if not series:
        return None
    return LineChart(series=tuple(series), x_label="epoch", y_label=label, from_zero=from_zero)


def _section(heading: str, text: str, charts: Sequence[LineChart | None]) -> Section | None:
    figures = tuple(Figure(content=chart, narrow=True) for chart in charts if chart is not None)
    return Section(heading=heading, text=text, figures=figures) if figures else None


def _megabytes(record: Record) -> dict[str, float]:
    names = {"stored_bytes": "stored_mb", "decoded_bytes": "decoded_mb"}
    return {new: record[old] / 1e6 for old, new in names.items() if _is_number(record.get(old))}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: object) -> str:
    return "none" if value is None else str(value)


def _duration(seconds: float) -> str:
    """Seconds as a reader wants them.

    >>> _duration(42.3), _duration(3725)
    ('42 s', '1 h 02 min')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
