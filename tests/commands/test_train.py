"""``train``: from a table to a run folder, and everything that can be wrong with what it is given."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tifffile
import yaml

from ats_stream.commands.train import EpochLines
from ats_stream.io import write_archive
from ats_stream.io.reduce import halve
from ats_stream.workers.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Run = Callable[..., Any]

QUICK = ("--patches", "4", "--patch-px", "32", "--prior", "foreground", "--batch-size", "4", "--epochs", "2")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "tensorboard" not in path.parts
    }


def test_a_slide_of_tissue_trains_out_of_the_box(slide_path: Path, tmp_path: Path, run: Run) -> None:
    names = [f"{split}.svs" for split in ("train", "val")]
    for name in names:
        (tmp_path / name).symlink_to(slide_path)
    assert run("preprocess", *(tmp_path / name for name in names), "--out", tmp_path).code == 0
    pyramids = [tmp_path / f"{split}.ome.zarr" for split in ("train", "val")]
    write_archive(tmp_path / "t.csv", [(pyramids[0], "a", "train"), (pyramids[1], "b", "val")])
    done = run(
        *("train", tmp_path / "t.csv", "--out", tmp_path / "run"),
        *("--prior", "tissue", "--view-downsample", "8", "--epochs", "1"),
    )
    assert (done.code, done.err) == (0, "")
    assert "view 278 x 371 px at 1/8, 10 patches of 64 px drawn within tissue (murthy)" in done.out


def test_slides_in_place_train_and_predict_as_their_pyramids_do(tmp_path: Path, run: Run) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for number, split in enumerate(["train", "train", "train", "val"]):
        # blocks of 32 px: the coarsest level shows them too
        image = rng.integers(0, 255, (3, 15, 18), dtype=np.uint8).repeat(32, 1).repeat(32, 2)
        with tifffile.TiffWriter(tmp_path / f"{number}.tif") as writer:
            for step in range(3):
                options = {"tile": (64, 64), "compression": "deflate", "photometric": "rgb", "metadata": None}
                writer.write(image.transpose(1, 2, 0), subfiletype=int(step > 0), **options)
                image = halve(image)
        rows.append((f"{number}", "ab"[number % 2], split))
    slides = [tmp_path / f"{name}.tif" for name, _, _ in rows]
    assert run("preprocess", *slides, "--out", tmp_path).code == 0
    results = {}
    for kind, ending in [("place", ".tif"), ("store", ".ome.zarr")]:
        table = tmp_path / f"{kind}.csv"
        write_archive(table, [(tmp_path / f"{name}{ending}", *rest) for name, *rest in rows])
        folder = tmp_path / kind
        done = run("train", table, "--out", folder, *QUICK[:4], *QUICK[6:], "--view-downsample", "4")
        assert (done.code, done.err) == (0, "")
        assert "view 144 x 120 px at 1/4" in done.out
        assert run("predict", folder, table, "--out", tmp_path / f"{kind}-out", "--split", "val").code == 0
        with (tmp_path / f"{kind}-out" / "predictions.csv").open() as file:
            predicted = [{k: v for k, v in row.items() if k.startswith("p_") or k == "predicted"}
                         for row in csv.DictReader(file)]  # fmt: skip
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        results[kind] = ([record["loss"] for record in records], predicted)
    assert len(results["place"][1]) == 1
    assert results["place"] == results["store"]


def test_a_run_folder_holds_what_help_says(trained: Path, table: Path, run: Run) -> None:
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["classes"] == ["0", "1"]
    assert (config["sampler"]["num_patches"], config["trainer"]["num_epochs"]) == (4, 2)
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [(r["phase"], r["epoch"]) for r in records] == [("train", 1), ("val", 1), ("train", 2), ("val", 2)]
    assert list((trained / "checkpoints").iterdir())
    assert list((trained / "tensorboard").iterdir())


def test_the_same_command_again_finds_nothing_to_do(trained: Path, table: Path, run: Run) -> None:
    before = contents(trained)
    again = run("train", table, "--out", trained, *QUICK)
    assert again.code == 0
    assert "(it was done before)" in again.out
    assert contents(trained) == before


def test_another_configuration_needs_another_folder(trained: Path, table: Path, run: Run) -> None:
    before = contents(trained)
    failed = run("train", table, "--out", trained, *QUICK, "--lr", "0.5")
    assert failed.code == 2
    assert failed.complaint.endswith(
        f"{trained}: trainer: lr was 0.001 and is now 0.5; use another run folder"
    )
    assert contents(trained) == before


def test_epochs_are_told_one_by_one(table: Path, tmp_path: Path, run: Run) -> None:
    done = run("train", table, "--out", tmp_path / "run", *QUICK)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "training on 4 images of split 'train', validation on 2 of 'val'; classes 0, 1"
    starts = ("training", "of the first", "epoch   1/2", "   validation", "epoch   2/2", "   validation")
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=False))
    assert re.search(r"sampled mass [\d.]+%  [\d.]+ images/s, waiting \d+%, ETA \d+:\d\d$", lines[2])
    assert lines[4].endswith("%")  # after the last epoch nothing is left
    assert lines[6].startswith(f"{tmp_path / 'run'}: 2 epochs done, validation accuracy ")
    assert len(lines) == 7


def test_columns_can_have_other_names(table: Path, tmp_path: Path, run: Run) -> None:
    rows = table.read_text().splitlines()[1:]
    other = table.with_name("other.csv")
    other.write_text("\n".join(["path,diagnosis,part", *rows]) + "\n")
    failed = run("train", other, "--out", tmp_path / "run")
    assert (failed.code, failed.complaint) == (
        2,
        f"ats-stream: error: {other}:1: no column 'slide', the header has path, diagnosis, part",
    )
    names = ("--slide-column", "path", "--label-column", "diagnosis", "--split-column", "part")
    assert run("train", other, "--out", tmp_path / "run", *QUICK, *names).code == 0


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--patches", "0", "--patches must be at least 1, got 0"),
        ("--patch-px", "-3", "--patch-px must be at least 1, got -3"),
        ("--view-downsample", "0.5", "--view-downsample must be at least 1, got 0.5"),
        ("--view-downsample", "nan", "--view-downsample must be at least 1, got nan"),
        ("--lr", "-1", "--lr must be positive, got -1.0"),
        ("--lr", "nan", "--lr must be positive, got nan"),
        ("--epochs", "0", "--epochs must be at least 1, got 0"),
        ("--batch-size", "0", "--batch-size must be at least 1, got 0"),
        ("--lag", "-1", "--lag must not be negative, got -1"),
        ("--decay-share", "2", "--decay-share must lie in [0, 1], got 2.0"),
        ("--attention-layers", "0", "--attention-layers must be at least 1, got 0"),
        ("--ranks", "2", "--ranks needs --executor ray"),
        ("--address", "127.0.0.1:1", "--address needs --executor ray"),
    ],
)
def test_values_out_of_range_name_their_option(
    flag: str, value: str, said: str, tmp_path: Path, run: Run
) -> None:
    failed = run("train", tmp_path / "none.csv", "--out", tmp_path / "run", flag, value)
    assert (failed.code, failed.out) == (2, "")
    assert failed.complaint == f"ats-stream: error: {said}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, ": no such file"),
        ("", ":1: no column 'slide', the header has nothing"),
        ("slide,label\na,0\n", ":1: no column 'split', the header has slide, label"),
        ("slide,label,split\n", ": the table has no rows"),
        ("slide,label,split\nnone.zarr,0,train\n", "none.zarr does not exist"),
        ("slide,label,split\nt.csv,,train\n", ":2: column 'label' is empty"),
        ("slide,label,split\nt.csv,0,test\n", ": no rows of split 'train', there are test"),
        (
            "slide,label,split\nt.csv,0,train\n",
            "t.csv: not a slide: neither OpenSlide, tifffile nor Pillow knows it",
        ),
        ("slide,label,split\n.,0,train\n", "no OME-Zarr image"),
    ],
)
def test_tables_that_cannot_be_used(content: str | None, said: str, tmp_path: Path, run: Run) -> None:
    if content is not None:
        (tmp_path / "t.csv").write_text(content)
    failed = run("train", tmp_path / "t.csv", "--out", tmp_path / "run")
    assert (failed.code, failed.out) == (2, "")
    assert failed.complaint.startswith(f"ats-stream: error: {tmp_path}")
    assert said in failed.complaint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--view-downsample", "300"), "no level near downsampling 300; there are 1, 32"),
        (("--prior", "tissue"), "no label 'tissue' to draw within; labels there: foreground"),
        (("--train-split", "all"), "no rows of split 'all', there are train, val, test"),
    ],
)
def test_options_that_do_not_fit_the_images(
    options: tuple[str, str], said: str, table: Path, tmp_path: Path, run: Run
) -> None:
    failed = run("train", table, "--out", tmp_path / "run", *options)
    assert failed.code == 2
    assert said in failed.complaint


def test_an_output_that_is_something_else(table: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    failed = run("train", table, "--out", tmp_path)
    assert failed.code == 2
    assert failed.complaint.endswith(f"{tmp_path}: exists, is not empty and is not a run folder")
    failed = run("train", table, "--out", tmp_path / "notes.txt")
    assert failed.code == 2
    assert failed.complaint.endswith("notes.txt: exists already and is not a folder")
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_ranks_must_divide_the_batch_and_a_cluster_must_answer(table: Path, tmp_path: Path, run: Run) -> None:
    ray = ("--executor", "ray", "--address", "127.0.0.1:1")
    failed = run("train", table, "--out", tmp_path / "run", *ray, "--ranks", "3")
    assert failed.code == 2
    assert "batch_size 8 does not split evenly over 3 ranks" in failed.complaint
    failed = run("train", table, "--out", tmp_path / "run", *ray)
    assert failed.code == 1
    assert "cannot reach the Ray cluster at 127.0.0.1:1" in failed.complaint
    assert not (tmp_path / "run").exists()


def test_an_image_that_cannot_be_read_ends_the_run_or_is_left_out(
    table: Path, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "bad.ome.zarr").mkdir()
    rows = list(csv.DictReader(table.read_text().splitlines()))
    first = next(row for row in rows if row["split"] == "train")
    for row in rows:
        row["slide"] = str(tmp_path / "bad.ome.zarr" if row is first else table.parent / row["slide"])
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    asked = ("train", tmp_path / "t.csv", "--out", tmp_path / "run", *QUICK)
    failed = run(*asked)
    assert failed.code == 2
    assert failed.complaint.startswith(f"ats-stream: error: {tmp_path}/bad.ome.zarr: ")
    assert not (tmp_path / "run").exists()
    failed = run(*asked, "--on-bad-image", "skip")
    assert failed.code == 2
    assert "1 of 6 images cannot be read, more than 0.05 of them may: " in failed.err
    done = run(*asked, "--on-bad-image", "skip", "--max-bad", "0.2")
    assert (done.code, done.err) == (0, "")
    told = [line for line in done.out.splitlines() if line.startswith("left out, cannot be read: ")]
    assert len(told) == 1
    assert f"{tmp_path}/bad.ome.zarr: " in told[0]
    assert ", 1 image left out; " in done.out.splitlines()[-1]


def test_a_full_disk_at_a_checkpoint(
    table: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(self: Path, target: Path) -> None:
        if target.suffix == ".pt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.replace(self, target)  # noqa: PTH105  # the method itself is what is replaced

    monkeypatch.setattr(Path, "replace", replace)
    failed = run("train", table, "--out", tmp_path / "run", *QUICK)
    assert failed.code == 1
    assert "checkpoints/best.pt" in failed.complaint
    assert "No space left on device" in failed.complaint
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_ctrl_c_keeps_the_last_checkpoint_and_the_run_can_go_on(
    table: Path, tmp_path: Path, run: Run
) -> None:
    words = ("train", str(table), "--out", str(tmp_path / "run"), *QUICK[:-1], "15")
    command = [sys.executable, "-m", "ats_stream.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch   2/"):
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "ats-stream: interrupted\n")
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept
    resumed = run(*words)
    assert resumed.code == 0
    assert f"going on from {tmp_path / 'run' / 'checkpoints' / kept[-1]}" in resumed.out
    assert "epoch   1/15" not in resumed.out
    assert "epoch  15/15" in resumed.out


def test_the_bar_shows_speed_waiting_staleness_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with EpochLines(3) as lines:
        for step in (5, 6):
            lines.on_step(
                Progress(
                    step=step,
                    num_steps=12,
                    images_per_s=7.25,
                    wait_share=0.04,
                    staleness=1.0,
                    effective_share=0.93,
                    eta_s=3725.0,
                )
            )
        lines._bar.refresh()
    shown = capsys.readouterr().err
    assert "6/12 steps, 7.2 images/s, waiting 4%, staleness 1.0, effective 93%, ETA 1:02:05" in shown
