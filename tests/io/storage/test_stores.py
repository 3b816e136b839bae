"""Stores that other tools wrote, and arrays of zarr-python with other codecs, cuts and versions."""

from __future__ import annotations

import pickle
import shutil
import warnings
import zipfile

import numcodecs
import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec

from ats_stream.errors import SlideError
from ats_stream.io import ngff, open_pyramid
from ats_stream.io.sources import StoreSource
from ats_stream.io.storage.remote import ObjectStore
from ats_stream.io.storage.store_error import StoreError
from ats_stream.io.storage.stores import LocalStore
from ats_stream.io.storage.zip_store import ZipStore
from ats_stream.io.zarr_source import ZarrSource

STORES = [
    "galaxy-v05/cyx_uint8.zarr",
    "galaxy-v05/input10.zarr",
    "galaxy-v05/input13.zarr",
    "galaxy-v05/input9.zarr",
    "galaxy-v05/yx_uint8_mask.zarr",
    "ngio/v04/images/test_image_c1yx.zarr",
    "ngio/v04/images/test_image_cyx.zarr",
    "ngio/v04/images/test_image_czyx.zarr",
    "ngio/v04/images/test_image_tcyx.zarr",
    "ngio/v04/images/test_image_tczyx.zarr",
    "ngio/v04/images/test_image_tyx.zarr",
    "ngio/v04/images/test_image_tzyx.zarr",
    "ngio/v04/images/test_image_yx.zarr",
    "ngio/v04/images/test_image_zyx.zarr",
    "ome-zarr-examples/valid/image-02.zarr",
    "ome-zarr-examples/valid/image-04.zarr",
    "ome-zarr-py-create/astronaut_v04.ome.zarr",
    "ome-zarr-py-create/coins_v05.ome.zarr",
]


def canonical(group, path):
    """(C, *space) by zarr-python and the axes alone, written apart from the code under test."""
    ome = group.attrs.get("ome", group.attrs)
    multiscale = ome["multiscales"][0]
    array = group[path][:]
    names = [a["name"].lower() for a in multiscale["axes"]]
    first = group[multiscale["datasets"][0]["path"]].shape
    for axis in reversed(range(len(names))):
        if names[axis] in "tz" and first[axis] == 1:
            array = array.take(0, axis)
            del names[axis]
    if "c" not in names:
        return array[None]
    return np.moveaxis(array, names.index("c"), 0)


def compare(path, group):
    return compare_opened(open_pyramid(path), group)


