"""The compiled way of encoding shards gives the bytes of the plain one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ats_stream.io.codecs import ChunkCodec
from ats_stream.io.conversion import block_encoder
from ats_stream.io.conversion.array_writer import ArraySpec, encode_block
from ats_stream.io.conversion.block_encoder import shard_of_block
from ats_stream.io.conversion.scratch import Scratch
from ats_stream.io.shard import encode_shard_parts
from ats_stream.io.zstd_library import zstd_encoder

AXES = {2: "yx", 3: "cyx", 4: "czyx", 5: "tczyx"}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Whatever the size of a block, the compiled way is taken where it is possible."""
    assert block_encoder.compiled_code() is not None
    monkeypatch.setattr(block_encoder, "MIN_COMPILED_BYTES", 0)


def random_shard(seed):
    """A spec, and a block cut off anywhere; its memory may be that of a larger array."""
    rng = np.random.default_rng(seed)
    num_axes = int(rng.integers(2, 6))
    chunk = tuple(rng.integers(1, 6, num_axes).tolist())
    grid = rng.integers(1, 5, num_axes)
    shape = tuple(max(1, n - int(rng.integers(c))) for n, c in zip(grid * chunk, chunk, strict=True))
    dtype = np.dtype(rng.choice(["uint8", "int8", "uint16", "int32", "uint32", "float32"]))
    spec = ArraySpec(
        shape=shape,
        dtype=dtype,
        axes=AXES[num_axes],
        chunk=chunk,
        shard=tuple((grid * chunk).tolist()),
        fill_value=int(rng.integers(0, 3)),
        codec=ChunkCodec(name=str(rng.choice(["zstd", "zstd", "raw"])), level=int(rng.integers(1, 5))),
    )
    margin = int(rng.integers(2))
    whole = rng.integers(0, 1 + 2 * int(rng.integers(2)), [n + margin for n in shape]).astype(dtype)
    # single pixels of another value, in the first or in the last byte
    whole[tuple(rng.integers(0, whole.shape))] += dtype.type(int(rng.choice([1, 100])))
    whole += dtype.type(spec.fill_value)
    return spec, whole[tuple(slice(n) for n in shape)]


def plain(spec, block):
    chunks = encode_block(spec, block)
    return b"".join(encode_shard_parts(chunks, spec.grid)) if chunks else b""


@given(seed=st.integers(0, 2**32))
def test_compiled_encoding_gives_the_bytes_of_plain_encoding(seed):
    spec, block = random_shard(seed)
    expected = plain(spec, block)
    assert b"".join(shard_of_block(spec, block, Scratch())) == expected


def test_threads_give_the_same_bytes():
    pixels = np.random.default_rng(3).integers(0, 9, (3, 300, 300)).astype(np.uint8)
    with ThreadPoolExecutor(3) as pool:
        assert b"".join(shard_of_block(rgb_spec(), pixels, Scratch(), pool)) == plain(rgb_spec(), pixels)


def rgb_spec(level=1):
    return ArraySpec.square(
        shape=(3, 300, 300),
        dtype=np.dtype(np.uint8),
        axes="cyx",
        chunk_px=64,
        shard_px=512,
        fill_value=255,
        codec=ChunkCodec(name="zstd", level=level),
    )


@pytest.mark.parametrize("level", [1, 3])
def test_compiled_encoding_is_taken_for_colours_and_encodes_no_whole_chunk_plainly(level, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 200, (3, 300, 300)).astype(np.uint8)
    expected = plain(rgb_spec(level), pixels)
    plainly = []
    encode_chunk = block_encoder.encode_chunk

    def recorded(spec, chunk):
        plainly.append(chunk.shape)
        return encode_chunk(spec, chunk)

    monkeypatch.setattr(block_encoder, "encode_chunk", recorded)
    assert b"".join(shard_of_block(rgb_spec(level), pixels, Scratch())) == expected
    # a column and a row of the grid are cut off, 300 = 4 * 64 + 44
    assert sorted(plainly) == [(3, 44, 44)] + [(3, 44, 64)] * 4 + [(3, 64, 44)] * 4


def test_a_shard_of_nothing_but_the_fill_value_has_no_pieces():
    assert shard_of_block(rgb_spec(), np.full((3, 300, 300), 255, np.uint8), Scratch()) == []


@pytest.mark.parametrize("missing", ["compiled_code", "zstd_encoder"])
def test_where_something_is_missing_the_plain_way_is_taken(missing, monkeypatch):
    pixels = np.random.default_rng(1).integers(0, 9, (3, 300, 300)).astype(np.uint8)
    monkeypatch.setattr(block_encoder, missing, lambda: None)
    assert b"".join(shard_of_block(rgb_spec(), pixels, Scratch())) == plain(rgb_spec(), pixels)


def test_a_row_that_the_encoder_refuses_is_encoded_plainly(monkeypatch):
    pixels = np.random.default_rng(2).integers(0, 256, (3, 300, 300)).astype(np.uint8)
    # too little room for frames of noise, which the encoder reports as an error
    monkeypatch.setattr(zstd_encoder(), "max_frame_bytes", lambda nbytes: nbytes // 2)
    monkeypatch.setattr(block_encoder, "_kept", block_encoder._PerThread())
    assert b"".join(shard_of_block(rgb_spec(), pixels, Scratch())) == plain(rgb_spec(), pixels)


@pytest.mark.parametrize("level", [1, 12])
def test_the_encoder_gives_the_frames_of_zstandard(level):
    library = zstd_encoder()
    assert library is not None
    context = library.new_context(level)
    for nbytes in (1, 49152, 150000):
        data = np.random.default_rng(nbytes).integers(0, 7, nbytes).astype(np.uint8)
        out = np.empty(library.max_frame_bytes(nbytes), np.uint8)
        size = library.call(context.address, out.ctypes.data, len(out), data.ctypes.data, nbytes)
        assert out[:size].tobytes() == zstandard.ZstdCompressor(level=level).compress(data)
