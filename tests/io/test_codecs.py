"""Decoding of single chunks: the fast ways give what the plain ones give."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import zstandard

from ats_stream.io.codecs import ChunkDecoder

PIXELS = np.random.default_rng(0).integers(0, 9, (3, 32, 32), dtype=np.uint8)
CONTENT = PIXELS.tobytes()


def compressed(content, **more):
    return zstandard.ZstdCompressor(**more).compress(content)


def decoder(**more):
    given = {"shape": PIXELS.shape, "stored_dtype": np.dtype("u1"), "order": None, "steps": ("zstd",)} | more
    return ChunkDecoder(**given)


@pytest.mark.parametrize(
    "data",
    [
        compressed(CONTENT),
        compressed(CONTENT, write_checksum=True),
        compressed(CONTENT, write_content_size=False),
        compressed(CONTENT[:1000]) + compressed(CONTENT[1000:]),
        compressed(CONTENT) + bytes.fromhex("502a4d18 02000000") + b"no",
    ],
    ids=["plain", "checksum", "no size", "two frames", "skippable frame"],
)
def test_every_kind_of_zstd_is_decoded(data):
    np.testing.assert_array_equal(decoder()(data), PIXELS)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (compressed(CONTENT) + b"x", "zstd cannot decode"),
        (compressed(CONTENT)[:-1], "zstd cannot decode"),
        (compressed(CONTENT) + compressed(b"x"), "zstd cannot decode"),
        (compressed(CONTENT + b"x"), "zstd cannot decode"),
        (compressed(CONTENT, write_checksum=True)[:-1] + b"?", "zstd cannot decode .* checksum"),
        (compressed(CONTENT[1:]), "3071 bytes after decoding, expected 3072"),
        (b"", "0 bytes after decoding, expected 3072"),
    ],
    ids=["bytes behind", "cut", "more frames", "too long", "checksum", "too short", "empty"],
)
def test_zstd_that_is_not_the_chunk_is_an_error(data, says):
    decode = decoder()
    with pytest.raises(ValueError, match=says):
        decode(data)
    # what is kept between chunks is not spoilt by damage
    np.testing.assert_array_equal(decode(compressed(CONTENT)), PIXELS)


def test_threads_do_not_share_a_decompressor():
    images = np.random.default_rng(1).integers(0, 255, (4, *PIXELS.shape), dtype=np.uint8)
    decode, start = decoder(), threading.Barrier(len(images))
    num_wrong = [1] * len(images)

    def work(number):
        data = compressed(images[number].tobytes())
        start.wait()
        num_wrong[number] = sum(not np.array_equal(decode(data), images[number]) for _ in range(200))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert num_wrong == [0] * len(images)


@pytest.mark.parametrize("order", [None, (1, 2, 0), (2, 0, 1), (0, 2, 1)])
@pytest.mark.parametrize("stored", ["<u2", ">u2"])
def test_axes_and_byte_order_are_those_of_the_chunk(order, stored):
    chunk = np.arange(3 * 4 * 5, dtype=np.uint16).reshape(3, 4, 5)
    data = chunk.transpose(order or (0, 1, 2)).astype(stored).tobytes()
    given = {"shape": chunk.shape, "stored_dtype": np.dtype(stored), "order": order, "steps": ()}
    decoded = decoder(**given)(data)
    assert decoded.dtype == np.uint16
    assert decoded.dtype.isnative
    np.testing.assert_array_equal(decoded, chunk)
