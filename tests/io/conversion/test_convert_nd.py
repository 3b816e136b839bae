"""Volumes, time, channels, lines, videos, and stores of OME-Zarr as sources of conversions."""

from __future__ import annotations

import itertools
import json
import math

import dask.array
import numpy as np
import pytest
import tifffile

from ats_stream.errors import InputError, SlideError
from ats_stream.io import ConvertConfig, convert, open_pyramid, verify, write_pyramid
from ats_stream.io.conversion.layout import MAX_SHARD_BYTES, block_shapes
from ats_stream.io.reduce import halve

CONFIG = ConvertConfig(chunk_px=8, shard_px=16, coarsest_px=12)


def naive_half(level):
    """Exact means by Python's integers, rounded half to even; what is cut off averages what is there."""
    out = np.empty((level.shape[0], *(-(-n // 2) for n in level.shape[1:])), level.dtype)
    for place in np.ndindex(*out.shape[1:]):
        box = tuple(slice(2 * p, 2 * p + 2) for p in place)
        for c in range(level.shape[0]):
            values = level[(c, *box)]
            if level.dtype.kind == "f":
                out[(c, *place)] = values.astype(np.float64).mean()
            else:
                num, rest = divmod(sum(int(v) for v in values.flat), values.size)
                up = 2 * rest > values.size or (2 * rest == values.size and num % 2)
                out[(c, *place)] = num + up
    return out


def random(shape, dtype, seed=0):
    rng, kind = np.random.default_rng(seed), np.dtype(dtype)
    if kind.kind == "f":
        return rng.normal(size=shape).astype(kind)
    low, high = np.iinfo(kind).min, np.iinfo(kind).max
    return rng.integers(low, high, shape, dtype=kind, endpoint=True)


CASES = [
    (("c", "x"), (2, 75)),
    (("c", "y", "x"), (4, 37, 30)),
    (("c", "z", "y", "x"), (2, 9, 20, 33)),
    (("c", "t", "y", "x"), (1, 35, 18, 17)),
    (("c", "t", "z", "y", "x"), (1, 5, 3, 17, 20)),
]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "float32"])
@pytest.mark.parametrize(("axes", "shape"), CASES, ids=["".join(axes) for axes, _ in CASES])
def test_every_level_is_the_exact_mean(tmp_path, assert_valid, axes, shape, dtype):
    image = random(shape, dtype)
    write_pyramid(image, tmp_path / "a.zarr", CONFIG, axes=axes)
    assert_valid(tmp_path / "a.zarr")
    pyramid = open_pyramid(tmp_path / "a.zarr")
    expected = image[:, None] if axes == ("c", "x") else image
    assert pyramid.axes == (("c", "y", "x") if axes == ("c", "x") else axes)
    assert max(pyramid.levels[-1].shape[1:]) <= 12 < max(pyramid.levels[-2].shape[1:])
    for level in pyramid.levels:
        got = pyramid.read(level)
        if level.dtype.kind == "f":
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(got, expected)
        # of numbers as they were stored: no level adds up the rounding of those above it
        expected = naive_half(got)
    assert verify(tmp_path / "a.zarr", num_threads=1).findings == ()


@pytest.mark.parametrize("num_axes", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int32"])
def test_halves_at_the_ends_of_every_type(num_axes, dtype):
    """All values largest, smallest, or next to each other, so that sums would overflow and ties occur."""
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    for seed, shape in enumerate(itertools.product((1, 2, 5), repeat=num_axes)):
        for values in ([high], [low], [low, high], [0, 1], [high - 1, high]):
            image = np.random.default_rng(seed).choice(values, (1, *shape)).astype(dtype)
            np.testing.assert_array_equal(halve(image), naive_half(image))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_large_halves_are_those_of_small_parts(dtype):
    """Compiled code makes large ones, numpy small ones."""
    image = random((3, 401, 603), dtype)
    half = halve(image)
    for y, x in itertools.product(range(0, 401, 100), range(0, 603, 100)):
        part = halve(image[:, y : y + 100, x : x + 100])
        np.testing.assert_array_equal(half[:, y // 2 : y // 2 + 50, x // 2 : x // 2 + 50], part)


def test_scales_and_shifts_of_time_and_depth(tmp_path):
    write_pyramid(
        random((1, 20, 6, 40, 40), "uint8"),
        tmp_path / "a.zarr",
        CONFIG,
        pixel_size_um=(math.nan, 2, 0.5, 0.5),
    )
    pyramid = open_pyramid(tmp_path / "a.zarr")
    assert [level.pixel_size_um[1:] for level in pyramid.levels] == [(2, 0.5, 0.5), (4, 1, 1), (8, 2, 2)]
    assert all(math.isnan(level.pixel_size_um[0]) for level in pyramid.levels)
    meta = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())["attributes"]["ome"]["multiscales"][0]
    assert [(a["name"], a["type"], a.get("unit")) for a in meta["axes"]] == [
        ("t", "time", None),
        ("c", "channel", None),
        ("z", "space", "micrometer"),
        ("y", "space", "micrometer"),
        ("x", "space", "micrometer"),
    ]
    assert meta["datasets"][1]["coordinateTransformations"] == [
        {"type": "scale", "scale": [2, 1, 4, 1, 1]},
        {"type": "translation", "translation": [0.5, 0, 1, 0.25, 0.25]},
    ]


def test_a_dask_pipeline_ends_in_a_store(tmp_path):
    image = random((2, 20, 60, 50), "uint16")
    lazy = (dask.array.from_array(image, chunks=(1, 7, 33, 50)) // 2).astype("uint16")
    write_pyramid(lazy, tmp_path / "a.zarr", CONFIG)
    np.testing.assert_array_equal(open_pyramid(tmp_path / "a.zarr").read(0), image // 2)

    def broken(block):
        raise RuntimeError("no such thing")

    wrong = dask.array.from_array(image, chunks=20).map_blocks(broken, dtype="uint16", meta=image[:0])
    with pytest.raises(SlideError, match="cannot be computed: RuntimeError: no such thing"):
        write_pyramid(wrong, tmp_path / "b.zarr", CONFIG)
    assert not list(tmp_path.glob("b.*"))


def test_what_is_no_image_is_refused(tmp_path):
    for array, axes, says in (
        (np.zeros((2, 3, 4)), ("x", "y", "c"), "axes of an image"),
        (np.zeros((2, 3)), ("c", "y", "x"), "must be numbers"),
        (np.zeros((2, 3, 4), complex), None, "must be numbers"),
        (np.zeros((0, 3, 4)), None, "must be numbers"),
    ):
        with pytest.raises(InputError, match=says):
            write_pyramid(array, tmp_path / "a.zarr", axes=axes)
    with pytest.raises(SlideError, match="int64 cannot be averaged"):
        write_pyramid(np.zeros((1, 3, 4), np.int64), tmp_path / "a.zarr")
    assert list(tmp_path.iterdir()) == []


def test_a_stack_of_pages_and_a_copy_of_the_copy(tmp_path, assert_valid):
    volume = random((9, 40, 50), "uint16")
    tifffile.imwrite(tmp_path / "z.tif", volume, photometric="minisblack", metadata={"axes": "ZYX"})
    convert(tmp_path / "z.tif", tmp_path / "a.zarr", CONFIG)
    np.testing.assert_array_equal(open_pyramid(tmp_path / "a.zarr").read(0)[0], volume)
    other = ConvertConfig(chunk_px=4, shard_px=8, coarsest_px=12, profile="lz4")
    convert(tmp_path / "a.zarr", tmp_path / "b.zarr", other)
    assert_valid(tmp_path / "b.zarr")
    first, second = open_pyramid(tmp_path / "a.zarr"), open_pyramid(tmp_path / "b.zarr")
    assert (second.name, second.metadata) == (first.name, first.metadata)
    for level in first.levels:
        np.testing.assert_array_equal(second.read(level.index), first.read(level))


@pytest.mark.parametrize("name", ["ngff/ome-zarr-py-create/astronaut_v04.ome.zarr", "nd/4D-series.ome.tiff"])
def test_real_images_of_other_kinds(test_data, tmp_path, assert_valid, name):
    convert(test_data / name, tmp_path / "a.zarr", ConvertConfig(shard_px=512))
    assert_valid(tmp_path / "a.zarr")
    source, target = open_pyramid(test_data / name), open_pyramid(tmp_path / "a.zarr")
    assert (target.axes, target.levels[0].shape) == (source.axes, source.levels[0].shape)
    np.testing.assert_array_equal(target.read(0), source.read(0))


def test_a_video_becomes_t_y_x(tmp_path, assert_valid):
    av = pytest.importorskip("av")
    frames = random((20, 36, 48, 3), "uint8")
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 36, "bgr0"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    convert(tmp_path / "a.mkv", tmp_path / "a.zarr", ConvertConfig(chunk_px=8, shard_px=16, coarsest_px=24))
    assert_valid(tmp_path / "a.zarr")
    pyramid = open_pyramid(tmp_path / "a.zarr")
    assert pyramid.axes == ("c", "t", "y", "x")
    np.testing.assert_array_equal(pyramid.read(0), frames.transpose(3, 0, 1, 2))
    np.testing.assert_array_equal(pyramid.read(1), halve(pyramid.read(0)))


@pytest.mark.parametrize("channels", [1, 3, 7, 60])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("space", [("y", "x"), ("z", "y", "x"), ("t", "y", "x"), ("t", "z", "y", "x")])
def test_shards_are_even_multiples_of_chunks_within_bounds(space, dtype, channels):
    shape = (channels, *(5000 for _ in space))
    wanted = [None, 1 << 16, 1 << 20, 1 << 30]
    volumes = []
    for shard_bytes, chunk_px in itertools.product(wanted, (None, 60, 7)):
        chunk, shard = block_shapes(
            shape, ("c", *space), dtype, chunk_px=chunk_px, shard_bytes=shard_bytes, bytes_per_px=2
        )
        assert all(s % c == 0 for c, s in zip(chunk, shard, strict=True))
        assert all(s % 2 == 0 for s in shard[1:])
        smallest = math.prod(c if c % 2 == 0 else 2 * c for c in chunk[1:]) * channels
        nbytes = math.prod(shard) * np.dtype(dtype).itemsize
        assert nbytes <= max(MAX_SHARD_BYTES, 64 * smallest * np.dtype(dtype).itemsize)
        volumes.append(math.prod(shard))
    assert volumes[3] <= volumes[6] <= volumes[9]
