"""The attention image: the map bit for bit, over the slide, and readable elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from ats_stream.io import open_pyramid, verify
from ats_stream.predictions.attention_image import write_attention

DOWNSAMPLE = (16.0, 15.5)
PIXEL_UM = (0.5, 0.25)


def attention(shape: tuple[int, int] = (300, 700)) -> np.ndarray:
    values = np.random.default_rng(0).random(shape).astype(np.float32) ** 8
    return values / values.sum()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("attention") / "a.ome.zarr"
    return write_attention(place, attention(), downsample=DOWNSAMPLE, pixel_size_um=PIXEL_UM, name="a")


def test_level_0_is_the_map_and_the_others_are_means(image: Path) -> None:
    pyramid = open_pyramid(image)
    assert [level.shape for level in pyramid.levels] == [(1, 300, 700), (1, 150, 350), (1, 75, 175)]
    assert pyramid.levels[0].dtype == np.float32
    np.testing.assert_array_equal(pyramid.read(0)[0], attention())
    means = attention().astype(np.float64).reshape(150, 2, 350, 2).mean((1, 3))
    np.testing.assert_allclose(pyramid.read(1)[0], means, rtol=1e-6)


def test_it_lies_over_the_slide(image: Path) -> None:
    import zarr

    multiscale = zarr.open_group(str(image), mode="r").attrs["ome"]["multiscales"][0]
    assert [axis["name"] for axis in multiscale["axes"]] == ["c", "y", "x"]
    for number, dataset in enumerate(multiscale["datasets"]):
        scale, move = (t[t["type"]] for t in dataset["coordinateTransformations"])
        for axis, (factor, size) in enumerate(zip(DOWNSAMPLE, PIXEL_UM, strict=True), start=1):
            covered = factor * 2**number  # level-0 pixels under one of this level
            assert scale[axis] == covered * size
            # the centre of the first one is that of the pixels 0 to covered - 1 under it
            assert move[axis] == pytest.approx((covered - 1) / 2 * size)


def test_other_readers_and_validators_take_it(image: Path) -> None:
    import yaozarrs
    import zarr
    from ome_zarr_models.v05 import Image

    yaozarrs.validate_zarr_store(str(image))
    Image.from_zarr(zarr.open_group(str(image), mode="r"))
    assert verify(image).findings == ()


NAPARI = Path(sys.prefix) / "share" / "napari"  # 'make setup' installs what napari.txt names


@pytest.mark.filterwarnings("ignore")  # its dependencies warn about their own future
def test_ome_zarr_py_reads_the_same_values(image: Path) -> None:
    ome_zarr_io = pytest.importorskip("ome_zarr.io", reason="ome-zarr is not installed (extra bench)")
    reader = pytest.importorskip("ome_zarr.reader")
    (node,) = reader.Reader(ome_zarr_io.parse_url(str(image)))()
    np.testing.assert_array_equal(node.data[0].compute(scheduler="synchronous")[0], attention())
    scale, move = node.metadata["coordinateTransformations"][0]
    assert scale["scale"] == [1.0, 8.0, 3.875]
    assert move["translation"] == [0.0, 3.75, 1.8125]
    assert node.metadata["contrast_limits"] == [[0.0, float(attention().max())]]


@pytest.mark.filterwarnings("ignore")
def test_napari_reads_the_same_values(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(NAPARI)])
    reader = pytest.importorskip("napari_ome_zarr._reader", reason="napari-ome-zarr is not installed")
    ((data, metadata, kind),) = reader.napari_get_reader(str(image))(str(image))
    assert kind == "image"
    np.testing.assert_array_equal(np.asarray(data[0])[0], attention())
    assert metadata["scale"] == [8.0, 3.875]
    assert metadata["contrast_limits"] == [[0.0, float(attention().max())]]


def test_one_that_is_there_is_replaced(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        flat = np.full((3, 4), value, np.float32)
        write_attention(tmp_path / "a.ome.zarr", flat, downsample=(8, 8), pixel_size_um=None, name="a")
    assert open_pyramid(tmp_path / "a.ome.zarr").read(0).max() == 2.0
    assert open_pyramid(tmp_path / "a.ome.zarr").levels[0].pixel_size_um is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.ome.zarr"]
