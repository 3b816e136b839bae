from __future__ import annotations

import os
import shutil
import struct

import numpy as np
import openslide
import pytest
import tifffile
from pass_slides import write_dicom

from ats_stream.errors import InputError, SlideError
from ats_stream.io import open_pyramid, open_slide
from ats_stream.io.conversion.slides import FileSlide
from ats_stream.io.formats.openslide_source import companion_files, read_openslide
from ats_stream.io.formats.parts import opaque
from ats_stream.io.formats.tiff import ome_pixel_size_um

OPENSLIDE_READS = [
    "wsi/aperio/CMU-1-Small-Region.svs",
    "wsi/tiff/CMU-1-Small-Region.jpeg.tiff",
    "wsi/openslide-python-fixtures/boxes.tiff",
    "wsi/openslide-python-fixtures/small.svs",
    "wsi/dicom/camelyon_multiframe_jpeg.dcm",
    "wsi/ndpi/test3-DAPI-2-387.ndpi",
]
TIFFFILE_READS = [
    "wsi/aperio/CMU-1-Small-Region.svs",
    "wsi/tiff/CMU-1-Small-Region.jpeg.tiff",
    "wsi/tiff/CMU-1-Small-Region.webp.tiff",
    "wsi/ometiff/2048x2048_ome6_tiled.ome.tif",
    "geotiff/cog.tif",
]


def regions(shape, seed=0):
    """Boxes all over the image, the corners among them."""
    rng = np.random.default_rng(seed)
    _, height, width = shape
    yield 0, 0, min(height, 300), min(width, 301)
    yield max(0, height - 17), max(0, width - 300), min(17, height), min(300, width)
    for _ in range(12):
        y, x = int(rng.integers(height)), int(rng.integers(width))
        yield (
            y,
            x,
            int(rng.integers(1, min(700, height - y) + 1)),
            int(rng.integers(1, min(700, width - x) + 1)),
        )


@pytest.mark.parametrize("name", OPENSLIDE_READS)
def test_regions_equal_openslide(test_data, name):
    with open_slide(test_data / name) as slide, openslide.OpenSlide(test_data / name) as theirs:
        assert slide.shape == (3, theirs.dimensions[1], theirs.dimensions[0])
        for y, x, height, width in regions(slide.shape):
            expected = np.asarray(theirs.read_region((x, y), 0, (width, height)).convert("RGB"))
            np.testing.assert_array_equal(slide.read_region(y, x, height, width), expected.transpose(2, 0, 1))


@pytest.mark.parametrize("name", TIFFFILE_READS)
def test_regions_equal_tifffile(test_data, name):
    with tifffile.TiffFile(test_data / name) as tiff:
        expected = tiff.series[0].asarray()
        if tiff.series[0].axes == "YXS":
            expected = expected.transpose(2, 0, 1)
        expected = expected.reshape(-1, *expected.shape[-2:])
    with open_slide(test_data / name) as slide:
        assert (slide.shape, slide.dtype) == (expected.shape, expected.dtype)
        for y, x, height, width in regions(slide.shape):
            got = slide.read_region(y, x, height, width)
            np.testing.assert_array_equal(got, expected[:, y : y + height, x : x + width])


LAYOUTS = {
    "tiles": {"tile": (64, 48)},
    "strips": {"rowsperstrip": 7},
    "one strip": {},
    "planar tiles": {"tile": (64, 48), "planarconfig": "separate"},
    "planar strips": {"rowsperstrip": 9, "planarconfig": "separate"},
    "deflate": {"tile": (32, 32), "compression": "deflate", "predictor": True},
    "big": {"tile": (32, 32), "bigtiff": True},
    "big-endian": {"tile": (32, 32), "byteorder": ">"},
}


@pytest.mark.parametrize("samples", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiff_layouts_round_trip(tmp_path, picture, layout, dtype, samples):
    options = LAYOUTS[layout]
    image = picture((samples, 100, 133), dtype)
    if samples == 1:
        options = {k: v for k, v in options.items() if k != "planarconfig"}
        stored, photometric = image[0], "minisblack"
    else:
        stored = image if options.get("planarconfig") else image.transpose(1, 2, 0)
        photometric = "rgb"
    extra = {"extrasamples": ["unassalpha"]} if samples == 4 else {}
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric=photometric, metadata=None, **options, **extra)
    with open_slide(tmp_path / "a.tif") as slide:
        # transparency is no channel
        visible = image[:3]
        assert (slide.shape, slide.dtype) == (visible.shape, visible.dtype)
        for y, x, height, width in regions(slide.shape):
            got = slide.read_region(y, x, height, width)
            np.testing.assert_array_equal(got, visible[:, y : y + height, x : x + width])