def compare_opened(pyramid, group):
    multiscale = group.attrs.get("ome", group.attrs)["multiscales"][0]
    rng = np.random.default_rng(0)
    for level, dataset in zip(pyramid.levels, multiscale["datasets"], strict=True):
        expected = canonical(group, dataset["path"])
        np.testing.assert_array_equal(pyramid.read(level), expected)
        assert level.shape == expected.shape
        assert level.dtype == expected.dtype.newbyteorder("=")
        size = [max(1, n // 2) for n in expected.shape[1:]]
        offsets = rng.integers([-n for n in size], expected.shape[1:], (6, len(size)))
        padded = np.pad(expected, [(0, 0), *((s, s) for s in size)], constant_values=1)
        for patch, offset in zip(pyramid.read_patches(level, offsets, size, fill=1), offsets, strict=True):
            box = tuple(slice(o + s, o + 2 * s) for o, s in zip(offset, size, strict=True))
            np.testing.assert_array_equal(patch, padded[(slice(None), *box)])
        assert pyramid.read_stats(level).num_chunks > 0
    return pyramid


@pytest.fixture(params=["folder", "zip", "http", "http zip"])
def packed(request, tmp_path, serve):
    """What makes of a folder the thing that is opened."""

    def make(folder):
        if request.param == "folder":
            return folder
        if request.param == "http":
            return serve(folder).url
        path = shutil.make_archive(str(tmp_path / "packed"), "zip", folder)
        return path if request.param == "zip" else f"{serve(tmp_path).url}/packed.zip"

    return make


@pytest.mark.parametrize("name", STORES)
def test_stores_of_other_tools(test_data, name, packed):
    path = test_data / "ngff" / name
    compare(packed(path), zarr.open_group(str(path), mode="r"))


@pytest.mark.parametrize("name", ["x_12bit_plant.zarr", "astronaut.zarr"])
def test_bioformats2raw_layout(test_data, name, packed):
    path = test_data / "ngff" / "bioformats2raw-v04" / name
    compare(packed(path), zarr.open_group(str(path / "0"), mode="r"))


def test_a_series_of_bioformats2raw_is_the_image(tmp_path, picture, packed):
    """The first series of that layout, whose root is no image itself."""
    image = picture((2, 50, 70), "uint16")
    root = zarr.create_group(str(tmp_path / "a"), zarr_format=2, attributes={"bioformats2raw.layout": 3})
    root.create_group("OME")
    group = root.create_group("0")
    keys = {"name": "v2", "separator": "/"}
    array = group.create_array(
        "0", shape=image.shape, chunks=(1, 16, 16), dtype=">u2", chunk_key_encoding=keys
    )
    array[:] = image
    attributes = ngff.build_image(name="s", axes="cyx", paths=["0"], downsamples=[(1, 1)], pixel_size_um=None)
    group.attrs.update({"multiscales": [{**attributes["ome"]["multiscales"][0], "version": "0.4"}]})
    path = packed(tmp_path / "a")
    np.testing.assert_array_equal(compare(path, group).read(0), image)
    assert open_pyramid(path).slide == f"{path}/0"


@pytest.mark.parametrize(("name", "label"), [("coins_v05", "coins"), ("astronaut_v04", "circles")])
def test_labels_of_other_tools(test_data, name, label, packed):
    path = test_data / "ngff" / "ome-zarr-py-create" / f"{name}.ome.zarr"
    pyramid = open_pyramid(packed(path))
    assert pyramid.label_names == (label,)
    group = zarr.open_group(str(path / "labels" / label), mode="r")
    first = group.attrs.get("ome", group.attrs)["multiscales"][0]["datasets"][0]["path"]
    np.testing.assert_array_equal(pyramid.label(label).read(0), canonical(group, first))


@pytest.mark.parametrize("name", ["image-01", "image-02", "image-03", "image-04"])
def test_invalid_stores_are_refused_in_one_line(test_data, name, packed):
    path = test_data / "ngff" / "ome-zarr-examples" / "invalid" / f"{name}.zarr"
    with pytest.raises(SlideError, match=r"^[^\n]+$"):
        open_pyramid(packed(path))


def make_store(target, image, axes="cyx", **arguments):
    group = zarr.create_group(str(target), zarr_format=3)
    ones = [(1,) * sum(a in "zyx" for a in axes)]
    array = group.create_array(
        "0", shape=image.shape, dtype=image.dtype, dimension_names=list(axes), **arguments
    )
    array[:] = image
    group.attrs.update(
        ngff.build_image(name="s", axes=axes, paths=["0"], downsamples=ones, pixel_size_um=None)
    )
    return group


CUTS = {
    "zstd": {"compressors": [ZstdCodec(level=3)]},
    "gzip": {"compressors": [GzipCodec()]},
    "blosc": {"compressors": [BloscCodec(cname="lz4", shuffle="shuffle", typesize=2)]},
    "raw": {"compressors": None},
    "crc32c": {"compressors": [ZstdCodec(), Crc32cCodec()]},
    "big": {"compressors": None, "serializer": BytesCodec(endian="big")},
    "transpose": {"filters": [TransposeCodec(order=(1, 2, 0))], "compressors": [ZstdCodec()]},
    "transpose-2": {"filters": [TransposeCodec(order=(2, 0, 1))], "compressors": None},
    "v2 keys": {"chunk_key_encoding": {"name": "v2", "separator": "."}},
    "dots": {"chunk_key_encoding": {"name": "default", "separator": "."}},
    "float fill": {"fill_value": 3},
}
V2_CUTS = {
    "blosc": {"compressors": numcodecs.Blosc(cname="zstd", shuffle=2)},
    "lz4": {"compressors": numcodecs.LZ4()},
    "zlib": {"compressors": numcodecs.Zlib()},
    "gzip": {"compressors": numcodecs.GZip()},
    "zstd": {"compressors": numcodecs.Zstd()},
    "raw": {"compressors": None},
    "fortran": {"order": "F"},
    "big": {"dtype": ">u2"},
    "big fortran": {"dtype": ">u2", "order": "F", "compressors": None},
    "slashes": {"chunk_key_encoding": {"name": "v2", "separator": "/"}},
    "no fill": {"fill_value": None},
    "fill": {"fill_value": 3},
}


@pytest.mark.parametrize("shards", [None, (2, 48, 32)], ids=["files", "shards"])
@pytest.mark.parametrize("cut", CUTS)
def test_core_codecs_are_read_directly(tmp_path, picture, cut, shards):
    image = picture((2, 50, 70), "uint16")
    image[:, 16:32, 16:48] = CUTS[cut].get("fill_value", 0)
    # one channel per chunk, so that chunks are cut along that axis too
    group = make_store(tmp_path / "a", image, chunks=(1, 16, 16), shards=shards, **CUTS[cut])
    pyramid = compare(tmp_path / "a", group)
    assert isinstance(pyramid._reader.sources[0], StoreSource)


@pytest.mark.filterwarnings("ignore")  # zarr-python warns that these codecs have no specification
@pytest.mark.parametrize("name", ["LZ4", "Zlib"])
def test_codecs_named_after_numcodecs_are_read_directly(tmp_path, picture, name):
    import zarr.codecs.numcodecs

    codec = getattr(zarr.codecs.numcodecs, name)()
    group = make_store(
        tmp_path / "a", picture((2, 50, 70), "uint16"), chunks=(1, 16, 16), compressors=[codec]
    )
    assert isinstance(compare(tmp_path / "a", group)._reader.sources[0], StoreSource)


KINDS = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}


ORDERS = [
    (axes, single)
    for axes in ("yx", "cyx", "zyx", "tyx", "czyx", "tcyx", "tzyx", "tczyx")
    for single in ("", "t", "z", "c", "tz", "tcz")  # axes of length 1
    if set(single) <= set(axes)
]


@pytest.mark.parametrize("version", ["0.5", "0.4 .", "0.4 /"])
@pytest.mark.parametrize(("axes", "single"), ORDERS)
def test_every_order_of_axes(tmp_path, axes, version, single):
    shape = tuple(
        1 if a in single else n for a, n in zip("tczyx", (2, 3, 4, 21, 30), strict=True) if a in axes
    )
    image = np.random.default_rng(0).integers(0, 2**16, shape, dtype=np.uint16)
    number, _, separator = version.partition(" ")
    group = zarr.create_group(str(tmp_path / "a"), zarr_format=2 if separator else 3)
    keys = {"chunk_key_encoding": {"name": "v2", "separator": separator}} if separator else {}
    chunks = tuple(min(n, 2 if a in "tcz" else 16) for a, n in zip(axes, shape, strict=True))
    group.create_array("0", shape=shape, dtype=image.dtype, chunks=chunks, **keys)[:] = image
    multiscale = {
        "axes": [{"name": a, "type": KINDS[a]} for a in axes],
        "datasets": [
            {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1.0] * len(axes)}]}
        ],
    }
    group.attrs.update(
        {"multiscales": [{**multiscale, "version": "0.4"}]}
        if separator
        else {"ome": {"version": number, "multiscales": [multiscale]}}
    )
    pyramid = compare(tmp_path / "a", group)
    assert pyramid.axes == ("c", *(a for a in axes if a != "c" and (a in "yx" or a not in single)))
    assert isinstance(pyramid._reader.sources[0], StoreSource)


