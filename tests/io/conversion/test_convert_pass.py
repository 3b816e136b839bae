"""Conversion of slides by copying their tiles."""

from __future__ import annotations

import errno
import os
import shutil

import numpy as np
import pytest
import tifffile
import zarr
from pass_slides import write_dicom, write_mixed, write_philips, write_tiff

from ats_stream.errors import SlideError, StorageError
from ats_stream.io import ConvertConfig, convert, open_pyramid, verify
from ats_stream.io.conversion import array_writer
from ats_stream.io.jpeg import JpegFormat
from ats_stream.io.layout import grid_shape
from ats_stream.io.reduce import halve

MADE = {
    "tiff": lambda folder, image: write_tiff(folder / "a.tif", image),
    "rgb tiff of one level": lambda folder, image: write_tiff(folder / "a.tif", image, space="RGB", levels=1),
    "ome-tiff": lambda folder, image: write_tiff(folder / "a.ome.tif", image, ome=True, levels=3),
    "philips": lambda folder, image: write_philips(folder / "a.tiff", image),
    "dicom": lambda folder, image: write_dicom(folder / "a", image),
}
REAL = [
    "aperio/CMU-1-Small-Region.svs",
    "tiff/CMU-1-Small-Region.jpeg.tiff",
    "dicom/camelyon_multiframe_jpeg.dcm",
]


