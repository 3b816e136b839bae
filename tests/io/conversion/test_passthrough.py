"""Levels of slides copied tile by tile: the bytes are the slide's, the pixels those of its reader."""

from __future__ import annotations

import json
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np
import openslide
import pydicom
import pytest
import tifffile
import zarr
from pass_slides import cut, write_dicom, write_mixed, write_philips, write_tiff

from ats_stream.errors import SlideError
from ats_stream.io import ngff, open_pyramid
from ats_stream.io.conversion.array_writer import ArrayWriter
from ats_stream.io.conversion.pass_layout import ShardSize
from ats_stream.io.conversion.passthrough import passable, plan_pass, read_shard, shard_parts, stored_tiles
from ats_stream.io.formats.dicom import dicom_levels
from ats_stream.io.formats.slide_pyramid import file_parts
from ats_stream.io.formats.stored_tiles import StoredTiles
from ats_stream.io.jpeg import JpegFormat
from ats_stream.io.layout import grid_shape
from ats_stream.io.shard import encode_shard_parts

SHARD_BYTES = 12_000
MADE = {
    "tiff": lambda folder, image: write_tiff(folder / "a.tif", image),
    "rgb tiff": lambda folder, image: write_tiff(folder / "a.tif", image, space="RGB"),
    "sparse tiff": lambda folder, image: write_tiff(
        folder / "a.tif", image, tiles=lambda tiles: [b"", *tiles[1:7], b"", b"", *tiles[9:]]
    ),
    "ome-tiff": lambda folder, image: write_tiff(folder / "a.ome.tif", image, ome=True, levels=3),
    "philips": lambda folder, image: write_philips(folder / "a.tiff", image),
    "sparse philips": lambda folder, image: write_philips(folder / "a.tiff", image, missing=(0, 7, 8)),
    "dicom": lambda folder, image: write_dicom(folder / "a", image, table="basic"),
    "dicom, long table": lambda folder, image: write_dicom(folder / "a", image, table="extended"),
    "dicom, no table": lambda folder, image: write_dicom(folder / "a", image, table="none"),
}
REAL = [
    "aperio/CMU-1-Small-Region.svs",
    "tiff/CMU-1-Small-Region.jpeg.tiff",
    "dicom/camelyon_multiframe_jpeg.dcm",
    "openslide-python-fixtures/small.svs",
    "openslide-python-fixtures/boxes_0.dcm",
]


def copy(slide, target, shard_bytes=SHARD_BYTES):
    """Write the levels of a slide that can pass as a pyramid; the plan by which it was done."""
    plan = plan_pass(file_parts(slide), ShardSize(nbytes=shard_bytes))
    group = ngff.build_image(
        name="x",
        axes=plan.levels[0].spec.axes,
        paths=[str(i) for i in range(len(plan.levels))],
        downsamples=[level.downsample for level in plan.levels],
        pixel_size_um=(0.5,) * len(plan.levels[0].downsample),
    )
    target.mkdir()
    (target / "zarr.json").write_text(json.dumps(ngff.group_json(group)))
    with ThreadPoolExecutor(1) as pool:
        for number, level in enumerate(plan.levels):
            writer = ArrayWriter(target / str(number), str(number), level.spec, pool)
            for place in np.ndindex(*grid_shape(level.spec.shape, level.spec.shard)):
                chunks = level.shard(place)
                writer.write_encoded(place, chunks)
                pieces = shard_parts(level.tiles, level.spec, place, level.level)
                expected = encode_shard_parts(chunks, level.spec.grid) if chunks else []
                assert b"".join(pieces) == b"".join(expected)
    return plan


def assert_same_pixels(slide, target, plan):
    """Level by level, through our reader and through zarr-python."""
    theirs, ours = open_pyramid(slide), open_pyramid(target)
    for number, level in enumerate(plan.levels):
        expected = theirs.read(level.level)
        np.testing.assert_array_equal(ours.read(number), expected)
        np.testing.assert_array_equal(zarr.open_array(str(target / str(number)), mode="r")[:], expected)
        assert ours.levels[number].downsample == theirs.levels[level.level].downsample


@pytest.mark.parametrize("kind", MADE)
def test_pixels_are_those_of_the_slide(tmp_path, picture, assert_valid, kind):
    slide = MADE[kind](tmp_path, picture((3, 300, 333)))
    plan = copy(slide, tmp_path / "a.zarr")
    assert plan.left_out == {}
    assert len(plan.levels) == len(file_parts(slide).sources) > 1
    assert any(math.prod(grid_shape(v.spec.shape, v.spec.shard)) > 3 for v in plan.levels)
    assert_same_pixels(slide, tmp_path / "a.zarr", plan)
    assert_valid(tmp_path / "a.zarr")