@pytest.mark.parametrize("cut", V2_CUTS)
def test_zarr_v2_is_read_directly(tmp_path, picture, cut):
    image = picture((2, 50, 70), "uint16")
    image[:, 16:32, 16:48] = V2_CUTS[cut].get("fill_value") or 0
    group = zarr.create_group(str(tmp_path / "a"), zarr_format=2)
    options = {"dtype": "uint16", "fill_value": 0, **V2_CUTS[cut]}
    array = group.create_array("0", shape=image.shape, chunks=(1, 16, 16), **options)
    array[:] = image
    attributes = ngff.build_image(name="s", axes="cyx", paths=["0"], downsamples=[(1, 1)], pixel_size_um=None)
    group.attrs.update({"multiscales": [{**attributes["ome"]["multiscales"][0], "version": "0.4"}]})
    pyramid = compare(tmp_path / "a", group)
    assert isinstance(pyramid._reader.sources[0], StoreSource)
    np.testing.assert_array_equal(pyramid.read(0), image)


@pytest.mark.parametrize("dtype", ["bool", "int8", "int64", "uint32", "float16", "float64"])
def test_dtypes(tmp_path, dtype):
    image = np.random.default_rng(0).integers(0, 2, (1, 20, 30)).astype(dtype)
    compare(tmp_path / "a", make_store(tmp_path / "a", image, chunks=(1, 16, 16)))


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -1.5])
def test_special_fill_values(tmp_path, fill):
    group = make_store(tmp_path / "a", np.ones((1, 8, 8), "float32"), chunks=(1, 8, 8), fill_value=fill)
    group["0"].resize((1, 16, 8))
    np.testing.assert_array_equal(
        open_pyramid(tmp_path / "a").read(0)[0, 8:], np.full((8, 8), fill, "float32")
    )


