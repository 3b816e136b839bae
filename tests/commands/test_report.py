"""``report``: one page of a training and of predictions, whole or half-written, without a request."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING

import pytest

from ats_stream.report.statistics import NUM_RESAMPLES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    Run = Callable[..., Any]


@pytest.fixture(scope="module")
def predicted(trained: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ats_stream.cli import main

    out = tmp_path_factory.mktemp("report") / "found"
    assert main(["predict", str(trained), str(table), "--out", str(out), "--draws", "2"]) == 0
    return out


def headings(page: Path) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page.read_text(encoding="utf-8"))


def assert_self_contained(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert not re.findall(r"\b(?:src|href|srcset)=\"(?!data:image/)", text)
    assert not re.findall(r"url\(|@import", text)
    assert "default-src 'none'" in text


def test_a_page_of_a_training_and_its_predictions(
    trained: Path, predicted: Path, tmp_path: Path, run: Run
) -> None:
    page = tmp_path / "page.html"
    done = run("report", trained, predicted, "--out", page, "--title", "Both & more")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{page}: {page.stat().st_size / 1e6:.1f} MB\n"
    assert headings(page) == [
        *("Training", "Learning", "Drawing", "Where the time went", "Settings"),
        *("Predictions", "ROC", "Calibration", "Confusion", "Best images", "Worst images", "What was read"),
    ]
    assert_self_contained(page)
    text = page.read_text(encoding="utf-8")
    assert "<title>Both &amp; more</title>" in text
    assert f"95% of {NUM_RESAMPLES} resamples of the images" in text
    # nine images: five best, four worst, each once, light and dark
    assert text.count("<figcaption>train-0") + text.count("<figcaption>val-0") == 6
    assert text.count("<img ") == text.count("<source ") == 9
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_the_same_folders_give_the_same_bytes(predicted: Path, tmp_path: Path, run: Run) -> None:
    for name in "ab":
        assert run("report", predicted, "--out", tmp_path / name, "--title", "t").code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_without_the_slides_the_pictures_of_the_prediction_are_shown(
    predicted: Path, tmp_path: Path, run: Run
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(predicted, moved)
    for place in (moved / "slides").iterdir():
        record = json.loads(place.read_bytes())
        place.write_text(json.dumps({**record, "slide": "/nowhere/gone.ome.zarr"}))
    assert run("report", moved, "--slides", "2").code == 0
    text = (moved / "report.html").read_text(encoding="utf-8")
    assert (text.count("<img "), text.count("<source ")) == (4, 0)
    shutil.rmtree(moved / "pictures")
    assert run("report", moved, "--slides", "2").code == 0
    text = (moved / "report.html").read_text(encoding="utf-8")
    assert "There is no picture of 2 of them, and their slides cannot be read." in text


def test_predictions_that_were_cut_off(predicted: Path, tmp_path: Path, run: Run) -> None:
    half = tmp_path / "half"
    shutil.copytree(predicted, half)
    (half / "predictions.parquet").unlink()
    records = sorted((half / "slides").iterdir())
    records[0].unlink()
    records[1].write_bytes(records[1].read_bytes()[:50])
    assert run("report", half, "--slides", "0").code == 0
    assert headings(half / "report.html")[:2] == ["What is missing", "Predictions"]
    assert "2 of 9 images" in (half / "report.html").read_text(encoding="utf-8")


def test_a_training_that_was_cut_off(trained: Path, tmp_path: Path, run: Run) -> None:
    half = tmp_path / "half"
    half.mkdir()
    lines = (trained / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (half / "metrics.jsonl").write_bytes(lines[0] + lines[1][:20])
    shutil.copy(trained / "config.yaml", half)
    assert run("report", half).code == 0
    text = (half / "report.html").read_text(encoding="utf-8")
    assert "epochs: 1 of 2 are done" in text
    assert "checkpoints/: there is none to go on from" in text
    (half / "metrics.jsonl").unlink()
    (half / "config.yaml").write_bytes(b"model: [")
    assert run("report", half).code == 0
    assert headings(half / "report.html") == ["What is missing", "Training"]
    text = (half / "report.html").read_text(encoding="utf-8")
    assert "metrics.jsonl: no epoch is done" in text
    assert "config.yaml: the settings" in text


def test_what_training_skipped_is_told_once(trained: Path, tmp_path: Path, run: Run) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    ledger = copy / "ledger.jsonl"
    first = json.loads(ledger.read_bytes().splitlines()[0])
    bad = {**first, "slide": "/s/broken.svs", "bad": "truncated at byte 512"}
    with ledger.open("a") as file:
        file.write("".join(json.dumps(bad, separators=(",", ":")) + "\n" for _ in range(3)))
    assert run("report", copy).code == 0
    text = (copy / "report.html").read_text(encoding="utf-8")
    assert "1 image, 1 reason." in text
    assert text.count("/s/broken.svs") == text.count("truncated at byte 512") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("none",), "none: no such folder"),
        (("empty",), "empty: neither the folder of a training nor of predictions"),
        (("empty", "--slides", "-1"), "--slides must not be negative, got -1"),
        (("damaged",), "predict.json: is not what predict writes"),
    ],
)
def test_bad_input_is_named_in_one_line(
    words: tuple[str, ...], said: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "predict.json").write_text("{}")
    failed = run("report", *words)
    assert (failed.code, failed.out) == (2, "")
    assert said in failed.complaint
    assert not list(tmp_path.rglob("report.html"))