@pytest.mark.parametrize("name", REAL)
def test_real_slides_pass(test_data, tmp_path, assert_valid, name):
    slide = test_data / "wsi" / name
    plan = copy(slide, tmp_path / "a.zarr", shard_bytes=100_000)
    assert_same_pixels(slide, tmp_path / "a.zarr", plan)
    assert_valid(tmp_path / "a.zarr")
    # decoders that are not ours say the same
    stored = open_pyramid(tmp_path / "a.zarr").read(0).transpose(1, 2, 0)
    with openslide.OpenSlide(slide) as opened:
        picture = opened.read_region((0, 0), 0, opened.dimensions)
    np.testing.assert_array_equal(stored, np.asarray(picture)[..., :3])
    if not name.endswith("dcm"):
        np.testing.assert_array_equal(stored, tifffile.imread(slide))
    # what lies beside the pixels is small: indices of the shards and metadata
    sizes = [f.stat().st_size for f in (tmp_path / "a.zarr").rglob("*") if f.is_file()]
    assert sum(sizes) <= sum(v.stored_bytes for v in plan.levels) * 1.03 + 4096


def test_every_slide_of_the_data_passes_or_has_a_reason(test_data):
    reasons = {}
    for path in sorted((test_data / "wsi").rglob("*.*")):
        try:
            parts = file_parts(path)
        except SlideError:
            continue
        name = path.relative_to(test_data / "wsi").as_posix()
        reasons[name] = passable(parts)
        if reasons[name] is not None:
            with pytest.raises(ValueError, match=r"."):
                plan_pass(parts, ShardSize(nbytes=1 << 20))
    fixtures = "openslide-python-fixtures"
    assert {name for name, reason in reasons.items() if reason is None} == {*REAL, f"{fixtures}/boxes_1.dcm"}
    assert reasons["ndpi/test3-DAPI-2-387.ndpi"] == "tiles of hamamatsu slides are put together by OpenSlide"
    assert reasons["tiff/CMU-1-Small-Region.webp.tiff"] == "compression is WEBP, not JPEG"
    assert reasons[f"{fixtures}/unreadable.svs"] == "tile (row 0, column 0) is damaged: broken JPEG head"
    assert reasons[f"{fixtures}/boxes.png"] == "not a slide of tiles"