def test_facts_of_a_real_slide(slide_path):
    with open_slide(slide_path) as slide:
        assert slide.shape == (3, 2967, 2220)
        assert slide.pixel_size_um == (0.499, 0.499)
        assert slide.dtype == np.uint8
        assert dict(slide.metadata) == {"vendor": "aperio", "compression": "JPEG", "objective_power": 20.0}
        assert sorted(slide.associated_names) == ["label", "macro", "thumbnail"]
        assert slide.level_shapes == ((3, 2967, 2220),)
        assert slide.source_bytes == slide_path.stat().st_size
        with openslide.OpenSlide(slide_path) as theirs:
            for name in slide.associated_names:
                expected = np.asarray(theirs.associated_images[name].convert("RGB")).transpose(2, 0, 1)
                np.testing.assert_array_equal(slide.associated(name), expected)
        with pytest.raises(InputError, match="no associated image 'x'"):
            slide.associated("x")


def test_a_slide_cut_at_any_length_is_refused(slide_path, tmp_path):
    data = slide_path.read_bytes()
    lengths = [
        0,
        1,
        3,
        8,
        16,
        100,
        len(data) - 500,
        len(data) - 40,
        *(len(data) * i // 23 for i in range(1, 23)),
        len(data) - 1,
    ]
    for length in lengths:
        cut = tmp_path / "cut.svs"
        cut.write_bytes(data[:length])
        with pytest.raises(SlideError, match=r"cut\.svs: (truncated|not a slide|broken TIFF)[^\n]*$"):
            open_slide(cut)


def test_a_tiff_cut_within_its_tiles_names_the_first_one_missing(tmp_path, picture):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture((3, 256, 256)).transpose(1, 2, 0), tile=(64, 64), photometric="rgb")
    data = path.read_bytes()
    with tifffile.TiffFile(path) as tiff:
        offsets, counts = tiff.pages[0].dataoffsets, tiff.pages[0].databytecounts
    for index, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
        for length in (offset, offset + 1, offset + count - 1):
            path.write_bytes(data[:length])
            where = rf"tile {index} \(row {index // 4}, column {index % 4}\)"
            with pytest.raises(
                SlideError, match=f"truncated: {where} needs bytes {offset} to {offset + count}, "
            ):
                open_slide(path)


def tile_table(path):
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        return page.tags["TileOffsets"].valueoffset, page.dataoffsets, page.databytecounts


def test_a_tile_that_points_past_the_end_is_refused(slide_path, tmp_path):
    table, offsets, _ = tile_table(slide_path)
    data = bytearray(slide_path.read_bytes())
    data[table + 4 * 57 : table + 4 * 58] = struct.pack("<I", len(data) - 10)
    (tmp_path / "a.svs").write_bytes(data)
    assert offsets[57] < len(data)
    with pytest.raises(SlideError, match=r"a\.svs: truncated: tile 57 \(row 5, column 7\)"):
        open_slide(tmp_path / "a.svs")


