"""Chunks of JPEG: our reader, zarr-python through the entry point, and imagecodecs say the same."""

from __future__ import annotations

import json

import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr
from zarr.codecs import ShardingCodec, TransposeCodec

from ats_stream.errors import SlideError
from ats_stream.io import ngff, open_pyramid
from ats_stream.io.codecs import parse_codecs
from ats_stream.io.jpeg import JpegFormat
from ats_stream.io.jpeg_codec import JpegCodec

SIDE = 64


def write_store(folder, image_CYX, codec, *, shard=None, order=(1, 2, 0)):
    """An OME-Zarr image of one level by zarr-python."""
    attributes = ngff.build_image(
        name="x", axes="cyx", paths=["0"], downsamples=[(1, 1)], pixel_size_um=(0.5, 0.5)
    )
    zarr.create_group(str(folder), zarr_format=3, attributes=attributes)
    filters = [TransposeCodec(order=order)] if order else []
    chunk = (image_CYX.shape[0], SIDE, SIDE)
    codecs = [*filters, codec]
    array = zarr.create_array(
        str(folder / "0"),
        shape=image_CYX.shape,
        chunks=chunk if shard is None else (image_CYX.shape[0], shard, shard),
        dtype="uint8",
        fill_value=255,
        filters=None if shard else filters,
        compressors=None,
        serializer=ShardingCodec(chunk_shape=chunk, codecs=codecs) if shard else codec,
    )
    array[:] = image_CYX
    return folder


@pytest.mark.parametrize("shard", [None, 2 * SIDE])
@pytest.mark.parametrize("channels", [1, 3])
def test_our_reader_and_zarr_read_the_same_store(tmp_path, picture, channels, shard):
    # without a third channel that wraps around, so that colour is smooth
    image = np.repeat(picture((1, 150, 131)), channels, axis=0)
    order = (1, 2, 0) if channels == 3 else None
    folder = write_store(
        tmp_path / "a.zarr", image, JpegCodec(JpegFormat(level=95)), shard=shard, order=order
    )
    text = (folder / "0" / "zarr.json").read_text()
    assert '"imagecodecs_jpeg"' in text
    theirs = zarr.open_array(str(folder / "0"), mode="r")[:]
    pyramid = open_pyramid(folder)
    assert pyramid.levels[0].chunk_shape == (channels, SIDE, SIDE)
    np.testing.assert_array_equal(pyramid.read(0), theirs)
    # lossy, but the same picture
    assert np.abs(theirs.astype(int) - image).mean() < 4
    patches = pyramid.read_patches(0, [[-5, -5], [70, 60]], (40, 40), fill=9)
    np.testing.assert_array_equal(patches[1], theirs[:, 70:110, 60:100])
    # the chunks are what the library says of the bytes in them
    padded = np.pad(image, [(0, 0), (0, SIDE), (0, SIDE)], constant_values=255)[:, :SIDE, :SIDE]
    pixels = np.ascontiguousarray(padded.transpose(1, 2, 0)) if channels == 3 else padded[0]
    expected = imagecodecs.jpeg8_decode(imagecodecs.jpeg8_encode(pixels, 95))
    np.testing.assert_array_equal(
        theirs[:, :SIDE, :SIDE], expected.reshape(SIDE, SIDE, -1).transpose(2, 0, 1)
    )


def test_our_reader_decodes_without_zarr(tmp_path, picture, monkeypatch):
    folder = write_store(tmp_path / "a.zarr", picture((3, 90, 90)), JpegCodec(), shard=2 * SIDE)
    expected = zarr.open_array(str(folder / "0"), mode="r")[:]

    def refuse(*_, **__):
        raise AssertionError("zarr-python must not be needed")

    monkeypatch.setattr(zarr, "open_array", refuse)
    np.testing.assert_array_equal(open_pyramid(folder).read(0), expected)


def test_the_proposed_name_is_read_too(tmp_path, picture):
    folder = write_store(tmp_path / "a.zarr", picture((3, 70, 70)), JpegCodec())
    expected = open_pyramid(folder).read(0)
    meta = folder / "0" / "zarr.json"
    meta.write_text(meta.read_text().replace("imagecodecs_jpeg", "jpeg"))
    np.testing.assert_array_equal(open_pyramid(folder).read(0), expected)
    np.testing.assert_array_equal(zarr.open_array(str(folder / "0"), mode="r")[:], expected)


