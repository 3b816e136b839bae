"""Arrays of every kind as pyramids: the same pixels, whatever holds them."""

from __future__ import annotations

import pickle

import dask.array
import numpy as np
import pytest
import zarr

from ats_stream.errors import InputError, SlideError
from ats_stream.io import open_pyramid


def make(kind, image, tmp_path):
    if kind == "numpy":
        return image
    if kind == "dask":
        return dask.array.from_array(image, chunks=(1, *(7 for _ in image.shape[1:])))
    chunks = (image.shape[0], *(8 for _ in image.shape[1:]))
    options = {"zarr": {}, "zarr v2": {"zarr_format": 2}, "shards": {"shards": tuple(2 * n for n in chunks)}}
    array = zarr.create_array(
        str(tmp_path / "a"), shape=image.shape, chunks=chunks, dtype=image.dtype, **options[kind]
    )
    array[:] = image
    return zarr.open_array(str(tmp_path / "a"), mode="r")


@pytest.mark.parametrize("kind", ["numpy", "dask", "zarr", "zarr v2", "shards"])
@pytest.mark.parametrize("axes", [("c", "y", "x"), ("c", "t", "y", "x"), ("c", "t", "z", "y", "x")])
def test_every_kind_of_array_is_read_the_same(tmp_path, kind, axes):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 60_000, (3, *(4, 5)[: len(axes) - 3], 20, 33), np.uint16)
    pyramid = open_pyramid(make(kind, image, tmp_path), axes=axes, cache_bytes=1 << 20)
    assert (pyramid.axes, pyramid.levels[0].shape, pyramid.levels[0].dtype) == (
        axes,
        image.shape,
        image.dtype,
    )
    np.testing.assert_array_equal(pyramid.read(0), image)
    np.testing.assert_array_equal(np.asarray(pyramid.dask(0)), image)
    size = (2,) * (len(axes) - 3) + (9, 11)
    offset = [1] * (len(axes) - 3) + [-4, 28]
    patch = pyramid.read_patches(0, [offset], size, fill=5)[0]
    inside = tuple(slice(1, 3) for _ in size[:-2])
    np.testing.assert_array_equal(
        patch[..., 4:, :5], image[(slice(None), *inside, slice(0, 5), slice(28, 33))]
    )
    assert (patch[..., :4, :] == 5).all()
    assert (patch[..., 5:] == 5).all()
    copy = pickle.loads(pickle.dumps(pyramid))
    np.testing.assert_array_equal(copy.read(0), image)


def test_a_list_of_arrays_is_the_levels():
    rng = np.random.default_rng(0)
    levels = [rng.random((2, n, n), np.float32) for n in (101, 51, 26)]
    mixed = [levels[0], dask.array.from_array(levels[1], chunks=16), levels[2]]
    pyramid = open_pyramid(mixed, pixel_size_um=(0.5, 0.25))
    assert [v.downsample for v in pyramid.levels] == [(1.0, 1.0), (2.0, 2.0), (4.0, 4.0)]
    assert pyramid.levels[2].pixel_size_um == (2.0, 1.0)
    assert pyramid.level_for(pixel_size_um=0.7).index == 1
    for index, level in enumerate(levels):
        np.testing.assert_array_equal(pyramid.read(index), level)
    assert pyramid.thumbnail(26).shape == (2, 26, 26)
    assert pyramid.associated_names == ()


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        (np.zeros((2, 2)), {}, r"axes of an array pyramid are c, then .* for shape \(2, 2\)"),
        (np.zeros((1, 2, 2)), {"axes": ("y", "x", "c")}, "axes of an array pyramid are c"),
        (np.zeros((1, 2, 2)), {"axes": ("c", "z", "y", "x")}, r"over c, z, y, x, got .*\(1, 2, 2\)"),
        (np.zeros((1, 0, 2)), {}, "must be numbers over c, y, x"),
        (np.zeros((1, 2, 2), "S3"), {}, "must be numbers over c, y, x"),
        ([np.zeros((1, 2, 2)), np.zeros((1, 4, 4))], {}, "finest first"),
        ([np.zeros((1, 2, 2)), np.zeros((2, 1, 1))], {}, "levels differ"),
        ([np.zeros((1, 2, 2)), np.zeros((1, 1, 1), np.uint8)], {}, "levels differ"),
        (np.zeros((1, 2, 2)), {"pixel_size_um": (1.0,)}, "one positive number for each"),
        (np.zeros((1, 2, 2)), {"pixel_size_um": (1.0, -1.0)}, "one positive number for each"),
        ("a.svs", {"axes": ("c", "y", "x")}, "axes and pixel_size_um are for arrays"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_image_are_refused_in_words(source, options, says):
    with pytest.raises(InputError, match=says):
        open_pyramid(source, **options)


def test_what_fails_while_an_array_is_computed_is_named():
    def fail(block):
        raise RuntimeError("no such\nthing")

    broken = dask.array.zeros((1, 8, 8), chunks=4).map_blocks(fail, dtype=float, meta=np.empty((0, 0, 0)))
    with pytest.raises(SlideError, match=r"level 0: chunk \(0, 0, 0\) .*RuntimeError: no such thing"):
        open_pyramid(broken).read(0)
