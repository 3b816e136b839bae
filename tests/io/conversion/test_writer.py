from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from ats_stream.errors import StorageError, TargetExistsError
from ats_stream.io import Channel, PyramidWriter, open_pyramid
from ats_stream.io.conversion import array_writer
from ats_stream.io.layout import grid_shape


def write_level(writer, level, image):
    _, side_y, side_x = writer.shard_shape(level)
    for row, column in np.ndindex(*grid_shape(image.shape[1:], (side_y, side_x))):
        y, x = row * side_y, column * side_x
        writer.write_shard(level, (row, column), image[:, y : y + side_y, x : x + side_x])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("codec", ["zstd", "raw"])
def test_zarr_python_reads_what_was_written(tmp_path, picture, assert_valid, dtype, codec):
    image = picture((2, 150, 217), dtype)
    coarse = picture((2, 75, 109), dtype, seed=1)
    target = tmp_path / "a.zarr"
    with PyramidWriter(
        target,
        level_shapes=[image.shape, coarse.shape],
        dtype=dtype,
        pixel_size_um=(0.5, 0.25),
        chunk_px=16,
        shard_px=64,
        codec=codec,
        channels=["one", Channel(label="two", color="00FF00")],
    ) as writer:
        write_level(writer, 0, image)
        write_level(writer, 1, coarse)
    assert_valid(target)
    group = zarr.open_group(str(target), mode="r")
    np.testing.assert_array_equal(group["0"][:], image)
    np.testing.assert_array_equal(group["1"][:], coarse)
    assert group["0"].chunks == (2, 16, 16)
    assert group["0"].shards == (2, 64, 64)
    assert group["0"].metadata.dimension_names == ("c", "y", "x")
    pyramid = open_pyramid(target)
    assert [c.label for c in pyramid.channels] == ["one", "two"]
    assert [level.pixel_size_um for level in pyramid.levels] == [(0.5, 0.25), (1.0, 0.5)]


