"""Conversions that are killed, refused or disturbed: what is there stays, and another run goes on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from ats_stream.errors import SlideError, StorageError, TargetExistsError
from ats_stream.io import ConvertConfig, convert, open_pyramid, verify, write_pyramid
from ats_stream.io.conversion import array_writer
from ats_stream.io.conversion.manifest import read_manifest
from ats_stream.io.conversion.plan import build_levels

CONFIG = ConvertConfig(chunk_px=32, shard_px=128, coarsest_px=64, num_threads=1)
SIDE = 600


def pixels(side=SIDE):
    y, x = np.ogrid[:side, :side]
    plane = ((y * 3 + x * 5) // 7 % 251).astype(np.uint8)
    return np.stack([plane, plane.T, 255 - plane])


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """A tiled TIFF: a file, so that it has a stamp."""
    path = tmp_path_factory.mktemp("slide") / "a.tif"
    tifffile.imwrite(path, pixels().transpose(1, 2, 0), tile=(64, 64), compression="zlib", photometric="rgb")
    return path


def files(target):
    return {p.relative_to(target).as_posix(): p.read_bytes() for p in Path(target).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(slide, tmp_path_factory):
    """An undisturbed run: its files and its manifest."""
    target = tmp_path_factory.mktemp("whole") / "a.zarr"
    summary = convert(slide, target, CONFIG)
    assert summary.num_resumed == 0
    return files(target), Path(f"{target}.manifest.jsonl").read_bytes(), summary.num_shards


def check_same(target, whole):
    """Every file and the manifest as in an undisturbed run, and nothing else beside them."""
    assert files(target) == whole[0]
    assert Path(f"{target}.manifest.jsonl").read_bytes() == whole[1]
    names = {p.name for p in Path(target).parent.iterdir()}
    assert names == {Path(target).name, f"{Path(target).name}.manifest.jsonl"}


def num_done(target):
    """Shards that are whole in an unfinished target."""
    partial = Path(f"{target}.partial")
    return sum(
        1 for p in partial.rglob("*") if p.is_file() and "/c/" in str(p) and not p.name.startswith(".")
    )


KILLED = """
import os, signal, sys
from pathlib import Path
from ats_stream.io import ConvertConfig, convert
from ats_stream.io.conversion import array_writer

slide, target, count, when = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
write, num_written = array_writer.write_parts, 0

def killing(path, parts):
    global num_written
    num_written += 1
    if num_written == count and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    if num_written == count and when == "within":
        write(path, list(parts)[:1])
        os.kill(os.getpid(), signal.SIGKILL)
    num_bytes = write(path, parts)
    if num_written == count and when == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return num_bytes

array_writer.write_parts = killing
rename = Path.replace

def replace(self, to):
    result = rename(self, to)
    if num_written == count and when == "renamed":
        os.kill(os.getpid(), signal.SIGKILL)
    return result