def test_other_codecs_go_through_zarr_python(tmp_path, picture, caplog, monkeypatch, packed):
    monkeypatch.setattr("ats_stream.io.zarr_source._told", set())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr-python warns that this codec has no specification
        from zarr.codecs.numcodecs import BZ2

        image = picture((2, 50, 70))
        group = make_store(tmp_path / "a", image, chunks=(2, 16, 16), compressors=[BZ2()])
        files = [p for p in (tmp_path / "a" / "0" / "c").rglob("*") if p.is_file()]
        nbytes = sum(p.stat().st_size for p in files)
        path = packed(tmp_path / "a")
        pyramid = compare(path, group)
        again = open_pyramid(path)
        again.read(0)
        copy = pickle.loads(pickle.dumps(again))
        np.testing.assert_array_equal(copy.read(0), image)
    assert isinstance(pyramid._reader.sources[0], ZarrSource)
    # of a remote store the size of a chunk would take a request more
    assert again.read_stats(0).stored_bytes == (0 if "://" in str(path) else nbytes)
    # once per process and codec, whatever the number of images
    assert [r.message for r in caplog.records] == [
        f"{path}/0: codecs bytes + numcodecs.bz2 are read through zarr-python, which is slower"
    ]


def test_stores_list_what_they_hold(tmp_path):
    folder = tmp_path / "a.zarr"
    expected = {"zarr.json": 2, "0/zarr.json": 3, "0/c/0/0/0": 7, "labels/m/zarr.json": 1}
    for key, nbytes in expected.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(b"x" * nbytes)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for key in expected:
            archive.write(folder / key, f"a.zarr/{key}")
    assert dict(LocalStore(folder).objects()) == expected
    assert dict(ZipStore(LocalStore(tmp_path), "a.zip").objects()) == expected
    with pytest.raises(StoreError, match="cannot list"):
        list(LocalStore(tmp_path / "none").objects())
    with pytest.raises(StoreError, match="web servers do not list what is under http://host/a"):
        list(ObjectStore("http://me:word@host/a").objects())
