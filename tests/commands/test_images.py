"""``preprocess`` and ``info`` on real slides, on what is no slide, and on a disk that is full."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil
import pytest
from PIL import Image

from ats_stream.io import open_pyramid

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    Run = Callable[..., Any]


def test_a_slide_becomes_a_pyramid_that_info_describes(slide_path: Path, tmp_path: Path, run: Run) -> None:
    done = run("preprocess", slide_path, "--out", tmp_path)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("CMU-1-Small-Region: 2220 x 2967, 5 levels, 0.499 um/px")
    target = tmp_path / "CMU-1-Small-Region.ome.zarr"
    assert [level.shape for level in open_pyramid(target).levels][:2] == [(3, 2967, 2220), (3, 1484, 1110)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [target.name, f"{target.name}.manifest.jsonl"]

    shown = run("info", target, slide_path)
    assert (shown.code, shown.err) == (0, "")
    of_pyramid, of_slide = shown.out.split(f"CMU-1-Small-Region: slide {slide_path}")
    for text in (of_pyramid, of_slide):
        assert "2220 x 2967 px, 6.59 megapixels, uint8" in text
        assert "0.499 um" in text
        assert "20x" in text
        assert " MB" in text
    assert "tissue" in of_pyramid
    assert "3 x 186 x 139" in of_pyramid
    assert "label, macro, thumbnail" in of_slide


def test_existing_pyramids_are_refused_skipped_or_replaced(tmp_path: Path, run: Run) -> None:
    picture, out = tmp_path / "a.png", tmp_path / "out"
    Image.new("RGB", (40, 30), "red").save(picture)
    assert run("preprocess", picture, "--out", out).code == 0
    before = (out / "a.ome.zarr").stat().st_ino
    refused = run("preprocess", picture, "--out", out)
    assert refused.code == 2
    assert refused.complaint == f"ats-stream: failed: {picture}: {out / 'a.ome.zarr'}: exists already"
    assert run("preprocess", picture, "--out", out, "--skip-existing").code == 0
    assert (out / "a.ome.zarr").stat().st_ino == before
    Image.new("RGB", (20, 30), "red").save(picture)
    assert run("preprocess", picture, "--out", out, "--overwrite").code == 0
    assert open_pyramid(out / "a.ome.zarr").levels[0].shape == (3, 30, 20)


def test_a_bad_slide_is_reported_and_the_rest_goes_on(slide_path: Path, tmp_path: Path, run: Run) -> None:
    text, cut, good, out = (tmp_path / name for name in ("text.svs", "cut.svs", "good.png", "out"))
    text.write_text("no slide")
    cut.write_bytes(slide_path.read_bytes()[:1_000_000])
    Image.new("RGB", (40, 30), "red").save(good)
    mixed = run("preprocess", text, cut, tmp_path / "none.svs", good, "--out", out)
    assert mixed.code == 1
    lines = mixed.err.splitlines()
    assert lines[0].startswith(f"ats-stream: failed: {text}: not a slide")
    assert lines[1].startswith(f"ats-stream: failed: {cut}: truncated: ")
    assert lines[2] == f"ats-stream: failed: {tmp_path / 'none.svs'}: no such file"
    assert len(lines) == 3
    assert mixed.out.splitlines()[-1] == "1 of 4 slides converted, 3 failed"
    assert sorted(path.name for path in out.iterdir()) == ["good.ome.zarr", "good.ome.zarr.manifest.jsonl"]
    assert run("preprocess", cut, "--out", out).code == 2


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--chunk-px", "0", "--chunk-px must be positive, got 0"),
        ("--shard-px", "100", "--shard-px must be an even multiple of chunk_px=128, got 100"),
        ("--pixel-size-um", "-1", "--pixel-size-um must be positive, got -1.0"),
        ("--pixel-size-um", "nan", "--pixel-size-um must be positive, got nan"),
    ],
)
def test_values_out_of_range_name_their_option(
    flag: str, value: str, said: str, tmp_path: Path, run: Run
) -> None:
    failed = run("preprocess", "a.svs", "--out", tmp_path / "out", flag, value)
    assert (failed.code, failed.out) == (2, "")
    assert failed.complaint == f"ats-stream: error: {said}"
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_a_file(tmp_path: Path, run: Run) -> None:
    (tmp_path / "out").write_text("mine")
    failed = run("preprocess", "a.svs", "--out", tmp_path / "out")
    assert failed.code == 2
    assert failed.complaint.endswith(f"{tmp_path / 'out'}: exists already and is not a folder")
    assert (tmp_path / "out").read_text() == "mine"


def test_info_reports_what_it_cannot_read_and_goes_on(tmp_path: Path, run: Run) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.svs"
    Image.new("L", (40, 30)).save(good)
    bad.write_text("no slide")
    shown = run("info", bad, tmp_path / "none", tmp_path, good)
    assert shown.code == 2
    for place, line in zip((bad, tmp_path / "none", tmp_path), shown.err.splitlines(), strict=True):
        assert line.startswith(f"ats-stream: error: {place}: ")
    assert "40 x 30 px" in shown.out


def test_a_disk_that_refuses_ends_it_with_the_file_and_the_reason(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_parts(path: Path, parts: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("ats_stream.io.conversion.array_writer.write_parts", write_parts)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    failed = run("preprocess", tmp_path / "a.png", "--out", tmp_path / "out")
    assert failed.code == 1
    hint, complaint = failed.err.splitlines()
    assert "the same command again goes on" in hint
    assert "a.ome.zarr" in complaint
    assert "No space left on device" in complaint
    assert not (tmp_path / "out" / "a.ome.zarr").exists()


def preprocess(*words: object) -> list[str]:
    return [sys.executable, "-m", "ats_stream.cli", "preprocess", *map(str, words)]


def test_a_limit_on_the_size_of_files_leaves_no_pyramid(slide_path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        preprocess(slide_path, "--out", tmp_path),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    target = tmp_path / "CMU-1-Small-Region.ome.zarr"
    hint, complaint = done.stderr.splitlines()
    assert "the same command again goes on" in hint
    assert complaint.startswith(f"ats-stream: error: {target}")
    assert complaint.endswith("File too large")
    assert not target.exists()
    again = subprocess.run(preprocess(slide_path, "--out", tmp_path), capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (0, "")
    assert "resumed: " in again.stdout


def test_ctrl_c_leaves_no_pyramid(tmp_path: Path) -> None:
    large, out = tmp_path / "large.bmp", tmp_path / "out"
    Image.effect_noise((5000, 5000), 50).save(large)
    with subprocess.Popen(
        preprocess(large, "--out", out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not (out.is_dir() and list(out.glob("*.partial"))):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    hint, complaint = err.splitlines()
    assert (process.returncode, complaint) == (130, "ats-stream: interrupted")
    assert "the same command again goes on" in hint
    assert not (out / "large.ome.zarr").exists()
    assert sorted(path.name for path in out.iterdir()) == [
        "large.ome.zarr.partial",
        "large.ome.zarr.partial.manifest.jsonl",
    ]


@pytest.mark.slow
def test_ctrl_c_on_ray_leaves_no_process_and_nothing_that_is_lost(tmp_path: Path) -> None:
    source, out, whole = tmp_path / "large.bmp", tmp_path / "out", tmp_path / "whole"
    Image.effect_noise((3000, 3000), 50).save(source)
    command = preprocess(source, "--out", out, "--shard-px", "256", "--no-tissue")
    with subprocess.Popen(
        [*command, "--ray", "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        # a shard is stored, and Ray is at work
        while process.poll() is None and not list(out.glob("*.partial/0/c/*/*/*")):
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert (process.returncode, err.splitlines()[-1]) == (130, "ats-stream: interrupted")
    assert children
    _, left = psutil.wait_procs(children, timeout=30)
    assert [child.cmdline() for child in left] == []
    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (0, "")
    assert "resumed: " in again.stdout
    subprocess.run(preprocess(source, "--out", whole, "--shard-px", "256", "--no-tissue"), check=True)
    made = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (out, whole)]
    assert made[0] == made[1]


def test_info_tells_how_levels_are_stored(slide_path: Path, tmp_path: Path, run: Run) -> None:
    run("preprocess", slide_path, "--out", tmp_path)
    target = tmp_path / "CMU-1-Small-Region.ome.zarr"
    shown = run("info", target)
    rows = [line.split() for line in shown.out.splitlines()]
    top = next(row for row in rows if row[:1] == ["0"])
    assert " ".join(top).startswith("0 3 x 2967 x 2220 1 0.499 3 x 128 x 128 3 x 3072 x 2304 zstd 1 ")
    files = [path.stat().st_size for path in (target / "0").rglob("*") if path.is_file()]
    assert " ".join(top).endswith(f"{sum(files) / 1e6:.1f} MB in {len(files)} objects")
    everything = [path.stat().st_size for path in target.rglob("*") if path.is_file()]
    assert f"stored           {sum(everything) / 1e6:.1f} MB in {len(everything)} files" in shown.out


def test_thumbnails_are_shown_where_they_can_be_and_saved_when_asked(
    slide_path: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-kitty")
    assert "\033" not in run("info", slide_path).out  # standard output is no terminal
    blocks = run("info", "--thumbnail", slide_path)
    assert blocks.out.count("\N{UPPER HALF BLOCK}") > 500
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\033_Ga=T,f=100," in run("info", slide_path).out
    assert "\033" not in run("info", slide_path, "--no-thumbnail").out
    picture = tmp_path / "a.png"
    assert "\033" not in run("info", slide_path, "--thumbnail", picture).out
    with Image.open(picture) as image:
        assert (image.format, max(image.size)) == ("PNG", 248)
    assert run("info", "--thumbnail", picture).complaint.endswith("info needs an image")
    two = run("info", slide_path, slide_path, "--thumbnail", picture)
    assert two.code == 2
    assert two.complaint.endswith(f"--thumbnail {picture} is one file, got 2 images")


def test_pyramids_go_to_an_object_store_and_are_skipped_there(tmp_path: Path, run: Run, s3: Any) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    (tmp_path / "options.yaml").write_text("".join(f"{k}: {v}\n" for k, v in s3.options.items()))
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "note.txt").write_text("x")
    bucket = s3.upload(tmp_path / "up", "commands", "other").rpartition("/")[0]
    words = (
        "preprocess",
        tmp_path / "a.png",
        "--out",
        bucket,
        "--storage-options",
        tmp_path / "options.yaml",
    )
    done = run(*words)
    assert (done.code, done.err) == (0, "")
    assert open_pyramid(f"{bucket}/a.ome.zarr", storage_options=s3.options).levels[0].shape == (3, 30, 40)
    assert run(*words, "--skip-existing").code == 0
    assert "exists already" in run(*words).complaint
    assert s3.secret not in done.out


def test_a_folder_with_a_table_of_pixel_sizes_and_two_workers(tmp_path: Path, run: Run) -> None:
    for name in "abc":
        Image.new("RGB", (400, 300), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "sizes.csv").write_text("slide,pixel_size_um\na,0.5\nb.png,0.25\n")
    done = run(
        "preprocess",
        tmp_path,
        "--out",
        tmp_path / "out",
        "--pixel-size",
        tmp_path / "sizes.csv",
        "--workers",
        2,
        "--tile",
        64,
        "--profile",
        "pass",
    )
    assert (done.code, done.err) == (0, "")
    lines = [line for line in done.out.splitlines() if not line.startswith(" ")]
    assert ["0.5 um/px" in lines[0], "0.25 um/px" in lines[1], "um/px unknown" in lines[2]] == [True] * 3
    assert done.out.count("decoded and stored losslessly, because not a slide of tiles") == 3
    assert lines[-1] == "3 of 3 slides converted, 0 failed"
