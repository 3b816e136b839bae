"""``predict``: the table, the pictures and the report, and everything that can be wrong with its input."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from ats_stream.io import ArchiveRow, open_pyramid
from ats_stream.predictions.folder import PredictionFolder, taken
from ats_stream.predictions.table import read_parquet
from ats_stream.workers.predict import Predictor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from ats_stream.predictions.record import SlideRecord

    Run = Callable[..., Any]

TEST_NAMES = ["test-0000", "test-0001", "test-0002"]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class Pictures(HTMLParser):
    """Checks that tags nest, and keeps the sources of pictures."""

    VOID = frozenset({"meta", "img", "source", "link", "br", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.sources += [v or "" for k, v in attributes if k == "src" and tag == "img"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_table_a_picture_of_each_image_and_a_report(
    trained: Path, table: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    done = run("predict", trained, table, "--split", "test", "--out", out)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("3 images, accuracy ")
    assert done.out.rstrip().endswith(f"{out / 'predictions.csv'}, {out / 'report.html'}")
    rows = rows_of(out)
    assert [row["label"] for row in rows] == ["0", "1", "0"]
    for row in rows:
        shares = {name: float(row[f"p_{name}"]) for name in ("0", "1")}
        assert sum(shares.values()) == pytest.approx(1, abs=2e-6)
        assert row["predicted"] == max(shares, key=shares.__getitem__)
        assert 0 < int(row["decoded_bytes"]) < int(row["full_bytes"]) == 3 * 1024 * 1024
    assert sorted(path.name for path in (out / "pictures").iterdir()) == [f"{n}.png" for n in TEST_NAMES]
    for path in (out / "pictures").iterdir():
        with Image.open(path) as picture:
            picture.load()
            assert min(picture.size) > 100
    page = Pictures()
    page.feed((out / "report.html").read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    assert len(page.sources) == 3
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    parts = {"attention", "embeddings", "patches", "pictures", "slides"}
    files = {"predict.json", "predictions.csv", "predictions.parquet", "report.html"}
    assert {path.name for path in out.iterdir()} == parts | files


def test_pyramids_without_a_table_give_the_same_probabilities(
    trained: Path, table: Path, pyramid: Path, tmp_path: Path, run: Run
) -> None:
    assert (
        run("predict", trained, table, "--split", "test", "--out", tmp_path / "a", "--pictures", "0").code
        == 0
    )
    done = run("predict", trained, pyramid, "--out", tmp_path / "b", "--pictures", "1")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("1 image; ")
    (alone,), first = rows_of(tmp_path / "b"), rows_of(tmp_path / "a")[0]
    assert {k: v for k, v in alone.items() if k[:2] == "p_"} == {
        k: v for k, v in first.items() if k[:2] == "p_"
    }
    assert alone["label"] == alone["split"] == ""
    assert not (tmp_path / "a" / "pictures").exists()
    assert "accuracy" in (tmp_path / "a" / "report.html").read_text()
    assert "accuracy" not in (tmp_path / "b" / "report.html").read_text()


def test_a_checkpoint_file_does_as_well(trained: Path, pyramid: Path, tmp_path: Path, run: Run) -> None:
    newest = max((trained / "checkpoints").iterdir())
    for name, place in (("a", trained), ("b", newest)):
        assert run("predict", place, pyramid, "--out", tmp_path / name, "--scheme", "top").code == 0
    first, second = ({**rows_of(tmp_path / name)[0], "seconds": ""} for name in "ab")
    assert first == second


def test_slides_of_one_name_get_pictures_of_their_own(
    trained: Path, pyramid: Path, tmp_path: Path, run: Run
) -> None:
    twin = tmp_path / "other" / pyramid.name
    shutil.copytree(pyramid, twin)
    assert run("predict", trained, pyramid, twin, "--out", tmp_path / "out").code == 0
    names = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert names == ["test-0000-1.png", "test-0000-2.png"]


def bad_inputs(folder: Path, trained: Path, table: Path, pyramid: Path) -> dict[str, tuple[list[Any], str]]:
    (folder / "text.pt").write_text("no checkpoint")
    torch.save({"weights": torch.zeros(2)}, folder / "foreign.pt")
    (folder / "empty").mkdir()
    cut = folder / "cut.pt"
    cut.write_bytes(max((trained / "checkpoints").iterdir()).read_bytes()[:5000])
    (folder / "label.csv").write_text(f"slide,label,split\n{pyramid},seven,test\n")
    (folder / "gone.csv").write_text("slide,label,split\ngone.ome.zarr,0,test\n")
    (folder / "a.svs").write_text("a slide")
    return {
        "no run": ([folder / "none", pyramid], "none: no such checkpoint or run folder"),
        "empty run": ([folder / "empty", pyramid], "empty: no checkpoint in"),
        "text": ([folder / "text.pt", pyramid], "text.pt: not a checkpoint, or damaged"),
        "foreign": ([folder / "foreign.pt", pyramid], "foreign.pt: checkpoint format None, expected 3"),
        "cut": ([cut, pyramid], "cut.pt: not a checkpoint, or damaged"),
        "label": ([trained, folder / "label.csv"], "label.csv:2: label 'seven' is none of 0, 1"),
        "gone": ([trained, folder / "gone.csv"], "gone.ome.zarr does not exist"),
        "slide": (
            [trained, folder / "a.svs"],
            "a.svs: not a slide: neither OpenSlide, tifffile nor Pillow knows it",
        ),
        "no pyramid": ([trained, folder / "empty"], "empty: no OME-Zarr image"),
        "split": ([trained, pyramid, "--split", "test"], "--split needs an archive table"),
        "no split": ([trained, table, "--split", "all"], "no rows of split 'all'"),
        "two tables": ([trained, table, table], "archive.csv: a table must be the only input, got 2"),
        "pictures": ([trained, pyramid, "--pictures", "-1"], "--pictures must not be negative, got -1"),
        "size": ([trained, pyramid, "--pixel-size", "0"], "--pixel-size must be positive, got 0"),
        "draws": ([trained, pyramid, "--draws", "0"], "draws must be at least 1"),
        "top draws": (
            [trained, pyramid, "--draws", "2", "--scheme", "top"],
            "draws must be at least 1, and 1 with the scheme top, got 2",
        ),
        "typo": ([trained, pyramid, folder / "typo.svs"], "typo.svs: no such file or folder"),
        "samplers": ([trained, pyramid, "--samplers", "2"], "--samplers needs --executor ray"),
        "cluster": ([trained, pyramid, "--executor", "ray", "--window", "0"], "--window must be at least 1"),
    }


CASES = ("no run", "empty run", "text", "foreign", "cut", "label", "gone", "slide", "no pyramid", "split",
         "no split", "two tables", "pictures", "size", "draws", "top draws", "typo",
         "samplers", "cluster")  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_named_in_one_line(
    case: str, trained: Path, table: Path, pyramid: Path, tmp_path: Path, run: Run
) -> None:
    cases = bad_inputs(tmp_path, trained, table, pyramid)
    assert set(cases) == set(CASES)
    words, said = cases[case]
    failed = run("predict", *words, "--out", tmp_path / "out")
    assert (failed.code, failed.out) == (2, "")
    assert said in failed.complaint
    assert not list(tmp_path.glob("out*"))


def break_level_0(pyramid: Path) -> None:
    for shard in (pyramid / "0" / "c").rglob("*"):
        if shard.is_file():
            shard.write_bytes(shard.read_bytes()[:200])


def test_an_image_that_breaks_gets_a_row_and_the_others_go_on(
    trained: Path, pyramid: Path, tmp_path: Path, run: Run
) -> None:
    broken, out = tmp_path / "broken.ome.zarr", tmp_path / "out"
    shutil.copytree(pyramid, broken)
    whole = tmp_path / "whole"
    shutil.copytree(broken / "0", whole)
    break_level_0(broken)
    failed = run("predict", trained, broken, pyramid, "--out", out)
    assert failed.code == 1
    assert failed.out.startswith("1 image, 1 failed; ")
    assert failed.complaint.startswith(f"ats-stream: failed: {broken}: level 0")
    bad, good = rows_of(out)
    assert "level 0" in bad["error"]
    assert bad["predicted"] == bad["p_0"] == good["error"] == ""
    assert not (out / "attention" / "broken.ome.zarr").exists()
    # the same command tries it again, and the other one stays done
    shutil.rmtree(broken / "0")
    shutil.copytree(whole, broken / "0")
    mended = run("predict", trained, broken, pyramid, "--out", out)
    assert (mended.code, mended.err) == (0, "")
    assert mended.out.startswith("1 of 2 images were done before\n2 images; ")
    assert rows_of(out)[1] == good
    assert rows_of(out)[0]["error"] == ""


def test_nothing_but_bad_images_is_wrong_input(
    trained: Path, pyramid: Path, tmp_path: Path, run: Run
) -> None:
    for name in ("a", "b"):
        shutil.copytree(pyramid, tmp_path / f"{name}.ome.zarr")
        break_level_0(tmp_path / f"{name}.ome.zarr")
    failed = run("predict", trained, *tmp_path.glob("*.ome.zarr"), "--out", tmp_path / "out")
    assert failed.code == 2
    assert len(failed.err.splitlines()) == 2
    assert "Predictions" in (tmp_path / "out" / "report.html").read_text()


def files_of(folder: Path) -> dict[str, bytes]:
    """All files but those that clocks have a part in."""
    clocked = ("predictions.parquet", "predictions.csv", "report.html")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "slides" and path.name not in clocked
    }


def table_without_clock(folder: Path) -> dict[str, Any]:
    columns = pyarrow.parquet.read_table(folder / "predictions.parquet").to_pydict()
    return {name: values for name, values in columns.items() if name != "seconds"}


def test_a_run_that_was_cut_off_goes_on_to_the_same_files(
    trained: Path, table: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("predict", trained, table, "--split", "test", "--draws", "3")
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(*words, "--out", whole).code == 0
    commit = PredictionFolder.commit

    def cut_off(self: PredictionFolder, record: SlideRecord) -> None:
        if record.name == TEST_NAMES[1]:
            raise KeyboardInterrupt
        commit(self, record)

    with monkeypatch.context() as patched:
        patched.setattr(PredictionFolder, "commit", cut_off)
        assert run(*words, "--out", out).code == 130
    assert not (out / "predictions.parquet").exists()
    done = run(*words, "--out", out)
    assert done.out.startswith("1 of 3 images were done before\n")
    assert files_of(out) == files_of(whole)
    assert table_without_clock(out) == table_without_clock(whole)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(*words, "--out", out).code == 0  # a whole one: not even the clock moves
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--draws", "2"), "num_draws 1, not 2"), (("--scheme", "top"), "scheme 'murthy', not 'top'")],
)
def test_a_folder_of_another_prediction_is_refused(
    trained: Path, pyramid: Path, tmp_path: Path, run: Run, words: tuple[str, ...], said: str
) -> None:
    (tmp_path / "out").mkdir()
    info = Predictor.load(trained).info(_one_row(pyramid))
    (tmp_path / "out" / "predict.json").write_text(json.dumps(info.to_dict()))
    failed = run("predict", trained, pyramid, "--out", tmp_path / "out", *words)
    assert failed.code == 2
    assert failed.complaint.endswith(f"out: holds predictions with {said}; use another folder")


def _one_row(pyramid: Path) -> tuple[ArchiveRow, ...]:
    return (ArchiveRow(slide=str(pyramid), label="", split="", line=0),)


def test_an_output_that_holds_something(trained: Path, pyramid: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    failed = run("predict", trained, pyramid, "--out", tmp_path)
    assert failed.code == 2
    assert failed.complaint.endswith(f"{tmp_path}: exists already and is not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_disk_ends_the_run_which_goes_on_later(
    trained: Path, pyramid: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        failed = run("predict", trained, pyramid, "--out", tmp_path / "out")
    assert failed.code == 1
    assert failed.complaint.endswith("No space left on device")
    assert run("predict", trained, pyramid, "--out", tmp_path / "out").code == 0


def test_ctrl_c_keeps_what_is_done(trained: Path, pyramid: Path, tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"p{number}.ome.zarr").symlink_to(pyramid)
    out = tmp_path / "out"
    words = ["predict", str(trained), *map(str, tmp_path.glob("*.ome.zarr")), "--out", str(out)]
    with subprocess.Popen(
        [sys.executable, "-m", "ats_stream.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.poll() is None and not list(out.glob("slides/*.json")):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "ats-stream: interrupted\n")
    assert 1 <= len(list(out.glob("slides/*.json"))) <= 30
    assert not (out / "predictions.parquet").exists()


def test_two_runs_do_not_write_into_one_folder(
    trained: Path, pyramid: Path, tmp_path: Path, run: Run
) -> None:
    info = Predictor.load(trained).info(_one_row(pyramid))
    with taken(tmp_path / "out", info, ["test-0000"]):
        failed = run("predict", trained, pyramid, "--out", tmp_path / "out")
    assert failed.code == 2
    assert failed.complaint.endswith("out: another run is predicting into it")


def test_each_image_gets_attention_patches_and_embeddings(
    trained: Path, pyramid: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    assert run("predict", trained, pyramid, "--out", out, "--draws", "2").code == 0
    (one,) = Predictor.load(trained).predict(_one_row(pyramid), draws=2)
    name = "test-0000"
    attention = open_pyramid(out / "attention" / f"{name}.ome.zarr").read(0)
    np.testing.assert_array_equal(attention[0], one.attention_YX)
    info, (record,) = read_parquet(out / "predictions.parquet")
    assert (info.num_draws, record.patches) == (2, one.record().patches)
    assert record.standard_error_K == one.record().standard_error_K
    boxes = json.loads((out / "patches" / f"{name}.geojson").read_bytes())["features"]
    assert len(boxes) == len(one.weight_N) == 8
    corners = {tuple(box["geometry"]["coordinates"][0][0]) for box in boxes}
    assert corners == {(x, y) for y, x in one.offsets_ND.tolist()}
    embeddings = pyarrow.parquet.read_table(out / "embeddings" / f"{name}.parquet").to_pydict()
    np.testing.assert_array_equal(np.array(embeddings["feature"], np.float32), one.features_NF)
    assert embeddings["draw"] == [0] * 4 + [1] * 4
