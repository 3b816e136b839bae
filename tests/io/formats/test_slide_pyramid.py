"""Slides, TIFF files and pictures opened in place hold what plain reads by tifffile, OpenSlide or Pillow
give.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from ats_stream.errors import InputError, SlideError
from ats_stream.io import ConvertConfig, convert, open_pyramid

if TYPE_CHECKING:
    from pathlib import Path

    from ats_stream.io import Pyramid

TIFFS = [
    "wsi/aperio/CMU-1-Small-Region.svs",
    "wsi/tiff/CMU-1-Small-Region.jpeg.tiff",
    "wsi/tiff/CMU-1-Small-Region.webp.tiff",
    "wsi/ometiff/2048x2048_ome6_tiled.ome.tif",
    "wsi/openslide-python-fixtures/boxes.tiff",
    "wsi/openslide-python-fixtures/small.svs",
    "geotiff/cog.tif",
    "nd/4D-series.ome.tiff",
    "nd/filament.tif",
]
OPENSLIDE_SLIDES = [
    "wsi/ndpi/test3-DAPI-2-387.ndpi",
    "wsi/dicom/camelyon_multiframe_jpeg.dcm",
    "wsi/openslide-python-fixtures/boxes_0.dcm",
    "wsi/openslide-python-fixtures/boxes_1.dcm",
]
PICTURES = [
    "images/bmng.jpg",
    "histology/skimage_ihc.png",
    "minerva/CRC01_he_L4L6/4_0_0.jpg",
    "minerva/tonsil_cycif/DNA_0__DNA/2_0_0.jpg",
    "wsi/openslide-python-fixtures/boxes.png",
]


def tiff_levels(path: Path) -> list[np.ndarray]:
    """All levels (c, *space) as tifffile reads them."""
    with tifffile.TiffFile(path) as tiff:
        return [as_channels_first(level.asarray(), level.axes) for level in tiff.series[0].levels]


def as_channels_first(array: np.ndarray, axes: str) -> np.ndarray:
    channel = next((a for a in axes if a in "SCIQ"), None)
    if channel is None:
        return array[None]
    return np.moveaxis(array, axes.index(channel), 0)


def openslide_levels(path: Path) -> list[np.ndarray]:
    with openslide.OpenSlide(path) as slide:
        return [
            np.asarray(slide.read_region((0, 0), i, size).convert("RGB")).transpose(2, 0, 1)
            for i, size in enumerate(slide.level_dimensions)
        ]


def crop(level: np.ndarray, offset: Any, size: tuple[int, ...], fill: float) -> np.ndarray:
    """One patch by plain slicing of the level with a margin of the fill value around it."""
    out = np.full((level.shape[0], *size), fill, level.dtype)
    begin = np.clip(offset, 0, level.shape[1:])
    end = np.clip(np.add(offset, size), 0, level.shape[1:])
    if (end > begin).all():
        inside = tuple(slice(b, e) for b, e in zip(begin, end, strict=True))
        target = tuple(slice(b - o, e - o) for b, e, o in zip(begin, end, offset, strict=True))
        out[(slice(None), *target)] = level[(slice(None), *inside)]
    return out


def assert_same(pyramid: Pyramid, levels: list[np.ndarray], *, num_patches: int = 12) -> None:
    """Every level whole, and patches anywhere on it and around it."""
    assert [(v.shape, v.dtype) for v in pyramid.levels] == [(v.shape, v.dtype) for v in levels]
    rng = np.random.default_rng(0)
    for index, expected in enumerate(levels):
        np.testing.assert_array_equal(pyramid.read(index), expected)
        space = np.array(expected.shape[1:])
        size = tuple(int(n) for n in np.minimum(space, 37) + rng.integers(0, 90, len(space)))
        size = (*np.minimum(size[:-2], 2).tolist(), *size[-2:])
        far = rng.integers(-np.array(size) - 3, space + 4, (num_patches, len(space)))
        corners = np.array([-np.array(size) + 1, space - 1, space - np.array(size)])
        offsets = np.concatenate([far, corners])
        patches = pyramid.read_patches(index, offsets, size, fill=7)
        for offset, patch in zip(offsets, patches, strict=True):
            np.testing.assert_array_equal(patch, crop(expected, offset, size, 7))


@pytest.mark.parametrize("name", TIFFS)
def test_tiff_levels_are_those_of_tifffile(test_data, name):
    assert_same(open_pyramid(test_data / name), tiff_levels(test_data / name))


@pytest.mark.parametrize("name", OPENSLIDE_SLIDES)
def test_other_slides_are_those_of_openslide(test_data, name):
    assert_same(open_pyramid(test_data / name), openslide_levels(test_data / name), num_patches=6)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_those_of_pillow(test_data, name):
    with Image.open(test_data / name) as picture:
        pixels = np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))
    image = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    assert_same(open_pyramid(test_data / name), [image], num_patches=6)


def test_a_gigapixel_file_is_read_in_patches_at_every_level(test_data):
    path = test_data / "geotiff" / "cog_world.tif"
    pyramid = open_pyramid(path)
    assert pyramid.levels[0].shape == (1, 18000, 36000)
    rng = np.random.default_rng(1)
    with openslide.OpenSlide(path) as theirs, tifffile.TiffFile(path) as tiff:
        for level in pyramid.levels:
            factor = round(level.downsample[0])
            offsets = rng.integers(0, np.maximum(1, np.array(level.shape[1:]) - 128), (8, 2))
            patches = pyramid.read_patches(level, offsets, (128, 128))
            # OpenSlide interpolates where the factor is no whole number
            is_whole = (factor * level.shape[1], factor * level.shape[2]) == (18000, 36000)
            whole = None if is_whole else tiff.series[0].levels[level.index].asarray()
            for (y, x), patch in zip(offsets.tolist(), patches, strict=True):
                if whole is None:
                    region = theirs.read_region((x * factor, y * factor), level.index, (128, 128))
                    expected = np.asarray(region)[..., 0]
                else:
                    expected = whole[y : y + 128, x : x + 128]
                np.testing.assert_array_equal(patch[0], expected)
    # what was read is a few tiles, not the level
    assert pyramid.read_stats(0).num_chunks <= 8 * 4


@pytest.mark.parametrize("name", [*TIFFS[:1], *TIFFS[3:5], OPENSLIDE_SLIDES[1], PICTURES[1]])
def test_conversion_writes_the_pixels_that_are_read_in_place(test_data, tmp_path, name):
    convert(test_data / name, tmp_path / "a.zarr", ConvertConfig(shard_px=512, tissue=False))
    np.testing.assert_array_equal(
        open_pyramid(tmp_path / "a.zarr").read(0), open_pyramid(test_data / name).read(0)
    )


@pytest.mark.parametrize("name", [TIFFS[0], TIFFS[7], OPENSLIDE_SLIDES[0], PICTURES[1]])
def test_copies_threads_caches_and_dask_read_the_same(test_data, name):
    pyramid = open_pyramid(test_data / name)
    level = pyramid.levels[-1]
    expected = pyramid.read(level)
    copy = pickle.loads(pickle.dumps(pyramid))
    assert (copy.levels, copy.axes, copy.channels) == (pyramid.levels, pyramid.axes, pyramid.channels)
    np.testing.assert_array_equal(copy.read(level), expected)
    np.testing.assert_array_equal(np.asarray(pyramid.dask(level)), expected)
    threaded = open_pyramid(test_data / name, num_threads=3, cache_bytes=64 << 20)
    np.testing.assert_array_equal(threaded.read(level), expected)
    np.testing.assert_array_equal(threaded.read(level), expected)
    chunks = -(-np.array(level.shape) // level.chunk_shape)
    assert threaded.read_stats(level).num_chunks == chunks.prod()


def test_facts_of_slides(test_data):
    ndpi = open_pyramid(test_data / OPENSLIDE_SLIDES[0])
    assert [v.downsample for v in ndpi.levels] == [(2.0**i,) * 2 for i in range(7)]
    assert ndpi.level_for(pixel_size_um=0.9).index == 2
    assert ndpi.level_for(downsample=30).index == 5
    assert ndpi.levels[3].pixel_size_um == pytest.approx((1.8254, 1.8254), abs=1e-4)
    assert ndpi.associated_names == ("macro",)
    assert ndpi.associated("macro").shape[0] == 3
    assert dict(ndpi.metadata) == {"vendor": "hamamatsu", "objective_power": 40.0}
    assert [c.label for c in ndpi.channels] == ["R", "G", "B"]
    assert ndpi.thumbnail(100).shape == (3, 76, 62)
    with pytest.raises(InputError, match="no associated image 'label', there are"):
        ndpi.associated("label")

    series = open_pyramid(test_data / "nd" / "4D-series.ome.tiff")
    assert (series.axes, series.levels[0].shape) == (("c", "t", "z", "y", "x"), (1, 7, 5, 167, 439))
    stack = open_pyramid(test_data / "nd" / "filament.tif")
    assert stack.axes == ("c", "z", "y", "x")
    assert stack.levels[0].pixel_size_um == pytest.approx((0.23985, 0.021462, 0.021462), rel=1e-4)


def test_associated_images_are_those_of_openslide_also_after_pickling(slide_path):
    pyramid = pickle.loads(pickle.dumps(open_pyramid(slide_path)))
    assert sorted(pyramid.associated_names) == ["label", "macro", "thumbnail"]
    with openslide.OpenSlide(slide_path) as theirs:
        for name in pyramid.associated_names:
            expected = np.asarray(theirs.associated_images[name].convert("RGB")).transpose(2, 0, 1)
            np.testing.assert_array_equal(pyramid.associated(name), expected)


DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "tiles": {"tile": (32, 48)},
    "strips": {"rowsperstrip": 11},
    "deflate": {"tile": (32, 48), "compression": "deflate", "predictor": True},
    "big": {"tile": (32, 48), "bigtiff": True, "byteorder": ">"},
    "lzw": {"tile": (32, 48), "compression": "lzw"},
    "zstd": {"tile": (32, 48), "compression": "zstd"},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_and_layout_with_levels(tmp_path, picture, layout, dtype):
    levels = [picture((2, n, n + n // 5), dtype, seed=n) for n in (100, 50, 25)]
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True, **{
        k: v for k, v in LAYOUTS[layout].items() if k in {"bigtiff", "byteorder"}
    }) as writer:  # fmt: skip
        options = {k: v for k, v in LAYOUTS[layout].items() if k not in {"bigtiff", "byteorder"}}
        metadata = {"axes": "CYX", "Channel": {"Name": ["DNA", "CD8"]}, "PhysicalSizeX": 0.25,
                    "PhysicalSizeY": 0.5}  # fmt: skip
        options["photometric"] = "minisblack"
        writer.write(levels[0], subifds=2, metadata=metadata, **options)
        for level in levels[1:]:
            writer.write(level, subfiletype=1, **options)
    pyramid = open_pyramid(tmp_path / "a.ome.tif")
    assert_same(pyramid, levels, num_patches=5)
    assert [c.label for c in pyramid.channels] == ["DNA", "CD8"]
    assert [v.pixel_size_um for v in pyramid.levels] == [(0.5, 0.25), (1.0, 0.5), (2.0, 1.0)]


@pytest.mark.parametrize("axes", ["ZYX", "TYX", "TZYX", "CZYX", "ZCYX", "TZCYX", "TCYX", "ZYXS", "CSYX"])
def test_every_order_of_axes(tmp_path, axes):
    sizes = {"T": 3, "Z": 2, "C": 4, "Y": 20, "X": 31, "S": 3}
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 999, [sizes[a] for a in axes], dtype=np.uint16)
    options = {"photometric": "rgb", "planarconfig": "separate"} if "SY" in axes else {}
    if axes.endswith("S"):
        options = {"photometric": "rgb"}
    tifffile.imwrite(
        tmp_path / "a.tif", stored, metadata={"axes": axes}, **({"photometric": "minisblack"} | options)
    )
    pyramid = open_pyramid(tmp_path / "a.tif")
    space = [a for a in "TZ" if a in axes]
    assert pyramid.axes == ("c", *(a.lower() for a in space), "y", "x")
    channel = [a for a in "CS" if a in axes]
    expected = stored.transpose([axes.index(a) for a in (*channel, *space, "Y", "X")])
    expected = expected.reshape(-1, *expected.shape[len(channel) :])
    assert_same(pyramid, [expected])


def test_an_imagej_stack_of_one_page_is_read_whole(tmp_path):
    stack = np.random.default_rng(0).integers(0, 99, (5, 20, 30), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", stack, imagej=True, truncate=True, metadata={"axes": "ZYX"})
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert len(tiff.pages) == 1
    assert_same(open_pyramid(tmp_path / "a.tif"), [stack[None]])


@pytest.mark.parametrize("kind", ["png", "jp2"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_pictures_keep_their_depth(tmp_path, picture, kind, dtype, channels):
    import imagecodecs

    image = picture((channels, 40, 53), dtype)
    pixels = image[0] if channels == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    if kind == "png":
        data = imagecodecs.png_encode(pixels)
    else:
        data = imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="jp2", reversible=True)
    (tmp_path / f"a.{kind}").write_bytes(data)
    assert_same(open_pyramid(tmp_path / f"a.{kind}"), [image])


def test_more_slides_than_are_kept_open_are_read(test_data, monkeypatch):
    from ats_stream.io.formats import openslide_source
    from ats_stream.io.formats.kept import Kept

    monkeypatch.setattr(openslide_source, "_open_slides", Kept(1))
    one, two = (open_pyramid(test_data / name) for name in OPENSLIDE_SLIDES[1:3])
    expected = [openslide_levels(test_data / name)[0] for name in OPENSLIDE_SLIDES[1:3]]
    for _ in range(2):
        np.testing.assert_array_equal(one.read(0), expected[0])
        np.testing.assert_array_equal(two.read(0), expected[1])


def test_more_tiff_levels_than_decoders_are_kept_are_read(test_data, monkeypatch):
    from ats_stream.io.formats import tile_source
    from ats_stream.io.formats.kept import Kept

    monkeypatch.setattr(tile_source, "_decoders", Kept(1))
    pyramid = open_pyramid(test_data / TIFFS[4])
    for index, expected in enumerate(tiff_levels(test_data / TIFFS[4])):
        np.testing.assert_array_equal(pyramid.read(index), expected)


@pytest.mark.parametrize(
    ("photometric", "layout"),
    [("rgb", {"tile": (32, 48)}), ("ycbcr", {"tile": (32, 48)}), ("minisblack", {"tile": (32, 48)}),
     ("rgb", {"rowsperstrip": 16}), ("ycbcr", {"tile": (32, 48), "planarconfig": "separate"})],
)  # fmt: skip
def test_tiles_of_jpeg_are_those_of_tifffile(tmp_path, picture, monkeypatch, photometric, layout):
    """Whole tiles of 8 bits are decoded without tifffile; planes and strips cut off are left to it."""
    from ats_stream.io.formats import tile_source

    image = picture((1 if photometric == "minisblack" else 3, 100, 130))
    image = image[0] if len(image) == 1 else image if "planarconfig" in layout else image.transpose(1, 2, 0)
    if "planarconfig" in layout:
        photometric = "rgb"
    tifffile.imwrite(tmp_path / "a.tif", image, photometric=photometric, compression="jpeg", **layout)
    expected = tiff_levels(tmp_path / "a.tif")[0]
    num_direct = []
    decode = tile_source.JpegFormat.decode

    def count(self: Any, *arguments: Any) -> Any:
        tile = decode(self, *arguments)
        num_direct.append(1)
        return tile

    monkeypatch.setattr(tile_source.JpegFormat, "decode", count)
    np.testing.assert_array_equal(open_pyramid(tmp_path / "a.tif").read(0), expected)
    assert len(num_direct) == {"tile": 12, "rowsperstrip": 6}[next(iter(layout))] * (len(layout) == 1)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.svs"
    path.write_bytes(b"II*\0")

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(SlideError, match=r"a\.svs: cannot read it: Permission denied"):
        open_pyramid(path)


def test_a_picture_larger_than_the_bound_is_refused_before_it_is_decoded(tmp_path):
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99))
    (tmp_path / "bomb.png").write_bytes(data + chunk(b"IEND", b""))
    with pytest.raises(SlideError, match=r"bomb\.png: the picture is too large to be read whole"):
        open_pyramid(tmp_path / "bomb.png")


@pytest.mark.parametrize("compression", ["jpeg", "webp", "jpeg2000"])
def test_a_tile_that_declares_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, picture, compression):
    import imagecodecs

    image = picture((3, 64, 64)).transpose(1, 2, 0)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image, tile=(64, 64), photometric="rgb", compression=compression)
    encode = {"jpeg": imagecodecs.jpeg8_encode, "webp": imagecodecs.webp_encode,
              "jpeg2000": imagecodecs.jpeg2k_encode}[compression]  # fmt: skip
    huge = bytes(encode(np.zeros((3000, 3000, 3), np.uint8)))
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        entries = [page.tags[name] for name in ("TileOffsets", "TileByteCounts")]
        places = [(tag.valueoffset, tag.dtype.name) for tag in entries]
    data = bytearray(path.read_bytes())
    for (at, kind), value in zip(places, (len(data), len(huge)), strict=True):
        size = {"SHORT": 2, "LONG": 4, "LONG8": 8}[kind]
        data[at : at + size] = value.to_bytes(size, "little")
    path.write_bytes(bytes(data) + huge)
    pyramid = open_pyramid(path)
    with pytest.raises(SlideError, match=r"declares 3000 x 3000 pixels, the tile has 64 x 64|for 12288 of"):
        pyramid.read(0)


def test_ome_metadata_that_list_endless_planes_are_refused(tmp_path):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, np.zeros((2, 20, 30), np.uint8), metadata={"axes": "CYX"}, ome=True)
    data = path.read_bytes()
    begin = data.index(b"<Image")
    end = data.index(b' SizeT="1"')
    begin = data.rindex(b' SizeC="2"', begin, end)
    room = end + len(b' SizeT="1"') - begin
    text = b' SizeC="2" SizeT="999999999"'
    # written over the sizes of Z and T, and spaces for what is left
    path.write_bytes(data[:begin] + text.ljust(room) + data[begin + room :])
    with pytest.raises(SlideError, match="OME metadata list 1999999998 planes"):
        open_pyramid(path)