def tree(folder):
    """Content of every file under a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_passed(slide, target):
    """Levels of the slide pixel for pixel; coarser ones what their format makes of exact means."""
    source, stored = open_pyramid(slide), open_pyramid(target)
    num_copied = len(source.levels)
    for level in range(num_copied):
        np.testing.assert_array_equal(stored.read(level), source.read(level))
    exact = source.read(num_copied - 1)
    for level in range(num_copied, len(stored.levels)):
        exact = halve(exact)
        meta = zarr.open_array(str(target / str(level)), mode="r").metadata.to_dict()
        codecs = meta["codecs"][0]["configuration"]["codecs"]
        form = JpegFormat.from_config(codecs[-1]["configuration"])
        assert form.tables is None
        np.testing.assert_array_equal(
            stored.read(level), decoded(exact, stored.levels[level].chunk_shape, form)
        )
        assert stored.levels[level].downsample == tuple(
            f * 2 ** (level - num_copied + 1) for f in stored.levels[num_copied - 1].downsample
        )
    assert max(stored.levels[-1].shape[1:]) <= 256 or num_copied == len(stored.levels)


def decoded(image_CYX, chunk, form):
    """What is left of an image stored as JPEG."""
    result = np.empty_like(image_CYX)
    for _, row, column in np.ndindex(*grid_shape(image_CYX.shape, chunk)):
        box = (
            slice(None),
            slice(row * chunk[1], (row + 1) * chunk[1]),
            slice(column * chunk[2], (column + 1) * chunk[2]),
        )
        block = image_CYX[box]
        padded = np.pad(block, [(0, c - n) for c, n in zip(chunk, block.shape, strict=True)], mode="edge")
        pixels = form.decode(form.encode(padded.transpose(1, 2, 0)), (*chunk[1:], chunk[0]))
        result[box] = pixels.transpose(2, 0, 1)[:, : block.shape[1], : block.shape[2]]
    return result


def run(slide, target, **options):
    workers = options.pop("workers", 1)
    return convert(slide, target, ConvertConfig(profile="pass", **options), workers=workers, progress=False)


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("shard_bytes", [None, 9000])
def test_made_slides_pass(tmp_path, picture, assert_valid, kind, shard_bytes):
    slide = MADE[kind](tmp_path, picture((3, 600, 520)))
    target = tmp_path / "a.ome.zarr"
    summary = run(slide, target, shard_bytes=shard_bytes)
    assert_passed(slide, target)
    assert_valid(target)
    assert verify(target, source=slide, num_threads=1).findings == ()
    source = open_pyramid(slide)
    assert summary.pixel_size_um == source.levels[0].pixel_size_um
    assert open_pyramid(target).levels[0].pixel_size_um == source.levels[0].pixel_size_um
    copied = {1: "level 0", 2: "levels 0, 1", 3: "levels 0 to 2"}[len(source.levels)]
    assert summary.notes[0] == f"{copied} of the slide copied as stored"
    assert all("JPEG of quality 80" in note for note in summary.notes[1:])
    if shard_bytes is None:
        assert summary.num_shards == len(open_pyramid(target).levels)
    else:
        assert summary.num_shards > 2 * len(open_pyramid(target).levels)


@pytest.mark.parametrize("name", REAL)
def test_real_slides_pass(test_data, tmp_path, assert_valid, name):
    slide, target = test_data / "wsi" / name, tmp_path / "a.ome.zarr"
    summary = run(slide, target)
    assert_passed(slide, target)
    assert_valid(target)
    assert verify(target, source=slide, quick=True, num_threads=1).findings == ()
    assert len(summary.notes) == 2
    # the level that was copied is as large as the slide; those that it lacks come on top
    level = sum(f.stat().st_size for f in (target / "0").rglob("*") if f.is_file())
    assert level <= summary.source_bytes * 1.03


def test_a_slide_with_all_levels_is_as_large_as_before(tmp_path, picture):
    slide = write_tiff(tmp_path / "a.tif", picture((3, 1000, 800)), side=128, levels=3)
    summary = run(slide, tmp_path / "a.ome.zarr", tissue=False)
    assert summary.notes == ("levels 0 to 2 of the slide copied as stored",)
    assert summary.stored_bytes <= 1.03 * summary.source_bytes


@pytest.mark.parametrize("axes", ["CYX", "ZYX"])
def test_planes_of_grey_pass(tmp_path, picture, axes):
    slide = tmp_path / "a.ome.tif"
    tifffile.imwrite(
        slide, picture((5, 300, 220)), ome=True, tile=(32, 48), compression="jpeg",
        photometric="minisblack", metadata={"axes": axes}, planarconfig=None,
    )  # fmt: skip
    target = tmp_path / "a.ome.zarr"
    summary = run(slide, target, shard_bytes=20_000, coarsest_px=100)
    assert summary.notes[0] == "level 0 of the slide copied as stored"
    source, stored = open_pyramid(slide), open_pyramid(target)
    np.testing.assert_array_equal(stored.read(0), source.read(0))
    exact = source.read(0)
    assert len(stored.levels) == 3
    for level in (1, 2):
        exact = halve(exact)
        assert stored.levels[level].shape == exact.shape
        assert np.abs(stored.read(level).astype(int) - exact).mean() < 4
    assert verify(target, source=slide, num_threads=1).findings == ()


def test_what_cannot_pass_is_decoded_and_the_summary_says_why(test_data, tmp_path):
    slide, target = test_data / "wsi" / "tiff" / "CMU-1-Small-Region.webp.tiff", tmp_path / "a.ome.zarr"
    summary = run(slide, target, levels=1)
    assert summary.notes == ("decoded and stored losslessly, because compression is WEBP, not JPEG",)
    np.testing.assert_array_equal(open_pyramid(target).read(0), open_pyramid(slide).read(0))
    assert '"zstd"' in (target / "0" / "zarr.json").read_text()


def test_levels_that_cannot_pass_are_left_out(tmp_path, picture):
    slide = write_mixed(tmp_path / "a.tif", picture((3, 600, 600)))
    summary = run(slide, tmp_path / "a.ome.zarr", coarsest_px=100)
    assert summary.notes == (
        "levels 0, 2 of the slide copied as stored",
        "level 1 of the slide left out: compression is ADOBE_DEFLATE, not JPEG",
        "level 2 of the pyramid made from the last of them, JPEG of quality 95 YCBCR 420",
    )
    stored, source = open_pyramid(tmp_path / "a.ome.zarr"), open_pyramid(slide)
    assert [level.downsample for level in stored.levels] == [(1, 1), (4, 4), (8, 8)]
    np.testing.assert_array_equal(stored.read(1), source.read(2))


def test_levels_and_shards_can_be_chosen(tmp_path, picture):
    slide = write_tiff(tmp_path / "a.tif", picture((3, 700, 620)), levels=3)
    run(slide, tmp_path / "two.zarr", levels=2)
    assert len(open_pyramid(tmp_path / "two.zarr").levels) == 2
    run(slide, tmp_path / "four.zarr", levels=4, coarsest_px=1)
    assert len(open_pyramid(tmp_path / "four.zarr").levels) == 4
    summary = run(slide, tmp_path / "cut.zarr", shard_px=200, chunk_px=20)
    assert zarr.open_array(str(tmp_path / "cut.zarr/0"), mode="r").shards == (3, 192, 192)
    assert "chunks are the slide's tiles, 64 x 64: chunk_px was not used" in summary.notes
    assert_passed(slide, tmp_path / "cut.zarr")


def test_a_tile_with_text_is_never_copied(tmp_path, picture):
    """Where it was not among the tiles that are looked at before, the slide is an error that says so."""

    def commented(tiles):
        tiles[37] = tiles[37][:2] + b"\xff\xfe\0\6name" + tiles[37][2:]
        return tiles

    slide = write_tiff(tmp_path / "a.tif", picture((3, 700, 620)), tiles=commented)
    says = r"level 0: tile \(row 3, column 7\) has COM segments, which may hold text"
    with pytest.raises(SlideError, match=says):
        run(slide, tmp_path / "a.ome.zarr")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


@pytest.mark.slow
def test_workers_give_the_same_bytes(tmp_path, picture):
    slide = write_tiff(tmp_path / "a.tif", picture((3, 700, 620)))
    run(slide, tmp_path / "one.zarr", shard_bytes=9000, num_threads=1)
    run(slide, tmp_path / "many.zarr", shard_bytes=9000, num_threads=3)
    run(slide, tmp_path / "two.zarr", shard_bytes=9000, workers=2)
    assert tree(tmp_path / "one.zarr") == tree(tmp_path / "many.zarr") == tree(tmp_path / "two.zarr")


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_run_that_was_interrupted_is_gone_on_from(tmp_path, picture, monkeypatch, num_threads):
    """Levels that are built are not read back: JPEG would change them."""
    slide = write_tiff(tmp_path / "a.tif", picture((3, 700, 620)), levels=2)
    options = {"shard_bytes": 20_000, "coarsest_px": 100, "num_threads": num_threads, "tissue": False}
    run(slide, tmp_path / "whole.zarr", **options)
    whole = tree(tmp_path / "whole.zarr")
    write = array_writer.write_parts
    for fails_at in (0, 1, 7, 14, 17, len(whole) - 1):
        written = []

        def failing(path, parts, fails_at=fails_at, written=written):
            written.append(path)
            if len(written) > fails_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return write(path, parts)

        monkeypatch.setattr(array_writer, "write_parts", failing)
        with pytest.raises(StorageError, match="No space left on device"):
            run(slide, tmp_path / "a.zarr", **options)
        monkeypatch.setattr(array_writer, "write_parts", write)
        summary = run(slide, tmp_path / "a.zarr", overwrite=False, **options)
        # what was stored is kept, but for one shard that another thread had under way
        assert min(fails_at, summary.num_shards) - 1 <= summary.num_resumed <= fails_at
        assert tree(tmp_path / "a.zarr") == whole
        shutil.rmtree(tmp_path / "a.zarr")
        (tmp_path / "a.zarr.manifest.jsonl").unlink()
