"""One array, shard by shard: JPEG chunks, chunks that are no squares, chunks that come encoded."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr

from ats_stream.io import ngff, open_pyramid
from ats_stream.io.codecs import ChunkCodec
from ats_stream.io.conversion.array_writer import ArraySpec, ArrayWriter
from ats_stream.io.jpeg import JpegFormat


def write_array(folder, spec, write):
    """A pyramid of one array that ``write`` fills."""
    group = ngff.build_image(
        name="x", axes=spec.axes, paths=["0"], downsamples=[(1, 1)], pixel_size_um=(0.5, 0.5)
    )
    folder.mkdir()
    (folder / "zarr.json").write_text(json.dumps(ngff.group_json(group)))
    with ThreadPoolExecutor(1) as pool:
        writer = ArrayWriter(folder / "0", "0", spec, pool)
        write(writer)
    return writer


def jpeg_spec(channels, chunk, shard, **options):
    return ArraySpec(
        shape=(channels, 150, 130),
        dtype=np.dtype(np.uint8),
        axes="cyx",
        chunk=(channels, *chunk),
        shard=(channels, *shard),
        fill_value=255,
        codec=ChunkCodec(name="jpeg", jpeg=JpegFormat(**options)),
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("chunk", "shard"), [((32, 48), (64, 144)), ((256, 256), (256, 256))])
def test_jpeg_chunks_of_any_shape_open_everywhere(tmp_path, picture, channels, chunk, shard):
    spec = jpeg_spec(channels, chunk, shard, level=95)
    image = np.repeat(picture((1, 150, 130)), channels, axis=0)
    image[:, 64:96, :48] = 255
    write_array(tmp_path / "a.zarr", spec, lambda writer: writer.write_all(image))
    theirs = zarr.open_array(str(tmp_path / "a.zarr" / "0"), mode="r")[:]
    np.testing.assert_array_equal(open_pyramid(tmp_path / "a.zarr").read(0), theirs)
    # lossy, but the same picture, at the edge too, where chunks are padded
    assert np.abs(theirs.astype(int) - image).mean() < 4
    assert np.abs(theirs.astype(int) - image)[:, -4:].mean() < 4


def test_encoded_chunks_are_stored_bit_for_bit(tmp_path, picture):
    spec = jpeg_spec(3, (32, 48), (64, 96))
    image = picture((3, 64, 96))
    place = {(0, y, x): image[:, 32 * y :, 48 * x :][:, :32, :48] for y in range(2) for x in range(2)}
    chunks = {p: spec.codec.encode(block) for p, block in place.items() if p != (0, 1, 0)}
    expected = np.full((3, 150, 130), 255, np.uint8)
    for (_, y, x), data in chunks.items():
        pixels = JpegFormat().decode(data, (32, 48, 3)).transpose(2, 0, 1)
        expected[:, 64 + 32 * y :, 48 * x :][:, :32, :48] = pixels

    def write(writer):
        views = {p: memoryview(data) for p, data in chunks.items()}
        num_bytes = writer.write_encoded((0, 1, 0), views)
        data = (tmp_path / "a.zarr/0/c/0/1/0").read_bytes()
        assert num_bytes == len(data)
        assert data.startswith(b"".join(chunks.values()))
        assert writer.write_encoded((0, 0, 0), {}) == 0

    write_array(tmp_path / "a.zarr", spec, write)
    np.testing.assert_array_equal(open_pyramid(tmp_path / "a.zarr").read(0), expected)
    np.testing.assert_array_equal(zarr.open_array(str(tmp_path / "a.zarr/0"), mode="r")[:], expected)


def test_a_cut_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="must be multiples of chunks"):
        jpeg_spec(3, (32, 48), (64, 100))
    with pytest.raises(ValueError, match="expected one of zstd, "):
        ChunkCodec(name="jpeg")
    with pytest.raises(ValueError, match="expected one of zstd, "):
        ChunkCodec(name="zstd", jpeg=JpegFormat())
