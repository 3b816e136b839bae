"""Small files that claim much: opening and reading them costs no more memory than ADDRESS_BYTES.

The bound is on addresses, so even memory that is asked for and never touched counts.
"""

from __future__ import annotations

import gzip
import json
import os
from typing import TYPE_CHECKING, Any

import google_crc32c
import imagecodecs
import numpy as np
import pytest

from ats_stream.errors import InputError, SlideError
from ats_stream.io import PyramidWriter, open_pyramid
from ats_stream.io.shard import encode_shard

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ADDRESS_BYTES = 128 << 20  # 128 MiB
SIDE = 64


@pytest.fixture
def slide(tmp_path: Path, address_limit: Callable[[int], None]) -> Path:
    """3 x 64 x 64 pixels of noise in chunks of 32 px, one shard; from here on memory is limited."""
    target = tmp_path / "slide.zarr"
    noise = np.random.default_rng(0).integers(1, 255, (3, SIDE, SIDE), dtype=np.uint8)
    with PyramidWriter(
        target, level_shapes=[noise.shape], dtype="uint8", chunk_px=32, shard_px=64, num_threads=1
    ) as writer:
        writer.write_shard(0, (0, 0), noise)
    np.testing.assert_array_equal(open_pyramid(target).read(0), noise)
    address_limit(ADDRESS_BYTES)
    return target


def claim(slide: Path, shape: list[int], shard: list[int], chunk: list[int], **more: Any) -> None:
    path = slide / "0" / "zarr.json"
    meta = json.loads(path.read_text())
    meta |= {"shape": shape, **more}
    meta["chunk_grid"]["configuration"]["chunk_shape"] = shard
    meta["codecs"][0]["configuration"]["chunk_shape"] = chunk
    path.write_text(json.dumps(meta))


def use_codec(slide: Path, codec: str) -> None:
    path = slide / "0" / "zarr.json"
    meta = json.loads(path.read_text())
    meta["codecs"][0]["configuration"]["codecs"][1] = {"name": codec, "configuration": {}}
    path.write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("shape", "shard", "chunk", "says"),
    [
        ([1, 10**8, 10**7], [1, 4096, 4096], [1, 128, 128], "too large: 1000000000000000 pixels"),
        ([3, 2**40, 2**40], [3, 4096, 4096], [3, 128, 128], "too large"),
        ([3, 64, 64], [3, 2**15, 2**15], [3, 2**15, 2**15], "too large: chunks of 3221225472 bytes"),
        ([3, 64, 64], [3, 2**40, 2**40], [3, 2**40, 2**40], "too large"),
        ([3, 64, 64], [3, 2**13, 2**13], [1, 1, 1], "too large: 201326592 chunks per shard"),
        ([1, 1, 2**40], [2**10, 2**10, 1], [1, 1, 1], "too large"),
    ],
)
def test_metadata_that_claim_too_much_are_refused(
    slide: Path, shape: list[int], shard: list[int], chunk: list[int], says: str
) -> None:
    claim(slide, shape, shard, chunk)
    with pytest.raises(SlideError, match=rf"slide\.zarr: level '0': .*{says}"):
        open_pyramid(slide)


def test_a_level_larger_than_memory_is_read_in_patches_alone(slide: Path) -> None:
    claim(slide, [3, 2**20, 2**20], [3, SIDE, SIDE], [3, 32, 32])
    pyramid = open_pyramid(slide)
    with pytest.raises(InputError, match=r"3298534883328 bytes of pixels .* do not fit into memory"):
        pyramid.read(0)
    with pytest.raises(InputError, match="do not fit into memory"):
        pyramid.read_patches(0, [[0, 0]] * 10, (2**19, 2**19))
    patches = pyramid.read_patches(0, [[0, 0], [2**20 - 8, 2**20 - 8]], (8, 8), fill=7)
    assert patches[0].all()
    assert not patches[1].any()