def test_stored_bytes_is_what_lies_on_the_disk(tmp_path, picture):
    with PyramidWriter(
        tmp_path / "a", level_shapes=[(3, 200, 200)], dtype="uint8", chunk_px=32, shard_px=64
    ) as writer:
        write_level(writer, 0, picture((3, 200, 200)))
        writer.write_chunks(0, {(1, 1): np.zeros((3, 32, 32), np.uint8)})
        writer.write_label("m", np.eye(20, dtype=np.uint16), downsample=10)
        writer.write_associated("macro", picture((3, 30, 20)))
        writer.write_associated("label", picture((1, 7, 9)))
    on_disk = sum(p.stat().st_size for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert writer.stored_bytes == on_disk


def test_chunks_of_fill_value_are_absent(tmp_path):
    image = np.full((3, 64, 64), 255, np.uint8)
    image[:, 20:30, 40:50] = 7
    with PyramidWriter(
        tmp_path / "a", level_shapes=[(3, 64, 64)], dtype="uint8", chunk_px=16, shard_px=32, fill_value=255
    ) as writer:
        sizes = dict.fromkeys(np.ndindex(2, 2), 0)
        for row, column in sizes:
            block = image[:, row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
            sizes[row, column] = writer.write_shard(0, (row, column), block)
    assert [place for place, size in sizes.items() if size] == [(0, 1)]
    assert [p.name for p in (tmp_path / "a" / "0" / "c" / "0" / "0").iterdir()] == ["1"]
    pyramid = open_pyramid(tmp_path / "a")
    np.testing.assert_array_equal(pyramid.read(0), image)
    stats = pyramid.read_stats(0)
    # all sixteen chunks were looked at, one is stored
    assert stats.num_chunks == 16
    assert stats.decoded_bytes == image.nbytes
    assert 0 < stats.stored_bytes < sizes[0, 1]


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=5), max_size=4)
)
def test_chunks_written_in_several_calls_merge(tmp_path_factory, calls):
    """Chunks of 8 px in shards of 24 px, an image of 37 x 50 px: both are cut off at the edge."""
    folder = tmp_path_factory.mktemp("merge")
    expected = np.zeros((2, 37, 50), np.uint16)
    with PyramidWriter(
        folder / "a", level_shapes=[expected.shape], dtype="uint16", chunk_px=8, shard_px=24, num_threads=1
    ) as writer:
        for number, places in enumerate(calls):
            blocks = {}
            for row, column in places:
                value = number * 100 + row * 10 + column
                part = expected[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
                part[:] = value
                blocks[row, column] = (
                    part.copy() if (row + column) % 2 else np.full((2, 8, 8), value, np.uint16)
                )
            writer.write_chunks(0, blocks)
    np.testing.assert_array_equal(zarr.open_array(str(folder / "a" / "0"), mode="r")[:], expected)


def test_a_sparse_gigapixel_image_is_small_and_needs_no_dense_array(tmp_path, picture):
    """100,000 x 100,000 px (30 GB of pixels) with four chunks."""
    shape = (3, 100_000, 100_000)
    block = picture((3, 128, 128))
    blocks = {(0, 0): block, (5, 700): block, (390, 390): block, (781, 781): block[:, :32, :32]}
    with PyramidWriter(tmp_path / "a", level_shapes=[shape, (3, 98, 98)], dtype="uint8") as writer:
        writer.write_chunks(0, blocks)
    assert writer.stored_bytes < 500_000
    pyramid = open_pyramid(tmp_path / "a")
    assert pyramid.levels[1].downsample == (1020.0, 1020.0)
    patches = pyramid.read_patches(0, [[640, 700 * 128], [99_968, 99_968]], (128, 128), fill=9)
    np.testing.assert_array_equal(patches[0], block)
    np.testing.assert_array_equal(patches[1, :, :32, :32], block[:, :32, :32])
    assert (patches[1, :, 32:] == 9).all()


def test_levels_of_any_factor(tmp_path, picture, assert_valid):
    coarse = picture((3, 20, 30))
    with PyramidWriter(
        tmp_path / "a", level_shapes=[(3, 640, 960), (3, 20, 30)], dtype="uint8", pixel_size_um=0.25
    ) as writer:
        writer.write_shard(1, (0, 0), coarse)
        writer.write_label("digit", np.ones((20, 30), np.uint8), downsample=32)
    assert_valid(tmp_path / "a")
    pyramid = open_pyramid(tmp_path / "a")
    assert pyramid.levels[1].downsample == (32.0, 32.0)
    assert pyramid.levels[1].pixel_size_um == (8.0, 8.0)
    assert pyramid.label("digit").levels[0].pixel_size_um == (8.0, 8.0)
    31 * 0.25 / 2
    transforms = json.loads((tmp_path / "a" / "zarr.json").read_text())["attributes"]["ome"]["multiscales"][0]
    assert transforms["datasets"][1]["coordinateTransformations"][1]["translation"] == [
        0,
        31 * 0.25 / 2,
        31 * 0.25 / 2,
    ]


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "int32"])
def test_labels_are_valid_and_read_back(tmp_path, assert_valid, dtype):
    mask = np.random.default_rng(0).integers(0, 2, (33, 47)).astype(dtype)
    with PyramidWriter(
        tmp_path / "a", level_shapes=[(3, 64, 64), (3, 32, 32), (3, 16, 16)], dtype="uint8", fill_value=255
    ) as writer:
        writer.write_label("mask", mask, downsample=2, colors={1: (255, 0, 0, 255)})
        writer.write_label("other", mask.astype(np.uint8))
    assert_valid(tmp_path / "a")
    pyramid = open_pyramid(tmp_path / "a")
    assert pyramid.label_names == ("mask", "other")
    label = pyramid.label("mask")
    assert [level.shape for level in label.levels] == [(1, 33, 47), (1, 17, 24), (1, 9, 12)]
    np.testing.assert_array_equal(label.read(0)[0], mask)
    assert label.levels[0].dtype == ("uint8" if dtype == "bool" else dtype)


def test_an_existing_target_stays_as_it_is(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(TargetExistsError, match="exists already"):
        PyramidWriter(tmp_path / "a", level_shapes=[(3, 8, 8)], dtype="uint8").__enter__()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "mine")]


def test_overwrite_replaces_only_at_the_end(tmp_path):
    def write(value, fail):
        with PyramidWriter(
            tmp_path / "a", level_shapes=[(1, 8, 8)], dtype="uint8", chunk_px=8, shard_px=8, overwrite=True
        ) as writer:
            writer.write_shard(0, (0, 0), np.full((1, 8, 8), value, np.uint8))
            if fail:
                raise RuntimeError("stop")

    write(1, fail=False)
    with pytest.raises(RuntimeError, match="stop"):
        write(2, fail=True)
    assert (open_pyramid(tmp_path / "a").read(0) == 1).all()
    write(3, fail=False)
    assert (open_pyramid(tmp_path / "a").read(0) == 3).all()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_nothing_is_left_after_an_exception(tmp_path, error):
    def run():
        with PyramidWriter(
            tmp_path / "a", level_shapes=[(3, 64, 64)], dtype="uint8", chunk_px=8, shard_px=64
        ) as writer:
            writer.write_shard(0, (0, 0), np.ones((3, 64, 64), np.uint8))
            assert len(list(tmp_path.iterdir())) == 1
            raise error

    with pytest.raises(type(error)):
        run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails_at", range(6))
