"""Panels of predictions: every task has its own, and none is a crash for want of labels or images."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ats_stream.predictions.record import Patches, PredictionInfo, SlideRecord
from ats_stream.report import panels
from ats_stream.report.curve import LineChart
from ats_stream.report.merits import Judged, merits, resamples_for
from ats_stream.report.page import Page, render_page
from ats_stream.report.slides import ranking
from ats_stream.report.statistics import calibration

if TYPE_CHECKING:
    from ats_stream.report.page import Section

NUM = 40
OUTPUTS = {
    "classification": ("a", "b", "c"),
    "multilabel": ("x", "y"),
    "regression": ("value",),
    "survival": ("log hazard ratio",),
}


def info(task: str) -> PredictionInfo:
    return PredictionInfo(
        model="m", images="i", num_images=NUM, task=task, outputs=OUTPUTS[task], scheme="murthy", num_draws=1,
        num_patches=2,
    )  # fmt: skip


def record(task: str, number: int, rng: np.random.Generator) -> SlideRecord:
    """A slide whose label the values tell, more or less."""
    noise = rng.random(3)
    facts: dict[str, Any] = {"label": "", "value_K": (), "predicted": ""}
    if task == "classification":
        label = number % 3
        values = (np.eye(3)[label] + noise) / (1 + noise.sum())
        best = "abc"[int(values.argmax())]
        facts = {"label": "abc"[label], "value_K": tuple(values.tolist()), "predicted": best}
    elif task == "multilabel":
        names = [name for name, bit in (("x", 1), ("y", 2)) if number % 4 & bit]
        values = tuple(0.4 * (name in names) + 0.6 * n for name, n in zip("xy", noise, strict=False))
        answer = ";".join(n for n, v in zip("xy", values, strict=True) if v > 0.5)
        facts = {"label": ";".join(names), "value_K": values, "predicted": answer}
    elif task == "regression":
        facts = {"label": str(number / 4), "value_K": (number / 4 + noise[0],), "predicted": "1"}
    else:
        facts = {"label": str(number % 2), "value_K": (noise[0],), "time": 1.0 + noise[1], "predicted": "1"}
    right = set(facts["label"].split(";")) == set(facts["predicted"].split(";"))
    patches = Patches(draw=(0,), y=(0,), x=(0,), attention=(1.0,), weight=(1.0,))
    return SlideRecord(
        slide=f"/s/{number}", name=f"s{number}", right=right, height=100, width=100, patch_px=8,
        full_bytes=30_000, decoded_bytes=300, patches=patches, **facts,
    )  # fmt: skip


def records(task: str) -> list[SlideRecord]:
    rng = np.random.default_rng(5)
    return [record(task, number, rng) for number in range(NUM)]


def sections(task: str, given: list[SlideRecord]) -> list[Section]:
    about = info(task)
    judged = Judged.of(about, given)
    found = [
        panels.merit_section(about, given, judged, num_resamples=50),
        *panels.task_sections(judged),
        panels.read_section(about, given),
        panels.skipped_section([(one.slide, one.error) for one in given if one.is_bad]),
    ]
    kept = [section for section in found if section is not None]
    render_page(Page(title="t", sections=tuple(kept)))
    return kept


def headings(found: list[Section]) -> list[str]:
    return [section.heading for section in found]


def charts(found: list[Section], heading: str) -> list[LineChart]:
    (section,) = (one for one in found if one.heading == heading)
    return [figure.content for figure in section.figures if isinstance(figure.content, LineChart)]


EXPECTED = {
    "classification": ["Predictions", "ROC", "Calibration", "Confusion", "What was read"],
    "multilabel": ["Predictions", "ROC", "Calibration", "What was read"],
    "regression": ["Predictions", "Predicted and true", "What was read"],
    "survival": ["Predictions", "Survival", "What was read"],
}


@pytest.mark.parametrize("task", OUTPUTS)
def test_each_task_has_its_panels(task: str) -> None:
    given = records(task)
    assert headings(sections(task, given)) == EXPECTED[task]
    unlabelled = [replace(one, label="", right=None, time=None) for one in given]
    assert headings(sections(task, unlabelled)) == ["Predictions", "What was read"]
    bad = SlideRecord(slide="/s/bad", name="bad", label="a", error="truncated")
    assert headings(sections(task, [*given, bad]))[-1] == "What was skipped and why"
    assert headings(sections(task, [bad])) == ["Predictions", "What was skipped and why"]
    assert headings(sections(task, [])) == ["Predictions"]


@pytest.mark.parametrize("task", OUTPUTS)
@pytest.mark.parametrize("num", [1, 2, 3])
def test_few_images_are_no_trouble(task: str, num: int) -> None:
    assert headings(sections(task, records(task)[:num]))[0] == "Predictions"


def test_merits_of_classes_are_their_definitions() -> None:
    given = records("classification")
    found = dict(merits(Judged.of(info("classification"), given), num_resamples=20))
    right = np.array([one.label == one.predicted for one in given])
    assert found["accuracy"].value == pytest.approx(right.mean())
    of_label = [one.value_K["abc".index(one.label)] for one in given]
    assert found["log loss (nats)"].value == pytest.approx(-np.log(of_label).mean())
    areas = []
    for k, name in enumerate("abc"):
        score = np.array([one.value_K[k] for one in given])
        of = np.array([one.label == name for one in given])
        areas.append((score[of][:, None] > score[~of]).mean())
    (area,) = (one for name, one in found.items() if name.startswith("area"))
    assert area.value == pytest.approx(np.mean(areas))
    assert all(one.low <= one.value <= one.high for one in found.values())


def test_the_confusion_table_counts_every_image_once() -> None:
    given = records("classification")
    table = panels.confusion_table(Judged.of(info("classification"), given))
    assert table.header == ("label", "predicted a", "predicted b", "predicted c", "right")
    counts = np.array([row[1:4] for row in table.rows], int)
    assert counts.sum() == NUM
    assert np.trace(counts) == sum(one.label == one.predicted for one in given)


def test_curves_show_what_their_numbers_say() -> None:
    given = records("multilabel")
    found = sections("multilabel", given)
    (roc,) = charts(found, "ROC")
    assert [line.kind for line in roc.series] == ["line", "line", "guide"]
    for name, line in zip("xy", roc.series[:2], strict=True):
        assert line.name.startswith(f"{name} (")
        area = float(np.trapezoid(line.y, line.x))
        assert line.name == f"{name} ({area:.3f})"
    (bins,) = charts(found, "Calibration")
    of_x = calibration(
        np.array([one.value_K[0] for one in given if one.label]),
        np.array(["x" in one.label for one in given if one.label]),
    )
    assert (bins.series[0].x, bins.series[0].y) == (of_x.predicted, of_x.observed)


def test_survival_curves_start_at_1_and_never_rise() -> None:
    curves, scatter = charts(sections("survival", records("survival")), "Survival")
    for line in curves.series:
        assert line.kind == "steps"
        assert line.y[0] == 1
        assert (np.diff(line.y) <= 0).all()
    assert sum(len(line.x) for line in scatter.series) == NUM


def test_long_curves_are_thinned() -> None:
    many = [replace(one, label=str(n)) for n, one in enumerate(records("regression") * 100)]
    (chart,) = charts(sections("regression", many), "Predicted and true")
    assert len(chart.series[0].x) == panels.MAX_POINTS
    assert (chart.series[0].x[0], chart.series[0].x[-1]) == (0.0, 3999.0)


def test_labels_that_the_model_does_not_know_are_not_judged() -> None:
    given = [*records("classification"), replace(records("classification")[0], label="unknown")]
    assert len(Judged.of(info("classification"), given)) == NUM
    numbers = [replace(one, label="high") for one in records("regression")]
    assert len(Judged.of(info("regression"), numbers)) == 0


def test_the_worst_images_are_those_of_the_greatest_loss() -> None:
    given = records("classification")
    about = info("classification")
    names, ranked = ranking(about, given, Judged.of(about, given))
    assert names == ("Best images", "Worst images")
    chances = [one.value_K["abc".index(one.label)] for one, _ in ranked]
    assert chances == sorted(chances, reverse=True)
    assert ranked[-1][1].endswith(f"log loss {-np.log(chances[-1]):.3g}")


def test_images_without_labels_are_ranked_by_certainty() -> None:
    given = [replace(one, label="") for one in records("classification")]
    about = info("classification")
    names, ranked = ranking(about, given, Judged.of(about, given))
    assert names == ("Most certain images", "Least certain images")
    certainty = [np.abs(np.array(one.value_K) - 0.5).mean() for one, _ in ranked]
    assert certainty == sorted(certainty, reverse=True)


def test_groups_are_resampled_whole_and_pairs_are_bounded() -> None:
    grouped = [replace(one, group=f"p{n // 8}") for n, one in enumerate(records("survival"))]
    judged = Judged.of(info("survival"), grouped)
    (alone,), (together,) = merits(Judged.of(info("survival"), records("survival"))), merits(judged)
    assert alone[1].value == together[1].value
    assert (alone[1].low, alone[1].high) != (together[1].low, together[1].high)
    assert resamples_for(judged) == 1000
    assert "resamples of the groups" in sections("survival", grouped)[0].text