def test_chunks_too_small_for_the_request_are_refused(slide: Path) -> None:
    claim(slide, [1, 4096, 4096], [1, 64, 64], [1, 1, 1])
    with pytest.raises(InputError, match=r"takes 16777216 pieces of chunks \(1, 1, 1\), at most 1048576"):
        open_pyramid(slide).read(0)


def test_an_index_larger_than_its_file_is_not_read(slide: Path) -> None:
    claim(slide, [3, 2048, 2048], [3, 2048, 2048], [3, 1, 1])
    with pytest.raises(SlideError, match=r"truncated shard: .* its index alone has 67108868"):
        open_pyramid(slide).read_patches(0, [[0, 0]], (1, 1))


def noise_frame(claimed: int) -> bytes:
    """A zstd frame of 12 bytes that states its content has ``claimed`` bytes."""
    return bytes.fromhex("28b52ffd e0") + claimed.to_bytes(8, "little") + bytes.fromhex("01 00 00")


def blosc_header(claimed: int) -> bytes:
    return bytes([2, 1, 2, 1]) + b"".join(n.to_bytes(4, "little") for n in (claimed, claimed, 32)) + bytes(16)


@pytest.mark.parametrize(
    ("codec", "data"),
    [
        ("zstd", noise_frame(10 << 30)),
        ("zstd", imagecodecs.zstd_encode(bytes(64 << 20), 1)),
        ("gzip", gzip.compress(bytes(4 << 20))),
        ("gzip", gzip.compress(b"x")[:-4] + (2**32 - 1).to_bytes(4, "little")),
        ("blosc", blosc_header(2**31 - 17)),
        ("blosc", blosc_header(2**32 - 1)),
        ("blosc", imagecodecs.blosc_encode(bytes(1 << 20))),
    ],
    ids=["zstd-claim", "zstd-bomb", "gzip-bomb", "gzip-claim", "blosc-claim", "blosc-negative", "blosc-bomb"],
)
def test_chunks_that_unpack_to_too_much_are_refused(slide: Path, codec: str, data: bytes) -> None:
    use_codec(slide, codec)
    assert len(data) < 2 * 3 * 32 * 32  # larger ones are not even fetched
    (slide / "0" / "c" / "0" / "0" / "0").write_bytes(encode_shard({(0, 0, 0): data}, (1, 2, 2)))
    with pytest.raises(SlideError, match=r"level 0: chunk \(0, 0, 0\) is damaged: "):
        open_pyramid(slide).read(0)


def test_a_chunk_larger_than_its_pixels_is_not_even_fetched(slide: Path) -> None:
    path = slide / "0" / "c" / "0" / "0" / "0"
    index = np.full((1, 2, 2, 2), 2**64 - 1, "<u8")
    index[0, 0, 0] = (0, 1 << 30)
    with path.open("wb") as file:  # a file with a hole of 1 GiB
        file.seek(1 << 30)
        file.write(index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little"))
    with pytest.raises(SlideError, match="1073741824 bytes, no codec needs more than 7552"):
        open_pyramid(slide).read(0)


def test_metadata_of_many_bytes_are_not_read(slide: Path) -> None:
    with (slide / "zarr.json").open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(SlideError, match=r"zarr\.json has 1073741824 bytes, at most 67108864 are read"):
        open_pyramid(slide)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are of Unix")
@pytest.mark.parametrize("file", ["zarr.json", "0/zarr.json", "0/c/0/0/0"])
def test_a_pipe_is_not_waited_for(slide: Path, file: str) -> None:
    (slide / file).unlink()
    os.mkfifo(slide / file)
    with pytest.raises(SlideError, match="not a file"):
        open_pyramid(slide).read(0)


@pytest.mark.parametrize("path", ["../other", "/etc", "a/../../0"])
def test_levels_outside_of_the_folder_are_not_opened(slide: Path, path: str) -> None:
    meta = json.loads((slide / "zarr.json").read_text())
    meta["attributes"]["ome"]["multiscales"][0]["datasets"][0]["path"] = path
    (slide / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(SlideError, match="leads out of the folder"):
        open_pyramid(slide)