@pytest.mark.parametrize("damage", ["zeros", "no end", "noise"])
def test_a_damaged_tile_is_an_error_and_the_others_are_read(slide_path, tmp_path, damage):
    _, offsets, counts = tile_table(slide_path)
    data = bytearray(slide_path.read_bytes())
    offset, count = offsets[12], counts[12]
    if damage == "zeros":
        data[offset : offset + count] = bytes(count)
    elif damage == "no end":
        data[offset + count // 2 : offset + count] = bytes(count - count // 2)
    else:
        data[offset : offset + count - 2] = np.random.default_rng(0).bytes(count - 2)
    (tmp_path / "a.svs").write_bytes(data)
    with open_slide(tmp_path / "a.svs") as slide, open_slide(slide_path) as whole:
        np.testing.assert_array_equal(slide.read_region(0, 0, 240, 2220), whole.read_region(0, 0, 240, 2220))
        with pytest.raises(SlideError, match=r"damaged: .*tile 12 \(row 1, column 2\)"):
            slide.read_region(240, 480, 10, 10)


def test_a_tile_without_bytes_is_damage_in_colour_and_no_data_in_measurements(tmp_path, picture):
    for samples in (1, 3):
        path = tmp_path / f"{samples}.tif"
        image = picture((samples, 64, 64))
        stored = image[0] if samples == 1 else image.transpose(1, 2, 0)
        tifffile.imwrite(
            path,
            stored,
            tile=(32, 32),
            metadata=None,
            photometric="minisblack" if samples == 1 else "rgb",
            extratags=[(42113, "s", 0, "7", True)],
        )
        with tifffile.TiffFile(path) as tiff:
            tag = tiff.pages[0].tags["TileByteCounts"]
            start, code = tag.valueoffset, {"SHORT": "<H", "LONG": "<I"}[tag.dtype.name]
        data = bytearray(path.read_bytes())
        data[start : start + struct.calcsize(code)] = struct.pack(code, 0)
        path.write_bytes(data)
        with open_slide(path) as slide:
            if samples == 3:
                with pytest.raises(SlideError, match=r"tile 0 .* has no bytes"):
                    slide.read_region(0, 0, 64, 64)
            else:
                region = slide.read_region(0, 0, 64, 64)
                assert (region[0, :32, :32] == 7).all()
                np.testing.assert_array_equal(region[0, 32:], image[0, 32:])


@pytest.mark.parametrize("nodata", [None, 9])
def test_a_sparse_colour_tiff_shows_no_data_where_it_has_no_tiles(tmp_path, picture, nodata):
    image = picture((3, 70, 90))
    tiles = [image.transpose(1, 2, 0)[y : y + 32, x : x + 32] for y in (0, 32, 64) for x in (0, 32, 64)]
    tiles = [np.pad(t, [(0, 32 - n) for n in t.shape[:2]] + [(0, 0)]).tobytes() for t in tiles]
    for missing in (0, 4):
        tiles[missing] = b""
    tifffile.imwrite(
        tmp_path / "a.tif",
        iter(tiles),
        shape=(70, 90, 3),
        dtype=np.uint8,
        tile=(32, 32),
        photometric="rgb",
        metadata=None,
        extratags=[] if nodata is None else [(42113, "s", 0, str(nodata), True)],
    )
    expected = image.copy()
    expected[:, :32, :32] = expected[:, 32:64, 32:64] = nodata or 0
    np.testing.assert_array_equal(open_pyramid(tmp_path / "a.tif").read(0), expected)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "a.tif"), expected.transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a slide"),
        (b"hello", "not a slide"),
        (b"II*\x00", "truncated|broken"),
        (b"\x89PNG\r\n\x1a\n", "not a slide|broken"),
        (b"II*\x00\x08\x00\x00\x00\xff\xff", "truncated"),
        (b"II*\x00\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00", "broken TIFF"),
    ],
)
def test_files_that_are_no_slide(tmp_path, content, says):
    (tmp_path / "a.svs").write_bytes(content)
    with pytest.raises(SlideError, match=rf"a\.svs: ({says})[^\n]*$"):
        open_slide(tmp_path / "a.svs")


def test_a_chain_of_pages_in_a_circle_ends(tmp_path):
    width_tag = struct.pack("<HHII", 256, 4, 1, 20)
    head = b"II*\0\x08\0\0\0" + b"\1\0" + width_tag + b"\x08\0\0\0"
    (tmp_path / "a.tif").write_bytes(head + bytes(100))
    with pytest.raises(SlideError, match="TIFF"):
        open_slide(tmp_path / "a.tif")


def test_slides_that_cannot_be_decoded(test_data):
    folder = test_data / "wsi" / "openslide-python-fixtures"
    with pytest.raises(SlideError, match=r"unopenable\.tiff: TIFF compression 52479 is not supported"):
        open_slide(folder / "unopenable.tiff")
    with (
        open_slide(folder / "unreadable.svs") as slide,
        pytest.raises(SlideError, match=r"tile 0 .*cannot be decoded"),
    ):
        slide.read_region(0, 0, *slide.shape[1:])


def test_paths_that_are_no_file(tmp_path):
    with pytest.raises(SlideError, match="no such file"):
        open_slide(tmp_path / "none.svs")
    with pytest.raises(SlideError, match="not a file"):
        open_slide(tmp_path)


def test_palettes_are_refused_in_words(tmp_path):
    palette = np.zeros((3, 256), np.uint16)
    tifffile.imwrite(
        tmp_path / "p.tif", np.zeros((20, 30), np.uint8), photometric="palette", colormap=palette
    )
    with pytest.raises(SlideError, match=r"photometric interpretation .* is not supported"):
        open_slide(tmp_path / "p.tif")