Path.replace = replace
config = ConvertConfig(chunk_px=32, shard_px=128, coarsest_px=64, num_threads=1)
convert(slide, target, config)
"""


@pytest.mark.parametrize(
    ("count", "when"), [(1, "before"), (2, "within"), (9, "after"), (17, "renamed"), (39, "within")]
)
def test_a_killed_run_is_gone_on_from(slide, whole, tmp_path, count, when):
    target = tmp_path / "a.zarr"
    command = [sys.executable, "-c", KILLED, str(slide), str(target), str(count), when]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (killed.returncode, killed.stderr) == (-signal.SIGKILL, "")
    assert not target.exists()
    there = num_done(target)
    assert there == count - (when != "renamed")
    summary = convert(slide, target, CONFIG)
    # one that had its name but was not noted any more is taken over, so only the one under way is redone
    assert summary.num_resumed == there
    assert f"resumed: {there} of {whole[2]} shards were there" in summary.notes
    check_same(target, whole)
    assert verify(target, source=slide, num_threads=1).findings == ()


def test_killed_again_and_again(slide, whole, tmp_path):
    target = tmp_path / "a.zarr"
    for _ in range(6):
        before = num_done(target)
        command = [sys.executable, "-c", KILLED, str(slide), str(target), "6", "within"]
        subprocess.run(command, capture_output=True, timeout=120)
        assert num_done(target) == before + 5
    assert convert(slide, target, CONFIG).num_resumed == 30
    check_same(target, whole)


@pytest.mark.parametrize("harm", ["cut", "flipped index", "gone", "extra", "torn manifest", "no manifest"])
def test_what_is_left_is_looked_at(slide, whole, tmp_path, harm):
    """A shard of another size, or not in the manifest and broken, is made anew; what is none of it goes."""
    target, partial = tmp_path / "a.zarr", tmp_path / "a.zarr.partial"
    command = [sys.executable, "-c", KILLED, str(slide), str(target), "12", "after"]
    subprocess.run(command, capture_output=True, timeout=120)
    there = num_done(target)
    manifest = tmp_path / "a.zarr.partial.manifest.jsonl"
    victim = next(p for p in sorted(partial.rglob("*")) if p.is_file() and not p.name.startswith("."))
    if harm == "cut":
        victim.write_bytes(victim.read_bytes()[:-3])
    elif harm == "flipped index":
        lines = manifest.read_bytes().splitlines(keepends=True)
        key = victim.relative_to(partial).as_posix()
        manifest.write_bytes(b"".join(line for line in lines if f'"{key}"'.encode() not in line))
        data = bytearray(victim.read_bytes())
        data[-9] ^= 1
        victim.write_bytes(data)
    elif harm == "gone":
        victim.unlink()
    elif harm == "extra":
        (partial / "0" / "c" / "0" / "99").mkdir()
        (partial / "0" / "c" / "0" / "99" / "0").write_bytes(b"x")
    elif harm == "torn manifest":
        manifest.write_bytes(manifest.read_bytes()[:-20])
    else:
        manifest.unlink()
    expected = {"extra": there, "torn manifest": there, "no manifest": 0}.get(harm, there - 1)
    assert convert(slide, target, CONFIG).num_resumed == expected
    found = files(target)
    assert found == whole[0]
    assert Path(f"{target}.manifest.jsonl").read_bytes() == whole[1]


def test_other_settings_or_another_source_begin_anew(slide, tmp_path):
    target = tmp_path / "a.zarr"
    command = [sys.executable, "-c", KILLED, str(slide), str(target), "12", "after"]
    for change in ("settings", "source"):
        copy = Path(shutil.copy2(slide, tmp_path / "a.tif"))
        subprocess.run([*command[:3], str(copy), *command[4:]], capture_output=True, timeout=120, check=False)
        assert num_done(target) > 0
        config = ConvertConfig(chunk_px=32, shard_px=64, num_threads=1) if change == "settings" else CONFIG
        if change == "source":
            os.utime(copy, ns=(1, 1))
        summary = convert(copy, target, config)
        assert summary.num_resumed == 0
        assert summary.notes[-1].startswith("begun anew: ")
        np.testing.assert_array_equal(open_pyramid(target).read(0), pixels())
        assert verify(target, num_threads=1).findings == ()
        shutil.rmtree(target)


def test_another_run_at_work_is_told(slide, tmp_path):
    target = tmp_path / "a.zarr"
    with (tmp_path / "a.zarr.partial.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TargetExistsError, match=r"a\.zarr: another run is converting to it"):
            convert(slide, target, CONFIG)
    convert(slide, target, CONFIG)
    assert not (tmp_path / "a.zarr.partial.lock").exists()


def test_a_source_that_changes_meanwhile_is_an_error(slide, tmp_path, monkeypatch):
    copy = Path(shutil.copy2(slide, tmp_path / "b.tif"))
    write, num_written = array_writer.write_parts, []

    def changing(path, parts):
        num_written.append(path)
        if len(num_written) == 30:
            os.utime(copy, ns=(1, 1))
        return write(path, parts)

    monkeypatch.setattr(array_writer, "write_parts", changing)
    with pytest.raises(SlideError, match=r"b\.tif: .*changed"):
        convert(copy, tmp_path / "a.zarr", CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["b.tif"]


def test_a_target_that_cannot_be_written_is_named(slide, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=r"file/a\.zarr: cannot write: "):
        convert(slide, tmp_path / "file" / "a.zarr", CONFIG)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_target_is_replaced_whole(slide, whole, tmp_path):
    """Killed while it replaces a pyramid, a run leaves the old one; gone on, it has the new one alone."""
    target = tmp_path / "a.zarr"
    write_pyramid(np.zeros((3, 40, 40), np.uint8), target, CONFIG)
    script = KILLED.replace("num_threads=1", "num_threads=1, overwrite=True")
    command = [sys.executable, "-c", script, str(slide), str(target), "12", "after"]
    subprocess.run(command, capture_output=True, timeout=120)
    assert open_pyramid(target).levels[0].shape == (3, 40, 40)
    assert verify(target, num_threads=1).findings == ()
    overwriting = ConvertConfig(chunk_px=32, shard_px=128, coarsest_px=64, num_threads=1, overwrite=True)
    assert convert(slide, target, overwriting).num_resumed == 11
    check_same(target, whole)


def test_renaming_that_was_cut_off_is_brought_to_its_end(slide, whole, tmp_path):
    target = tmp_path / "a.zarr"
    convert(slide, target, CONFIG)
    Path(f"{target}.manifest.jsonl").rename(tmp_path / "a.zarr.partial.manifest.jsonl")
    with pytest.raises(TargetExistsError):
        convert(slide, target, CONFIG)
    check_same(target, whole)


def test_arrays_are_known_again_by_their_pixels(tmp_path, monkeypatch):
    image, target = pixels(300), tmp_path / "a.zarr"
    write, num_written = array_writer.write_parts, []

    def failing(path, parts):
        num_written.append(path)
        if len(num_written) == 6:
            raise OSError("no more")
        return write(path, parts)

    for again, resumed in ((image.copy(), 5), (255 - image, 0)):
        num_written.clear()
        monkeypatch.setattr(array_writer, "write_parts", failing)
        with pytest.raises(StorageError, match="no more"):
            write_pyramid(image, target, CONFIG)
        monkeypatch.undo()
        assert write_pyramid(again, target, CONFIG).num_resumed == resumed
        np.testing.assert_array_equal(open_pyramid(target).read(0), again)
        shutil.rmtree(target)


def test_the_manifest_tells_of_every_object(slide, whole, tmp_path):
    convert(slide, tmp_path / "a.zarr", CONFIG)
    manifest = read_manifest(tmp_path / "a.zarr")
    assert manifest.is_complete
    assert {k: e.nbytes for k, e in manifest.entries.items() if e.nbytes} == {
        key: len(data) for key, data in whole[0].items()
    }
    assert manifest.header.source.name == "a.tif"
    assert manifest.header.source.nbytes == slide.stat().st_size
    first = json.loads(whole[1].splitlines()[0])
    assert (first["profile"], len(first["plan"])) == ("lossless", 64)


def test_every_setting_that_decides_bytes_is_in_the_plan():
    shapes = [(3, 600, 600), (3, 300, 300)]
    digests = set()
    for config in (
        ConvertConfig(),
        ConvertConfig(chunk_px=64),
        ConvertConfig(shard_px=256),
        ConvertConfig(codec_level=3),
        ConvertConfig(profile="lz4"),
        ConvertConfig(profile="raw"),
    ):
        levels = build_levels(shapes, ("y", "x"), np.dtype(np.uint8), config)
        digests.add(json.dumps([level.spec.metadata() for level in levels]))
    assert len(digests) == 6
