"""What we write, opened by other libraries: the same pixels, pixel for pixel, whatever the profile."""

from __future__ import annotations

import json

import numpy as np
import pytest
import zarr

from ats_stream.io import ConvertConfig, convert, open_pyramid, verify, write_pyramid

PROFILES = ("lossless", "lz4", "raw")


def picture():
    """(C, y, x): wider than three shards of 256, and cut off at the edge."""
    return np.random.default_rng(0).integers(0, 255, (3, 500, 700), dtype=np.uint8)


def volume():
    """(C, t, z, y, x): wider than a shard of 64, and cut off at the edge."""
    return np.random.default_rng(0).integers(0, 4000, (2, 2, 5, 70, 90), dtype=np.uint16)


@pytest.fixture(scope="session")
def stores(slide_path, tmp_path_factory):
    """A picture and a volume over time for each profile, and a real slide whose tiles are copied."""
    folder = tmp_path_factory.mktemp("peers")
    convert(slide_path, folder / "slide-pass", ConvertConfig(profile="pass", keep_associated=True))
    for profile in PROFILES:
        flat = ConvertConfig(profile=profile, chunk_px=128, shard_px=256)
        write_pyramid(picture(), folder / f"picture-{profile}", flat, pixel_size_um=0.5)
        deep = ConvertConfig(profile=profile, chunk_px=16, shard_px=64, coarsest_px=32)
        sizes = (float("nan"), 2.0, 0.5, 0.5)
        write_pyramid(volume(), folder / f"volume-{profile}", deep, pixel_size_um=sizes)
    return folder


LOSSLESS = [f"{kind}-{profile}" for kind in ("picture", "volume") for profile in PROFILES]
ALL = [*LOSSLESS, "slide-pass"]


def image(folder):
    """The one multiscale image of a group."""
    attributes = json.loads((folder / "zarr.json").read_text())["attributes"]
    return attributes["ome"]["multiscales"][0]


def paths(folder):
    return [dataset["path"] for dataset in image(folder)["datasets"]]


def stored(folder, number):
    """A level as we read it, in the order of the stored axes."""
    pyramid = open_pyramid(folder)
    names = [axis["name"] for axis in image(folder)["axes"]]
    return pyramid.read(number).transpose([pyramid.axes.index(name) for name in names])


def test_level_0_is_the_source(stores, slide_path):
    sources = {"picture": picture(), "volume": volume(), "slide": open_pyramid(slide_path).read(0)}
    for name in ALL:
        np.testing.assert_array_equal(open_pyramid(stores / name).read(0), sources[name.split("-")[0]])


@pytest.mark.parametrize("name", ALL)
def test_zarr_python_reads_the_same_pixels(stores, name):
    group = zarr.open_group(str(stores / name), mode="r")
    for number, path in enumerate(paths(stores / name)):
        np.testing.assert_array_equal(group[path][...], stored(stores / name, number))
        names = [axis["name"] for axis in image(stores / name)["axes"]]
        assert list(group[path].metadata.dimension_names) == names


@pytest.mark.parametrize("name", ALL)
def test_dask_reads_the_same_pixels(stores, name):
    dask_array = pytest.importorskip("dask.array")
    for number, path in enumerate(paths(stores / name)):
        lazy = dask_array.from_zarr(str(stores / name / path))
        np.testing.assert_array_equal(lazy.compute(scheduler="synchronous"), stored(stores / name, number))


@pytest.mark.parametrize("name", LOSSLESS)
def test_tensorstore_reads_the_same_pixels(stores, name):
    tensorstore = pytest.importorskip("tensorstore")
    for number, path in enumerate(paths(stores / name)):
        kvstore = {"driver": "file", "path": str(stores / name / path)}
        array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True).result()
        np.testing.assert_array_equal(array.read().result(), stored(stores / name, number))


@pytest.mark.parametrize("name", ALL)
# its dependencies warn about their own future
@pytest.mark.filterwarnings("ignore")
def test_ome_zarr_py_reads_the_same_pixels_and_labels(stores, name):
    ome_zarr_io = pytest.importorskip("ome_zarr.io", reason="ome-zarr is not installed (extra bench)")
    reader = pytest.importorskip("ome_zarr.reader")
    nodes = list(reader.Reader(ome_zarr_io.parse_url(str(stores / name)))())
    first = nodes[0]
    assert [axis["name"] for axis in first.metadata["axes"]] == [
        a["name"] for a in image(stores / name)["axes"]
    ]
    assert len(first.data) == len(paths(stores / name))
    for number, level in enumerate(first.data):
        np.testing.assert_array_equal(level.compute(scheduler="synchronous"), stored(stores / name, number))
    scales = [transforms[0]["scale"] for transforms in first.metadata["coordinateTransformations"]]
    levels = open_pyramid(stores / name).levels
    assert [scale[-2:] for scale in scales] == [list(level.pixel_size_um[-2:]) for level in levels]
    if not name.startswith("volume"):
        (label,) = (node for node in nodes if "tissue" in str(node.zarr))
        expected = open_pyramid(stores / name).label("tissue").read(0)[0]
        np.testing.assert_array_equal(label.data[0].compute(scheduler="synchronous"), expected)


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_wrong_with_them(stores, name):
    assert verify(stores / name).findings == ()


@pytest.mark.parametrize("name", ALL)
def test_both_validators_agree(stores, name):
    import yaozarrs
    from ome_zarr_models.v05 import Image

    yaozarrs.validate_zarr_store(str(stores / name))
    Image.from_zarr(zarr.open_group(str(stores / name), mode="r"))