@pytest.mark.parametrize(
    ("unit", "resolution", "expected"),
    [
        ("CENTIMETER", (20_000, 40_000), (0.25, 0.5)),
        ("INCH", (50_800, 50_800), (0.5, 0.5)),
        ("INCH", (72, 72), None),
        ("CENTIMETER", (0, 0), None),
        ("NONE", (20_000, 20_000), None),
    ],
)
def test_pixel_size_of_resolution_tags(tmp_path, unit, resolution, expected):
    tifffile.imwrite(
        tmp_path / "a.tif",
        np.zeros((20, 30), np.uint8),
        resolution=resolution,
        resolutionunit=unit,
        metadata=None,
    )
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.pixel_size_um == (pytest.approx(expected) if expected else None)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ('PhysicalSizeX="0.5" PhysicalSizeY="0.25"', (0.25, 0.5)),
        (
            'PhysicalSizeX="0.5" PhysicalSizeXUnit="\u00b5m" PhysicalSizeY="0.5" PhysicalSizeYUnit="\u03bcm"',
            (0.5, 0.5),
        ),
        (
            'PhysicalSizeX="1" PhysicalSizeXUnit="mm" PhysicalSizeY="500" PhysicalSizeYUnit="nm"',
            (0.5, 1000.0),
        ),
        ('PhysicalSizeX="0.5"', None),
        ('PhysicalSizeX="x" PhysicalSizeY="1"', None),
        ('PhysicalSizeX="0" PhysicalSizeY="1"', None),
        ('PhysicalSizeX="1" PhysicalSizeXUnit="pixel" PhysicalSizeY="1"', None),
        ("", None),
    ],
)
def test_pixel_size_of_ome_xml(attributes, expected):
    assert ome_pixel_size_um(f"<Pixels {attributes}/>") == (pytest.approx(expected) if expected else None)


def test_openslide_and_tifffile_say_the_same_of_a_slide(slide_path):
    with FileSlide(read_openslide(slide_path, "aperio")) as one, open_slide(slide_path) as two:
        assert (one.shape, one.pixel_size_um, one.dtype) == (two.shape, two.pixel_size_um, two.dtype)
        np.testing.assert_array_equal(
            one.read_region(100, 200, 1300, 700), two.read_region(100, 200, 1300, 700)
        )


def test_pictures_are_read_whole(tmp_path, picture):
    from PIL import Image

    image = picture((3, 40, 50))
    Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "a.png")
    Image.fromarray(image[0]).save(tmp_path / "g.png")
    with open_slide(tmp_path / "a.png") as slide:
        np.testing.assert_array_equal(slide.read_region(5, 6, 7, 8), image[:, 5:12, 6:14])
    with open_slide(tmp_path / "g.png") as slide:
        np.testing.assert_array_equal(slide.read_region(0, 0, 40, 50), image[:1])
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(SlideError, match="broken picture"):
        open_slide(tmp_path / "cut.png")


def test_transparent_pixels_take_the_background():
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (9, 9, 4), dtype=np.uint8)
    background = np.array([255, 250, 10], np.uint8)
    share = rgba[..., 3:] / 255
    expected = np.floor(rgba[..., :3] * share + background * (1 - share) + 0.5)
    assert np.abs(opaque(rgba, background).astype(int) - expected).max() <= 1
    rgba[..., 3] = 255
    np.testing.assert_array_equal(opaque(rgba, background), rgba[..., :3])


def test_a_slide_deleted_or_changed_while_open_is_an_error(slide_path, tmp_path):
    copy = shutil.copy(slide_path, tmp_path / "a.svs")
    with open_slide(copy) as slide:
        copy.unlink()
        with pytest.raises(SlideError, match=r"a\.svs: level 0: cannot open the file: No such file"):
            slide.read_region(0, 0, 50, 50)
        copy.write_bytes(slide_path.read_bytes()[:-1])
        with pytest.raises(SlideError, match=r"a\.svs: level 0: the file changed since it was opened"):
            slide.read_region(0, 0, 50, 50)


def test_a_slide_of_many_files_is_known_by_all_of_them(tmp_path, picture):
    top = write_dicom(tmp_path / "a", picture((3, 200, 150)))
    other = write_dicom(tmp_path / "b", picture((3, 90, 80)))
    shutil.copy(other, top.parent / "other.dcm")  # a slide of its own in the same folder
    with open_slide(top) as slide:
        stamp = slide.stamp
        own = [top.parent / name for name in ("0.dcm", "1.dcm", "label.dcm")]
        assert stamp.nbytes == slide.source_bytes == sum(file.stat().st_size for file in own)
        os.utime(top.parent / "other.dcm", ns=(1, 2**62))
        assert slide.stamp_now() == stamp
        os.utime(top.parent / "1.dcm", ns=(1, 2**62))
        changed = slide.stamp_now()
        assert (changed.name, changed.nbytes, changed.mtime_ns) == (stamp.name, stamp.nbytes, 2**62)
        (top.parent / "1.dcm").unlink()
        assert slide.stamp_now() is None


def test_the_data_of_mirax_lie_in_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a.mrxs", "a/Slidedat.ini", "a/Data0000.dat", "b.mrxs"):
        (tmp_path / name).touch()
    found = companion_files(tmp_path / "a.mrxs", "mirax")
    assert [file.name for file in found] == ["Data0000.dat", "Slidedat.ini"]
    assert companion_files(tmp_path / "b.mrxs", "mirax") == ()
    assert companion_files(tmp_path / "a.mrxs", "aperio") == ()
