"""Sizes of practice: patches of ten gigapixels, tables of many rows, arrays larger than what is held."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ats_stream.io import PyramidWriter, open_pyramid, read_archive, write_archive

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE = 100_000
CHUNK = 128
PATCH = 256
PATCHES_PER_READ = 50  # 9.8 MB of pixels
PATCHES_BYTES = 48 << 20  # 48 MiB, whatever the number of patches
TABLE_BYTES_PER_ROW = 2048


@pytest.fixture(scope="module")
def gigapixels(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[tuple[int, int], NDArray[np.uint8]]]:
    """A pyramid of 3 x 100,000 x 100,000 pixels (30 GB) with 40 chunks in it, and these chunks."""
    rng = np.random.default_rng(0)
    last = SIDE // CHUNK
    places = {(0, 0), (last - 1, last - 1), *((int(r), int(c)) for r, c in rng.integers(0, last, (38, 2)))}
    blocks = {place: rng.integers(1, 255, (3, CHUNK, CHUNK), dtype=np.uint8) for place in sorted(places)}
    target = tmp_path_factory.mktemp("scale") / "a.ome.zarr"
    shapes = [(3, SIDE, SIDE), (3, SIDE // 100, SIDE // 100)]
    with PyramidWriter(target, level_shapes=shapes, dtype="uint8", pixel_size_um=0.25) as writer:
        writer.write_chunks(0, blocks)
    return target, blocks


def expected_patch(blocks: dict[tuple[int, int], NDArray[np.uint8]], y: int, x: int) -> NDArray[np.uint8]:
    """The patch at (y, x), put together from the few chunks that hold something."""
    patch = np.zeros((3, PATCH, PATCH), np.uint8)
    for (row, column), block in blocks.items():
        top, left = row * CHUNK - y, column * CHUNK - x
        rows = slice(max(top, 0), min(top + CHUNK, PATCH))
        columns = slice(max(left, 0), min(left + CHUNK, PATCH))
        if rows.start < rows.stop and columns.start < columns.stop:
            patch[:, rows, columns] = block[
                :, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
            ]
    return patch


@pytest.mark.parametrize("num_patches", [100, pytest.param(1000, marks=pytest.mark.torture)])
def test_patches_of_ten_gigapixels_take_bounded_memory(
    gigapixels: Any, watch_memory: Any, num_patches: int
) -> None:
    target, blocks = gigapixels
    rng = np.random.default_rng(num_patches)
    offsets = rng.integers(0, SIDE - PATCH, (num_patches, 2))
    # every second patch overlaps a chunk with pixels in it
    near = np.array(sorted(blocks))[rng.integers(0, len(blocks), len(offsets[::2]))] * CHUNK
    offsets[::2] = np.clip(near + rng.integers(-PATCH + 1, CHUNK, near.shape), 0, SIDE - PATCH)
    open_pyramid(target).read_patches(0, offsets[:2], (PATCH, PATCH))
    memory = watch_memory()
    pyramid = open_pyramid(target, cache_bytes=8 << 20)
    assert pyramid.levels[0].shape == (3, SIDE, SIDE)
    num_filled = 0
    for first in range(0, num_patches, PATCHES_PER_READ):
        part = offsets[first : first + PATCHES_PER_READ]
        for patch, (y, x) in zip(pyramid.read_patches(0, part, (PATCH, PATCH)), part.tolist(), strict=True):
            expected = expected_patch(blocks, y, x)
            np.testing.assert_array_equal(patch, expected)
            num_filled += bool(expected.any())
    assert memory.peak_bytes() < PATCHES_BYTES
    assert num_filled >= num_patches // 2
    assert pyramid.read_stats(0).num_chunks >= num_patches


@pytest.mark.parametrize("num_rows", [1000, pytest.param(20_000, marks=pytest.mark.torture)])
def test_a_table_of_many_rows_reads_back(tmp_path: Path, watch_memory: Any, num_rows: int) -> None:
    """Slides are looked for on the disk, as training does; a row takes TABLE_BYTES_PER_ROW at most."""
    rows = []
    for number in range(num_rows):
        slide = tmp_path / f"{number % 100:02}" / f"slide-{number:06}.ome.zarr"
        slide.mkdir(parents=True)
        rows.append((slide, f"class {number % 7}", ("train", "val", "test")[number % 3]))
    table = tmp_path / "archive.csv"
    write_archive(table, rows)
    read_archive(table)
    memory = watch_memory()
    archive = read_archive(table)
    assert memory.peak_bytes() < max(8 << 20, num_rows * TABLE_BYTES_PER_ROW)
    assert len(archive) == num_rows
    assert archive.classes == tuple(f"class {n}" for n in range(7))
    for number, (row, (slide, label, split)) in enumerate(zip(archive, rows, strict=True)):
        assert (row.slide, row.label, row.split, row.line) == (str(slide), label, split, number + 2)
        assert archive.class_index(row) == number % 7
    parts = [archive.split(name) for name in archive.splits]
    assert sorted(row.line for part in parts for row in part) == list(range(2, num_rows + 2))


LAZY = """
import json, sys
import dask, dask.array
import numpy as np
from ats_stream.io import ConvertConfig, open_pyramid, working_memory_bytes, write_pyramid
from ats_stream.io.reduce import LOADED_AFTER, halve

BLOCK = 1000

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(l for l in lines if l.startswith(key)).split()[1])

def make(block_info=None):
    (_, _), (y0, y1), (x0, x1) = block_info[None]["array-location"]
    y, x = np.ogrid[y0:y1, x0:x1]
    return ((y * 3 + x * 5) // 64 % 251).astype(np.uint8)[None]

def lazy(side):
    cuts = tuple(min(BLOCK, side - i) for i in range(0, side, BLOCK))
    empty = np.empty((0, 0, 0), np.uint8)
    return dask.array.map_blocks(make, chunks=((1,), cuts, cuts), dtype=np.uint8, meta=empty)

dask.config.set(scheduler="synchronous")
side, config = int(sys.argv[2]), ConvertConfig(shard_px=int(sys.argv[3]), num_threads=2)
# the compiler, which much work loads, is a library and no working memory
halve(np.zeros((1, 8192, LOADED_AFTER // 8192), np.uint8))
write_pyramid(lazy(1500), sys.argv[1] + "/warm", config)
before = status("VmRSS")
source = lazy(side)
write_pyramid(source, sys.argv[1] + "/a", config)
peak = status("VmHWM") - before
for y, x in np.random.default_rng(0).integers(0, side - 700, (20, 2)).tolist():
    box = open_pyramid(sys.argv[1] + "/a").read(0, (0, y, x), (1, y + 700, x + 700))
    np.testing.assert_array_equal(box, source[:, y : y + 700, x : x + 700].compute())
print(json.dumps([peak, working_memory_bytes(source.shape, "uint8", config)]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
@pytest.mark.parametrize(
    ("side", "shard_px"), [(4000, 2048), pytest.param(20_000, 4096, marks=pytest.mark.torture)]
)
def test_a_lazy_array_is_converted_within_the_memory_computed_before(
    tmp_path: Path, side: int, shard_px: int
) -> None:
    """The large array is twice what is computed, so it cannot have been held as a whole."""
    command = [sys.executable, "-c", LAZY, str(tmp_path), str(side), str(shard_px)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    peak_bytes, computed_bytes = json.loads(done.stdout)
    assert peak_bytes < computed_bytes
    assert computed_bytes < side**2 or side < 4 * shard_px
