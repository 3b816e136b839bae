"""``verify``: lines and exit codes. What is found: tests/io/test_verify.py."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ats_stream.io import ConvertConfig, write_pyramid

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    Run = Callable[..., Any]

CONFIG = ConvertConfig(chunk_px=16, shard_px=32, coarsest_px=32, tissue=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pyramids in a folder."""
    rows, columns = np.mgrid[:70, :50]
    image = np.stack([rows, columns, rows + columns]).astype(np.uint8)
    for name in ("a.ome.zarr", "b.ome.zarr"):
        write_pyramid(image, tmp_path / "out" / name, CONFIG, pixel_size_um=0.5)
    return tmp_path / "out"


def test_whole_pyramids_are_a_line_each(folder: Path, run: Run) -> None:
    for arguments in ([folder], [folder / "a.ome.zarr", folder / "b.ome.zarr", "--quick", "--threads", 2]):
        done = run("verify", *arguments)
        assert (done.code, done.err) == (0, "")
        first, second, last = done.out.splitlines()
        assert first.startswith(f"{folder / 'a.ome.zarr'}: ok (")
        assert second.startswith(f"{folder / 'b.ome.zarr'}: ok (")
        assert last == "2 of 2 are whole"


def test_damage_is_a_line_and_exit_code_1(folder: Path, run: Run) -> None:
    shard = folder / "a.ome.zarr" / "0" / "c" / "0" / "1" / "0"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = run("verify", folder)
    assert (done.code, done.err) == (1, "")
    lines = done.out.splitlines()
    assert lines[0].startswith(f"{folder / 'a.ome.zarr'}: 0/c/0/1/0: ")
    assert lines[-3].startswith(f"{folder / 'a.ome.zarr'}: {len(lines) - 3} finding")
    assert lines[-2].startswith(f"{folder / 'b.ome.zarr'}: ok")
    assert lines[-1] == "1 of 2 are whole"


def test_what_cannot_be_verified_is_reported_and_the_rest_goes_on(folder: Path, run: Run) -> None:
    done = run("verify", folder / "none.zarr", folder / "a.ome.zarr")
    assert (done.code, done.complaint) == (
        2,
        f"ats-stream: error: {folder / 'none.zarr'}: no such file or folder",
    )
    assert done.out.splitlines()[-1] == "1 of 2 are whole"
    assert run("verify", folder, "--threads", 0).complaint.endswith("--threads must be at least 1, got 0")


def test_pyramids_are_compared_with_their_sources(folder: Path, run: Run) -> None:
    one, other = folder / "a.ome.zarr", folder / "b.ome.zarr"
    assert run("verify", one, "--source", other).code == 0
    shutil.rmtree(other)
    write_pyramid(np.zeros((3, 70, 50), np.uint8), other, CONFIG, pixel_size_um=0.25)
    done = run("verify", one, "--source", other)
    assert done.code == 1
    assert done.out.splitlines()[0] == (
        f"{one}: zarr.json: pixel size 0.5 x 0.5 um, the source states 0.25 x 0.25 um"
    )
