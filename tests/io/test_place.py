"""The compiled way of placing chunks gives the bytes of the plain one, and does no more than it is told."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import zarr
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ats_stream.errors import SlideError
from ats_stream.io import PyramidWriter, ngff, open_pyramid, place
from ats_stream.io.place import Placer, ReadJob
from ats_stream.io.plan import plan_patches
from ats_stream.io.sources import ChunkError, RawChunk
from ats_stream.io.zstd_library import zstd_library

DTYPES = ("bool", "uint8", "int16", "uint16", "float32", "float64")


class MemorySource:
    """Chunks of an array in memory; some are absent, and all lie in memory as they like."""

    def __init__(self, array, chunk_shape, rng):
        self.array, self.rng = array, rng
        self.shape, self.dtype = array.shape, array.dtype
        self.chunk_shape = self.shard_shape = chunk_shape
        self.fill_value = array.dtype.type(1)

    def raw(self, chunk):
        return RawChunk(tuple(chunk), None if self.rng.integers(5) == 0 else "stored", 1)

    def decode(self, raw):
        begin = [p * c for p, c in zip(raw.place, self.chunk_shape, strict=True)]
        box = self.array[tuple(slice(a, a + c) for a, c in zip(begin, self.chunk_shape, strict=True))]
        axes = np.random.default_rng(raw.place).permutation(box.ndim)
        # axes in any order, and gaps between the numbers
        stored = np.repeat(box.transpose(axes), 2, axis=-1)[..., ::2]
        return stored.transpose(np.argsort(axes))


def result_array(rng, shape, dtype):
    """Memory for patches, not always in one piece or in order."""
    axes = rng.permutation(len(shape))
    out = np.zeros([shape[a] for a in axes], dtype).transpose(np.argsort(axes))
    return out[..., ::-1] if rng.integers(2) else out


@given(seed=st.integers(0, 2**32))
def test_compiled_placing_gives_the_bytes_of_plain_placing(seed):
    rng = np.random.default_rng(seed)
    num_axes = int(rng.integers(3, 6))
    shape, chunk, size = (tuple(rng.integers(1, n, num_axes).tolist()) for n in (12, 7, 9))
    array = rng.integers(0, 2**8, shape).astype(rng.choice(DTYPES))
    offsets = rng.integers(-9, 12, (int(rng.integers(1, 5)), num_axes))
    plan = plan_patches(shape, chunk, chunk, offsets, size)
    rows = rng.permutation(2 * len(offsets))[: len(offsets)] if rng.integers(2) else None
    job = ReadJob(source=MemorySource(array, chunk, rng), plan=plan, rows_N=rows, level=0, cache=None)
    chunks = list(enumerate(map(job.source.raw, plan.chunks.tolist())))
    results = []
    for compiled in (False, True):
        out = result_array(np.random.default_rng(seed), (2 * len(offsets), *size), array.dtype)
        Placer(job, out, compiled=compiled).place(chunks)
        results.append(out)
    np.testing.assert_array_equal(*results)


class InterleavedSource(MemorySource):
    """Chunks as decoders of JPEG put them out: the channels of a pixel beside each other."""

    def decode(self, raw):
        begin = [p * c for p, c in zip(raw.place, self.chunk_shape, strict=True)]
        box = self.array[tuple(slice(a, a + c) for a, c in zip(begin, self.chunk_shape, strict=True))]
        return np.ascontiguousarray(box.transpose(1, 2, 0)).transpose(2, 0, 1)


@given(seed=st.integers(0, 2**32), channels=st.sampled_from([1, 2, 3, 3, 3, 4]))
def test_interleaved_colours_are_taken_apart(seed, channels):
    rng = np.random.default_rng(seed)
    shape, chunk, size = ((channels, *rng.integers(1, n, 2).tolist()) for n in (200, 150, 150))
    array = rng.integers(0, 2**8, shape).astype(np.uint8)
    offsets = np.column_stack([np.zeros(2, np.int64), rng.integers(-40, 150, (2, 2))])
    plan = plan_patches(shape, chunk, chunk, offsets, size)
    job = ReadJob(source=InterleavedSource(array, chunk, rng), plan=plan, rows_N=None, level=0, cache=None)
    chunks = list(enumerate(map(job.source.raw, plan.chunks.tolist())))
    results = []
    for compiled in (False, True):
        around = np.full((2, channels, size[1] + 2, size[2] + 66), 7, np.uint8)
        Placer(job, around[:, :, 1:-1, 33:-33], compiled=compiled).place(chunks)
        results.append(around)
    np.testing.assert_array_equal(*results)


def test_a_chunk_smaller_than_what_is_read_of_it_is_an_error():
    plan = plan_patches((1, 8, 8), (1, 8, 8), (1, 8, 8), [[0, 0, 0]], (1, 8, 8))
    source = MemorySource(np.zeros((1, 8, 7), np.uint8), (1, 8, 8), np.random.default_rng(0))
    job = ReadJob(source=source, plan=plan, rows_N=None, level=0, cache=None)
    out = np.full((1, 1, 8, 8), 9, np.uint8)
    with pytest.raises(ChunkError, match=r"of shape \(1, 8, 7\) does not hold"):
        Placer(job, out, compiled=True).place([(0, RawChunk((0, 0, 0), "stored", 1))])
    assert (out == 9).all()


@pytest.mark.parametrize("rows", [[-1], [1]])
def test_nothing_is_written_outside_of_the_result(rows):
    plan = plan_patches((1, 8, 8), (1, 8, 8), (1, 8, 8), [[0, 0, 0]], (1, 8, 8))
    source = MemorySource(np.zeros((1, 8, 8), np.uint8), (1, 8, 8), np.random.default_rng(0))
    job = ReadJob(source=source, plan=plan, rows_N=np.array(rows), level=0, cache=None)
    with pytest.raises(ChunkError):
        Placer(job, np.zeros((1, 1, 8, 8), np.uint8), compiled=True).place(
            [(0, RawChunk((0, 0, 0), "stored", 1))]
        )


@pytest.fixture
def every_read_is_compiled(monkeypatch):
    monkeypatch.setattr("ats_stream.io.fetch.MIN_COMPILED_PIECES", 0)
    monkeypatch.setattr("ats_stream.io.fetch.MIN_THREADED_CHUNKS", 2)
    assert place.compiled_code() is not None
    assert zstd_library() is not None


def stored_level(folder, image, **options):
    """One level written by zarr-python."""
    attributes = ngff.build_image(
        name="x", axes="cyx", paths=["0"], downsamples=[(1, 1)], pixel_size_um=(0.5, 0.5)
    )
    group = zarr.create_group(str(folder), attributes=attributes)
    group.create_array("0", shape=image.shape, dtype=image.dtype, **options)[:] = image
    return folder


@pytest.mark.usefixtures("every_read_is_compiled")
@pytest.mark.parametrize("shards", [None, (3, 32, 32)], ids=["files", "shards"])
@pytest.mark.parametrize(
    "filters", [(), (zarr.codecs.TransposeCodec(order=(2, 0, 1)),)], ids=["", "transposed"]
)
@pytest.mark.parametrize("dtype", ["uint8", "<u2", ">u2", "float32"])
def test_stores_of_zstd_are_read_as_zarr_reads_them(tmp_path, dtype, filters, shards):
    image = np.random.default_rng(0).integers(0, 200, (3, 70, 90)).astype(np.dtype(dtype).newbyteorder("="))
    image[:, :33, 40:70] = 0  # chunks that are not written
    folder = stored_level(
        tmp_path / "a.zarr",
        image,
        chunks=(3, 16, 16),
        shards=shards,
        filters=filters,
        serializer=zarr.codecs.BytesCodec(endian="big" if dtype[0] == ">" else "little"),
        compressors=[zarr.codecs.ZstdCodec(level=1)],
        fill_value=0,
    )
    for num_threads in (1, 3):
        pyramid = open_pyramid(folder, num_threads=num_threads, cache_bytes=0)
        np.testing.assert_array_equal(pyramid.read(0), image)
        assert pyramid.read_stats(0).num_chunks == 5 * 6
        patches = pyramid.read_patches(0, [[-3, 30], [60, 80], [20, 50]], (20, 20), fill=7)
        padded = np.pad(image, ((0, 0), (20, 20), (20, 20)), constant_values=7)
        for patch, (y, x) in zip(patches, [(17, 50), (80, 100), (40, 70)], strict=True):
            np.testing.assert_array_equal(patch, padded[:, y : y + 20, x : x + 20])


CHUNK_BYTES = 3 * 16 * 16
CONTENT = bytes(np.random.default_rng(1).integers(0, 9, CHUNK_BYTES, dtype=np.uint8))


def frame(content, **options):
    return zstandard.ZstdCompressor(level=1, **options).compress(content)


FRAMES = {
    "whole": frame(CONTENT),
    "with a checksum": frame(CONTENT, write_checksum=True),
    "without its size": frame(CONTENT, write_content_size=False),
    "two frames": frame(CONTENT[:100]) + frame(CONTENT[100:]),
    "and one to skip": frame(CONTENT) + bytes.fromhex("502a4d18 02000000") + b"no",
    "too short": frame(CONTENT[:-1]),
    "too long": frame(CONTENT + b"x"),
    "far too long": frame(bytes(1 << 24)),
    "cut": frame(CONTENT)[:-1],
    "with more behind": frame(CONTENT) + b"\0",
    "no frame": b"nothing of the kind",
    "empty": b"",
}


def outcome(folder):
    try:
        return open_pyramid(folder, cache_bytes=0).read(0).tobytes()
    except SlideError as error:
        return str(error)


@pytest.mark.parametrize("kind", FRAMES)
def test_any_frame_is_what_the_plain_way_makes_of_it(tmp_path, monkeypatch, kind):
    folder = stored_level(
        tmp_path / "a.zarr",
        np.ones((3, 16, 32), np.uint8),
        chunks=(3, 16, 16),
        compressors=[zarr.codecs.ZstdCodec(level=1)],
    )
    (folder / "0" / "c" / "0" / "0" / "1").write_bytes(FRAMES[kind])
    plain = outcome(folder)
    assert isinstance(plain, bytes) == (list(FRAMES).index(kind) < 5)
    monkeypatch.setattr("ats_stream.io.fetch.MIN_COMPILED_PIECES", 0)
    assert outcome(folder) == plain


def test_damage_has_the_same_outcome_both_ways(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 9, (3, 64, 64), dtype=np.uint8)
    folder = tmp_path / "a.zarr"
    with PyramidWriter(
        folder, level_shapes=[image.shape], dtype="uint8", chunk_px=16, shard_px=64, pixel_size_um=0.5
    ) as writer:
        writer.write_shard(0, (0, 0), image)
    path = folder / "0" / "c" / "0" / "0" / "0"
    data = path.read_bytes()
    num_errors = 0
    for case in range(150):
        broken = bytearray(data)
        broken[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(broken if case % 5 else broken[: rng.integers(len(data))])
        found = []
        for least in (1 << 60, 0):
            monkeypatch.setattr("ats_stream.io.fetch.MIN_COMPILED_PIECES", least)
            found.append(outcome(folder))
        assert found[0] == found[1]
        num_errors += isinstance(found[0], str)
    assert 30 < num_errors < 150


@pytest.mark.usefixtures("every_read_is_compiled")
@pytest.mark.parametrize("missing", ["compiled_code", "zstd_library", "pread_address"])
def test_what_is_missing_is_done_without(tmp_path, monkeypatch, missing):
    image = np.random.default_rng(0).integers(0, 9, (3, 40, 40), dtype=np.uint8)
    folder = stored_level(
        tmp_path / "a.zarr", image, chunks=(3, 16, 16), compressors=[zarr.codecs.ZstdCodec(level=1)]
    )
    monkeypatch.setattr(place, missing, lambda: None)
    np.testing.assert_array_equal(open_pyramid(folder, cache_bytes=0).read(0), image)


@pytest.mark.usefixtures("every_read_is_compiled")
def test_a_result_that_cannot_be_written_is_refused(tmp_path):
    folder = stored_level(tmp_path / "a.zarr", np.ones((3, 16, 16), np.uint8), chunks=(3, 16, 16))
    out = np.zeros((1, 3, 8, 8), np.uint8)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        open_pyramid(folder).read_patches(0, [[0, 0]], (8, 8), out=out)


def test_small_reads_do_not_wait_for_numba(tmp_path):
    folder = stored_level(tmp_path / "a.zarr", np.ones((3, 40, 40), np.uint8), chunks=(3, 16, 16))
    script = f"import sys; from ats_stream.io import open_pyramid; open_pyramid({str(folder)!r}).read(0); "
    script += "sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
