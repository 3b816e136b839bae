"""Verification of a converted slide of which one byte, anywhere, has changed: not one passes for whole."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from ats_stream.io import ConvertConfig, convert, verify

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.torture, pytest.mark.timeout(1800)]
NUM_FLIPS = 200


@pytest.mark.parametrize("profile", ["lossless", "pass"])
def test_no_byte_of_a_converted_slide_changes_unnoticed(
    slide_path: Path, tmp_path: Path, profile: str
) -> None:
    target = tmp_path / "a.ome.zarr"
    config = ConvertConfig(profile=profile, shard_bytes=1 << 18, keep_associated=True)
    convert(slide_path, target, config)
    assert verify(target).findings == ()
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    rng = random.Random(0)
    for number in range(NUM_FLIPS):
        path = files[number % len(files)]
        place, bit = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
        flip(path, place, bit)
        keys = [finding.key for finding in verify(target, num_threads=1).findings]
        inside = path.relative_to(target).as_posix() if target in path.parents else path.name
        assert inside in keys, (inside, place, bit, keys)
        flip(path, place, bit)
    assert verify(target).findings == ()


def flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (value,) = file.read(1)
        file.seek(place)
        file.write(bytes([value ^ bit]))