def test_a_full_disk_at_any_file_leaves_nothing(tmp_path, monkeypatch, fails_at):
    """Every file written once fails in turn: array metadata, shards, label, group metadata."""
    files = []
    write = array_writer.write_parts

    def failing(path, parts):
        files.append(path)
        if len(files) > fails_at:
            write(path, list(parts)[:1])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, parts)

    monkeypatch.setattr(array_writer, "write_parts", failing)

    def run():
        with PyramidWriter(
            tmp_path / "a.zarr", level_shapes=[(1, 16, 8)], dtype="uint8", chunk_px=8, shard_px=8
        ) as writer:
            writer.write_shard(0, (0, 0), np.ones((1, 8, 8), np.uint8))
            writer.write_chunks(0, {(1, 0): np.ones((1, 8, 8), np.uint8)})
            writer.write_label("m", np.zeros((2, 2), np.uint8))

    with pytest.raises(StorageError, match=r"a\.zarr/.*: cannot write: No space left on device") as caught:
        run()
    assert "partial" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


FILE_LIMIT = """
import resource, signal, sys
import numpy as np
from ats_stream.errors import StorageError
from ats_stream.io import PyramidWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
noise = np.random.default_rng(0).integers(0, 255, (3, 512, 512), dtype=np.uint8)
try:
    with PyramidWriter(sys.argv[1], level_shapes=[noise.shape], dtype="uint8") as writer:
        writer.write_shard(0, (0, 0), noise)
except StorageError as error:
    print(error)
"""


def test_the_system_refusing_to_write_is_a_storage_error(tmp_path):
    target = tmp_path / "a.zarr"
    done = subprocess.run(
        [sys.executable, "-c", FILE_LIMIT, str(target)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == f"{target}/0/c/0/0/0: cannot write: File too large"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"level_shapes": []}, "level_shapes"),
        ({"level_shapes": [(8, 8)]}, "level_shapes"),
        ({"level_shapes": [(3, 8, 8), (1, 4, 4)]}, "level_shapes"),
        ({"level_shapes": [(3, 8, 8), (3, 16, 4)]}, "fine to coarse"),
        ({"shard_px": 20, "chunk_px": 8}, "multiple of chunk_px"),
        ({"codec": "jpeg"}, "'jpeg'"),
        ({"fill_value": 256}, "256 does not fit"),
        ({"fill_value": 0.5}, "does not fit"),
        ({"dtype": "complex64"}, "complex64"),
        ({"downsamples": [1, 2]}, "2 downsamples for 1 levels"),
        ({"pixel_size_um": -1}, "positive"),
        ({"channels": ["a"]}, "1 channel names for 3 channels"),
    ],
)
def test_arguments_that_do_not_fit_are_named(tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        PyramidWriter(tmp_path / "a", **{"level_shapes": [(3, 8, 8)], "dtype": "uint8", **change})
    assert list(tmp_path.iterdir()) == []


def test_blocks_that_do_not_fit_are_named(tmp_path):
    with PyramidWriter(
        tmp_path / "a", level_shapes=[(3, 20, 20)], dtype="uint8", chunk_px=8, shard_px=16
    ) as writer:
        with pytest.raises(ValueError, match=r"must be uint8 \(3, 4, 16\), got uint8 \(3, 16, 16\)"):
            writer.write_shard(0, (1, 0), np.zeros((3, 16, 16), np.uint8))
        with pytest.raises(ValueError, match=r"must be uint8 \(3, 16, 16\), got uint16"):
            writer.write_shard(0, (0, 0), np.zeros((3, 16, 16), np.uint16))
        with pytest.raises(ValueError, match="lies outside"):
            writer.write_chunks(0, {(3, 0): np.zeros((3, 8, 8), np.uint8)})
        with pytest.raises(ValueError, match=r"must be uint8 \(3, 8, 8\), got uint8 \(3, 5, 8\)"):
            writer.write_chunks(0, {(0, 0): np.zeros((3, 5, 8), np.uint8)})
        with pytest.raises(ValueError, match="no level 1"):
            writer.write_shard(1, (0, 0), np.zeros((3, 16, 16), np.uint8))
        for name, mask in (
            ("a/b", np.zeros((2, 2), int)),
            ("..", np.zeros((2, 2), int)),
            ("m", np.zeros((2, 2))),
        ):
            with pytest.raises(ValueError, match="must be new, a file name, and an integer"):
                writer.write_label(name, mask)
    with pytest.raises(ValueError, match="inside its 'with' block"):
        writer.write_shard(0, (0, 0), np.zeros((3, 16, 16), np.uint8))