@pytest.mark.parametrize("kind", ["tiff", "ome-tiff"])
def test_bytes_are_those_of_the_slide(tmp_path, picture, kind):
    slide = MADE[kind](tmp_path, picture((3, 300, 333)))
    plan = plan_pass(file_parts(slide), ShardSize(nbytes=SHARD_BYTES))
    data = slide.read_bytes()
    with tifffile.TiffFile(slide) as tiff:
        for level in plan.levels:
            page = tiff.series[0].levels[level.level].keyframe
            tiles = [data[a : a + n] for a, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
            across = -(-page.imagewidth // page.tilewidth)
            found = {}
            for place in level.places():
                first = [p * g for p, g in zip(place, level.spec.grid, strict=True)]
                for inner, tile in level.shard(place).items():
                    found[first[1] + inner[1], first[2] + inner[2]] = tile
            assert found == {divmod(i, across): tile for i, tile in enumerate(tiles)}


def test_frames_are_those_of_the_files(tmp_path, picture):
    slide = write_dicom(tmp_path / "a", picture((3, 200, 150)))
    plan = plan_pass(file_parts(slide), ShardSize(nbytes=1 << 20))
    for level in plan.levels:
        facts = pydicom.dcmread(tmp_path / "a" / f"{level.level}.dcm")
        frames = pydicom.encaps.generate_frames(facts.PixelData, number_of_frames=facts.NumberOfFrames)
        assert list(level.shard((0, 0, 0)).values()) == list(frames)


def test_tables_are_stored_once(slide_path, tmp_path):
    """Tiles of Aperio slides leave out their tables, which are in the metadata of the array alone."""
    plan = copy(slide_path, tmp_path / "a.zarr", shard_bytes=100_000)
    form = plan.levels[0].spec.codec.jpeg
    assert form is not None
    assert form.tables is not None
    assert (form.colorspace_jpeg, form.colorspace_data) == ("RGB", "RGB")
    tile = next(iter(plan.levels[0].shard((0, 0, 0)).values()))
    assert b"\xff\xdb" not in tile
    with pytest.raises(ValueError, match="jpeg"):
        JpegFormat(colorspace_jpeg="RGB", colorspace_data="RGB").decode(tile, (240, 240, 3))
    meta = json.loads((tmp_path / "a.zarr/0/zarr.json").read_text())
    names = [c["name"] for c in meta["codecs"][0]["configuration"]["codecs"]]
    assert names == ["transpose", "imagecodecs_jpeg"]


@pytest.mark.parametrize(("axes", "shape"), [("CYX", (2, 150, 100)), ("ZYX", (3, 150, 100))])
def test_planes_of_grey_pass(tmp_path, picture, axes, shape):
    image = picture(shape)
    slide = tmp_path / "a.ome.tif"
    tifffile.imwrite(
        slide, image, ome=True, tile=(32, 48), compression="jpeg", photometric="minisblack",
        metadata={"axes": axes}, planarconfig=None,
    )  # fmt: skip
    plan = copy(slide, tmp_path / "a.zarr", shard_bytes=5000)
    spec = plan.levels[0].spec
    assert spec.axes == {"CYX": "cyx", "ZYX": "czyx"}[axes]
    assert spec.fill_value == 0
    assert plan.coarse.colorspace_jpeg is None
    assert_same_pixels(slide, tmp_path / "a.zarr", plan)


def test_levels_that_cannot_pass_are_left_out(tmp_path, picture):
    slide = write_mixed(tmp_path / "a.tif", picture((3, 256, 256)))
    plan = copy(slide, tmp_path / "a.zarr")
    assert [v.level for v in plan.levels] == [0, 2]
    assert plan.left_out == {1: "compression is ADOBE_DEFLATE, not JPEG"}
    assert_same_pixels(slide, tmp_path / "a.zarr", plan)


def jpeg_tiff(path, **options):
    """A TIFF of JPEG data that differs from one of tiles in a single way."""
    kwargs = {"tile": (64, 64), "compression": "jpeg", "photometric": "rgb", "metadata": None, **options}
    tifffile.imwrite(path, kwargs.pop("image"), **kwargs)
    return path


IMAGE = np.random.default_rng(0).integers(0, 255, (100, 130, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"image": IMAGE, "tile": None, "rowsperstrip": 16}, "stored in strips, not tiles"),
        ({"image": IMAGE, "compression": "adobe_deflate"}, "compression is ADOBE_DEFLATE, not JPEG"),
        ({"image": IMAGE, "compression": "jpeg2000"}, "compression is JPEG2000, not JPEG"),
        (
            {"image": IMAGE.transpose(2, 0, 1).copy(), "planarconfig": "separate"},
            "samples are stored in planes",
        ),
        (
            {"image": iter([b"tile"] * 6), "shape": (100, 130, 4), "dtype": np.uint8, "extrasamples": [2]},
            "4 samples per pixel",
        ),
    ],
)
def test_what_cannot_pass_has_a_reason(tmp_path, options, reason):
    parts = file_parts(jpeg_tiff(tmp_path / "a.tif", **options))
    assert passable(parts) == reason
    with pytest.raises(ValueError, match=f"^{reason}$"):
        plan_pass(parts, ShardSize(nbytes=1 << 20))


def changed(number, change):
    return lambda tiles: [change(t) if i == number else t for i, t in enumerate(tiles)]


def commented(tile):
    return tile[:2] + b"\xff\xfe\0\6name" + tile[2:]


@pytest.mark.parametrize(
    ("tiles", "reason"),
    [
        (changed(0, commented), r"tile \(row 0, column 0\) has COM segments, which may hold text"),
        (changed(-1, commented), None),
        (lambda t: cut(np.zeros((300, 333, 3), np.uint8), 64, 95)[:1] + t[1:], None),
        (lambda t: [cut(np.zeros((32, 32, 3), np.uint8), 32)[0], *t[1:]],
         r"tile \(row 0, column 0\) is a JPEG of 32 x 32 x 3, the tile has 64 x 64 x 3"),
        (changed(29, commented), r"tile \(row 4, column 5\) has COM segments, which may hold text"),
        (changed(3, lambda t: b""), None),
        (changed(3, lambda t: t[:-2] + bytes(20_000) + t[-2:]),
         r"tiles of \d+ bytes, their pixels have 12288"),
    ],
)  # fmt: skip
def test_tiles_are_looked_at_beforehand(tmp_path, picture, tiles, reason):
    parts = file_parts(write_tiff(tmp_path / "a.tif", picture((3, 300, 333)), tiles=tiles))
    found = passable(parts)
    assert (found is None) == (reason is None)
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            plan_pass(parts, ShardSize(nbytes=1 << 20))