def test_tiles_of_a_slide_are_chunks_as_they_stand(slide_path, tmp_path):
    """The tables that its tiles share go into the configuration, the colours are RGB as stored."""
    with tifffile.TiffFile(slide_path) as tiff:
        page = tiff.pages[0]
        tables, across = page.jpegtables, -(-page.imagewidth // page.tilewidth)
        tiles = [
            slide_path.read_bytes()[a : a + n]
            for a, n in zip(page.dataoffsets, page.databytecounts, strict=True)
        ]
        expected = page.asarray().transpose(2, 0, 1)
        # Aperio stores RGB without a transformation
        assert page.photometric.name == "RGB"
    shape, side = expected.shape, page.tilewidth
    form = JpegFormat(tables=tables, colorspace_jpeg="RGB", colorspace_data="RGB")
    codecs = [{"name": "transpose", "configuration": {"order": [1, 2, 0]}}, JpegCodec(form).to_dict()]
    attributes = ngff.build_image(
        name="x", axes="cyx", paths=["0"], downsamples=[(1, 1)], pixel_size_um=(0.499, 0.499)
    )
    zarr.create_group(str(tmp_path / "a.zarr"), zarr_format=3, attributes=attributes)
    folder = tmp_path / "a.zarr" / "0"
    meta = {
        "zarr_format": 3, "node_type": "array", "shape": list(shape), "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [3, side, side]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 255, "codecs": codecs, "attributes": {}, "dimension_names": ["c", "y", "x"],
    }  # fmt: skip
    for index, tile in enumerate(tiles):
        place = folder / "c" / "0" / str(index // across)
        place.mkdir(parents=True, exist_ok=True)
        (place / str(index % across)).write_bytes(tile)
    (folder / "zarr.json").write_text(json.dumps(meta))
    np.testing.assert_array_equal(open_pyramid(tmp_path / "a.zarr").read(0), expected)
    part = zarr.open_array(str(folder), mode="r")[:, 100:700, 2000:]
    np.testing.assert_array_equal(part, expected[:, 100:700, 2000:])


@pytest.mark.parametrize(
    "form",
    [
        JpegFormat(),
        JpegFormat(level=40, subsampling="420"),
        JpegFormat(tables=b"\xff\xd8\xff\xd9", colorspace_jpeg="YCBCR", colorspace_data="RGB", level=100),
    ],
)
def test_a_codec_survives_its_metadata(form):
    codec = JpegCodec(form)
    assert JpegCodec.from_dict(json.loads(json.dumps(codec.to_dict()))) == codec


def test_quality_and_subsampling_count(picture):
    image = picture((3, 64, 64)).transpose(1, 2, 0)
    sizes = [len(JpegFormat(level=q, subsampling=s).encode(image)) for q, s in
             [(30, "420"), (95, "420"), (95, "444")]]  # fmt: skip
    assert sizes == sorted(set(sizes))
    for space in ("RGB", "YCBCR"):
        form = JpegFormat(level=100, subsampling="444", colorspace_jpeg=space, colorspace_data="RGB")
        decoded = form.decode(form.encode(image), image.shape)
        assert np.abs(decoded.astype(int) - image).max() <= 4


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"colorspace_jpeg": 6}, "colorspace_jpeg must be one of"),
        ({"colorspace_data": "LAB"}, "colorspace_data must be one of"),
        ({"level": 0}, "level must be 1 to 100"),
        ({"level": True}, "level must be 1 to 100"),
        ({"subsampling": "123"}, "subsampling must be one of"),
        ({"tables": "//"}, "broken configuration|tables must be"),
        ({"tables": 5}, "broken configuration"),
        ({"tables": "AAAA"}, "tables must be a JPEG stream"),
        ({"header": "AAAA"}, "header .* is not supported"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(config, says):
    with pytest.raises(ValueError, match=says):
        JpegFormat.from_config(config)


@pytest.mark.parametrize("damage", ["cut", "size", "noise", "empty", "bomb"])
def test_damaged_chunks_are_errors(tmp_path, picture, damage):
    folder = write_store(tmp_path / "a.zarr", picture((3, 64, 64)), JpegCodec())
    chunk = folder / "0" / "c" / "0" / "0" / "0"
    data = chunk.read_bytes()
    at = data.index(b"\xff\xc0") + 5
    bomb = data[:at] + b"\xff\xdc\xff\xdc" + data[at + 4 :]
    other = imagecodecs.jpeg8_encode(np.zeros((32, 64, 3), np.uint8))
    chunk.write_bytes({"cut": data[:-2], "size": other, "noise": b"\xff\xd8" + bytes(50), "empty": b"",
                       "bomb": bomb}[damage])  # fmt: skip
    with pytest.raises(SlideError, match=r"level 0: chunk \(0, 0, 0\) is damaged: [^\n]*JPEG"):
        open_pyramid(folder).read(0)
    with pytest.raises(ValueError, match="JPEG"):
        zarr.open_array(str(folder / "0"), mode="r")[:]


def test_other_arrays_than_bytes_are_left_to_an_error():
    codecs = [{"name": "imagecodecs_jpeg"}]
    assert parse_codecs(codecs, (64, 64), np.dtype("uint16")) is None
    with pytest.raises(ValueError, match="no picture"):
        parse_codecs(codecs, (3, 64, 64), np.dtype("uint8"))
    with pytest.raises(ValueError, match="JPEG takes uint8"):
        zarr.create_array({}, shape=(64, 64), chunks=(64, 64), dtype="uint16", serializer=JpegCodec(),
                          compressors=None)  # fmt: skip
