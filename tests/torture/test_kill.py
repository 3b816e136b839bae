"""``ats-stream preprocess`` killed at random moments: the target is whole or absent, a second run works."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tifffile

from ats_stream import cli
from ats_stream.errors import SlideError
from ats_stream.io import PyramidWriter, open_pyramid

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

NUM_KILLS = 5
NUM_TORTURE_KILLS = 50
# small shards, so that there are many files between which a kill may fall
OPTIONS = ("--shard-px", "256", "--chunk-px", "64")
NAME = "CMU-1-Small-Region.ome.zarr"


def start(slide: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ats_stream.cli", "preprocess", str(slide), "--out", str(out), *OPTIONS]
    return subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait(process: subprocess.Popen[str], seconds: float) -> bool:
    """Whether the process ended by itself within that time."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def wait_for_writing(process: subprocess.Popen[str], out: Path) -> None:
    while not list(out.glob("*.partial")) and not wait(process, 0.002):
        pass


@dataclass(frozen=True)
class Whole:
    """An undisturbed run: its pyramid, the slide's own pixels, and how long it took."""

    target: Path
    pixels_CYX: NDArray[np.uint8]
    start_s: float
    write_s: float


@pytest.fixture(scope="module")
def whole(slide_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    out = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    with start(slide_path, out) as process:
        wait_for_writing(process, out)
        writing = time.monotonic()
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    pixels_CYX = tifffile.imread(slide_path, key=0).transpose(2, 0, 1)
    found = Whole(out / NAME, pixels_CYX, writing - began, time.monotonic() - writing)
    check_whole(found.target, found)
    return found


def check_whole(target: Path, whole: Whole) -> None:
    """The target opens, has the slide's pixels, and the same files as an undisturbed run."""
    np.testing.assert_array_equal(open_pyramid(target).read(0), whole.pixels_CYX)
    files = {p.relative_to(target): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    expected = {p.relative_to(whole.target): p.read_bytes() for p in whole.target.rglob("*") if p.is_file()}
    assert files == expected


def kill_once(slide: Path, out: Path, whole: Whole, rng: np.random.Generator) -> str:
    """Kill a run at a random moment; says what was found: ``absent``, ``partial`` or ``whole``."""
    overwrite = rng.integers(3) == 0
    if overwrite:
        shutil.copytree(whole.target, out / NAME)
    # a third dies while it starts, the others while they write or shortly after
    while_starting, share = rng.integers(3) == 0, float(rng.random())
    # half of them share the work between processes
    more = [*(["--overwrite"] if overwrite else []), *(["--workers", "2"] if rng.integers(2) else [])]
    with start(slide, out, *more) as process:
        if while_starting:
            wait(process, share * whole.start_s)
        else:
            wait_for_writing(process, out)
            wait(process, share * 1.1 * whole.write_s)
        process.kill()
        _, errors = process.communicate(timeout=120)
    assert process.returncode in {-signal.SIGKILL, 0}
    # it had no time to complain, and nothing to complain of; a worker that was just starting may say it
    assert errors == "" or ("--workers" in more and "spawn_main" in errors)
    if (out / NAME).exists():
        check_whole(out / NAME, whole)
        return "whole"
    with pytest.raises(SlideError, match="no such file or folder"):
        open_pyramid(out / NAME)
    return "partial" if out.exists() and any(out.iterdir()) else "absent"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_kills", [NUM_KILLS, pytest.param(NUM_TORTURE_KILLS, marks=pytest.mark.torture)])
def test_a_killed_conversion_leaves_a_whole_target_or_none(
    slide_path: Path, tmp_path: Path, whole: Whole, capsys: Any, num_kills: int
) -> None:
    found = []
    for number in range(num_kills):
        out = tmp_path / str(number)
        found.append(kill_once(slide_path, out, whole, np.random.default_rng(number)))
        again = ["preprocess", str(slide_path), "--out", str(out), *OPTIONS, "--skip-existing"]
        assert cli.main(again) == 0, f"run {number}, which left the target {found[-1]}"
        assert capsys.readouterr().err == ""
        check_whole(out / NAME, whole)
        shutil.rmtree(out)
    # the moments were spread: some kills fell into the writing
    assert "partial" in found, found


@pytest.mark.parametrize("words", [["partial"], ["old"], ["partial", "old"]], ids="-".join)
def test_what_a_killed_process_of_the_same_id_left_is_no_obstacle(tmp_path: Path, words: list[str]) -> None:
    """Ids come again soon in containers; what lies there may also be work of another machine, so it stays."""
    left = [tmp_path / f"a.zarr.{word}-{os.getpid()}" for word in words]
    for folder in left:
        folder.mkdir()
        (folder / "file").write_text("left")
    for value in (1, 2):
        with PyramidWriter(
            tmp_path / "a.zarr",
            level_shapes=[(1, 8, 8)],
            dtype="uint8",
            chunk_px=8,
            shard_px=8,
            overwrite=True,
        ) as writer:
            writer.write_shard(0, (0, 0), np.full((1, 8, 8), value, np.uint8))
        assert (open_pyramid(tmp_path / "a.zarr").read(0) == value).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.zarr", *(p.name for p in left)])
    assert all((folder / "file").read_text() == "left" for folder in left)