def test_a_colour_tile_that_has_a_place_but_no_bytes_does_not_pass(tmp_path, picture):
    path = write_tiff(tmp_path / "a.tif", picture((3, 300, 333)))
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages[0].tags["TileByteCounts"]
        width = {"SHORT": 2, "LONG": 4}[tag.dtype.name]
        start = tag.valueoffset + 3 * width
    data = bytearray(path.read_bytes())
    data[start : start + width] = bytes(width)
    path.write_bytes(data)
    assert passable(file_parts(path)) == "tile (row 0, column 3) has no bytes"


def test_a_tile_with_a_comment_is_found_when_it_is_copied_at_the_latest(tmp_path, picture):
    """Some tiles are looked at before; that none with text is copied does not depend on which."""
    image = picture((3, 64 * 8, 64 * 8))
    slide = write_tiff(tmp_path / "a.tif", image, tiles=changed(3, commented), levels=1)
    parts = file_parts(slide)
    assert passable(parts) is None
    level = plan_pass(parts, ShardSize(nbytes=1 << 30)).levels[0]
    says = r"a\.tif: level 0: tile \(row 0, column 3\) has COM segments, which may hold text"
    with pytest.raises(SlideError, match=says):
        level.shard((0, 0, 0))


def test_nothing_of_patients_or_labels_is_copied(tmp_path, picture):
    image = picture((3, 150, 100))
    secret = b"secret-42"
    tiff = write_tiff(tmp_path / "a.tif", image, description="secret-42", software="secret-42")
    dicom = write_dicom(tmp_path / "d", image)
    for number, slide in enumerate((tiff, dicom)):
        assert secret in slide.read_bytes()
        target = tmp_path / f"{number}.zarr"
        plan = copy(slide, target)
        assert len(plan.levels) == 2
        label = (tmp_path / "d" / "label.dcm").read_bytes()[-500:-20]
        for file in target.rglob("*"):
            if file.is_file():
                assert secret not in file.read_bytes()
                assert label not in file.read_bytes()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"DimensionOrganizationType": "TILED_SPARSE"}, "frames are TILED_SPARSE, not TILED_FULL"),
        ({"NumberOfOpticalPaths": 2}, "NumberOfOpticalPaths is 2, expected 1"),
        ({"InConcatenationNumber": 1}, "a level is spread over several files"),
        ({"NumberOfFrames": 7}, "7 frames, expected 3 x 3"),
    ],
)
def test_dicom_that_cannot_pass_has_a_reason(tmp_path, picture, change, reason):
    def apply(facts):
        for name, value in change.items():
            setattr(facts, name, value)

    slide = write_dicom(tmp_path / "a", picture((3, 150, 160)), change=apply)
    # such files make OpenSlide refuse them, or worse
    top, coarse = dicom_levels(str(slide), [(3, 150, 160), (3, 75, 80)])
    assert top == f"DICOM: {reason}"
    assert isinstance(coarse, StoredTiles)


@pytest.mark.parametrize("table", ["basic", "none"])
def test_frames_in_several_items_do_not_pass(tmp_path, picture, table):
    def split(facts):
        data = facts.PixelData
        # the last item becomes two
        at = data.rindex(b"\xfe\xff\x00\xe0")
        frame = data[at + 8 :]
        parts = [frame[:100], frame[100:]]
        facts.PixelData = data[:at] + b"".join(
            b"\xfe\xff\x00\xe0" + len(p).to_bytes(4, "little") + p for p in parts
        )
        facts["PixelData"].VR = "OB"
        facts["PixelData"].is_undefined_length = True

    slide = write_dicom(tmp_path / "a", picture((3, 150, 160)), table=table, change=split)
    (tiles,) = dicom_levels(str(slide), [(3, 150, 160)])
    if table == "none":
        assert tiles == "DICOM: 10 items of pixel data for 9 frames"
        return
    assert isinstance(tiles, StoredTiles)
    with pytest.raises(ValueError, match=r"tile \(row 2, column 2\) does not end as JPEG data must"):
        tiles.sample(16)


def test_neighbours_do_not_matter(tmp_path, picture):
    """Other slides, broken files and folders beside the files of a DICOM slide."""
    slide = write_dicom(tmp_path / "a", picture((3, 150, 160)))
    other = write_dicom(tmp_path / "b", picture((3, 150, 160), seed=1))
    other.rename(tmp_path / "a" / "00.dcm")
    (tmp_path / "a" / "broken.dcm").write_bytes(slide.read_bytes()[:300])
    (tmp_path / "a" / "folder.dcm").mkdir()
    (tmp_path / "a" / "text.txt").write_text("text")
    plan = copy(slide, tmp_path / "a.zarr")
    assert len(plan.levels) == 2
    assert_same_pixels(slide, tmp_path / "a.zarr", plan)


