"""``predict``: the table, the pictures and the report, and everything that can be wrong with its input."""

from __future__ import annotations

import csv
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

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
        "foreign": ([folder / "foreign.pt", pyramid], "foreign.pt: checkpoint format None, expected 2"),
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
        "samplers": ([trained, pyramid, "--samplers", "2"], "--samplers needs --executor ray"),
        "cluster": ([trained, pyramid, "--executor", "ray", "--window", "0"], "--window must be at least 1"),
    }


CASES = ("no run", "empty run", "text", "foreign", "cut", "label", "gone", "slide", "no pyramid", "split",
         "no split", "two tables", "pictures", "samplers", "cluster")  # fmt: skip


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


def test_an_image_that_breaks_on_the_way_leaves_nothing(
    trained: Path, pyramid: Path, tmp_path: Path, run: Run
) -> None:
    broken = tmp_path / "broken.ome.zarr"
    shutil.copytree(pyramid, broken)
    for shard in (broken / "0" / "c").rglob("*"):
        if shard.is_file():
            shard.write_bytes(shard.read_bytes()[:200])
    failed = run("predict", trained, pyramid, broken, "--out", tmp_path / "out")
    assert failed.code == 2
    assert failed.complaint.startswith(f"ats-stream: error: {broken}: level 0: ")
    assert not list(tmp_path.glob("out*"))


def test_an_output_that_holds_something(trained: Path, pyramid: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    failed = run("predict", trained, pyramid, "--out", tmp_path)
    assert failed.code == 2
    assert failed.complaint.endswith(f"{tmp_path}: exists already and is not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_disk_leaves_nothing(
    trained: Path, pyramid: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    failed = run("predict", trained, pyramid, "--out", tmp_path / "out")
    assert failed.code == 1
    assert "test-0000.png" in failed.complaint
    assert failed.complaint.endswith("No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(trained: Path, pyramid: Path, tmp_path: Path) -> None:
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
        while process.poll() is None and not list(tmp_path.glob("out.partial-*/pictures/*.png")):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "ats-stream: interrupted\n")
    assert not list(tmp_path.glob("out*"))