@pytest.mark.parametrize("kind", ["tiff", "dicom"])
def test_a_slide_that_changes_is_an_error(tmp_path, picture, kind):
    slide = MADE[kind](tmp_path, picture((3, 150, 160)))
    level = plan_pass(file_parts(slide), ShardSize(nbytes=1 << 20)).levels[0]
    with slide.open("ab") as file:
        file.write(b"more")
    with pytest.raises(SlideError, match="level 0: the file changed since it was opened"):
        level.shard((0, 0, 0))


def test_levels_pickle(tmp_path, picture):
    parts = file_parts(MADE["tiff"](tmp_path, picture((3, 150, 160))))
    level = plan_pass(parts, ShardSize(nbytes=1 << 20)).levels[0]
    assert pickle.loads(pickle.dumps(level)).shard((0, 0, 0)) == level.shard((0, 0, 0))


@pytest.mark.parametrize("space", ["YCBCR", "RGB"])
@pytest.mark.parametrize("quality", [30, 75, 92])
@pytest.mark.parametrize("subsampling", ["420", "422", "444"])
def test_coarse_levels_are_encoded_as_the_source_is(tmp_path, picture, space, quality, subsampling):
    image = picture((3, 128, 128))
    parts = file_parts(
        write_tiff(tmp_path / "a.tif", image, space=space, quality=quality, subsampling=subsampling)
    )
    plan = plan_pass(parts, ShardSize(nbytes=1 << 20))
    level = plan.levels[-1]
    encoded = plan.coarse.encode(np.ascontiguousarray(image[:, :64, :64].transpose(1, 2, 0)))
    # the same tables, sampling and colours as the first tile of the source
    head = level.tiles.check_head(encoded)
    assert (head.quantisation, head.sampling, head.is_ycbcr) == (
        level.head.quantisation,
        level.head.sampling,
        level.head.is_ycbcr,
    )
    assert encoded == plan.levels[0].shard((0, 0, 0))[0, 0, 0]


def test_coarse_levels_of_grey_are_grey(tmp_path, picture):
    image = picture((1, 128, 128))
    data = cut(image[0], 64, 85)
    slide = tmp_path / "a.tif"
    with tifffile.TiffWriter(slide) as writer:
        writer.write(iter(data), shape=image.shape[1:], dtype=np.uint8, tile=(64, 64), compression="jpeg",
                     photometric="minisblack", metadata=None)  # fmt: skip
    coarse = plan_pass(file_parts(slide), ShardSize(nbytes=1 << 20)).coarse
    assert coarse == JpegFormat(level=85)
    assert coarse.encode(image[0, :64, :64].copy()) == imagecodecs.jpeg8_encode(image[0, :64, :64].copy(), 85)


def test_shards_of_the_last_level_are_bounded_in_pixels(tmp_path, picture):
    parts = file_parts(write_tiff(tmp_path / "a.tif", picture((3, 500, 700)), levels=3))
    free = plan_pass(parts, ShardSize(nbytes=1 << 30))
    assert [v.spec.grid for v in free.levels] == [(1, 8, 11), (1, 4, 6), (1, 2, 3)]
    bound = plan_pass(parts, ShardSize(nbytes=1 << 30), max_levels=2, max_base_values=9 * 64 * 64)
    assert [v.spec.grid for v in bound.levels] == [(1, 8, 11), (1, 2, 1)]
    copied = {place: bound.levels[1].shard(place) for place in bound.levels[1].places()}
    assert len(copied) == 12
    tiles = stored_tiles(parts)[1]
    for place, chunks in copied.items():
        assert read_shard(tiles, bound.levels[1].spec, place, 1) == chunks


@pytest.mark.parametrize("side", [63, 64])
def test_halves_of_shards_are_whole_pixels(tmp_path, picture, side):
    parts = file_parts(write_dicom(tmp_path / "a", picture((3, 300, 200)), side=side, levels=1))
    for shard_bytes in (1, 10_000, 20_000, 40_000, 1 << 20):
        spec = plan_pass(parts, ShardSize(nbytes=shard_bytes)).levels[0].spec
        for n, s in zip(spec.shape[1:], spec.shard[1:], strict=True):
            assert s >= n or s % 2 == 0
