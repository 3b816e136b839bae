"""Shards of zarr v3 (codec ``sharding_indexed``) as bytes: encoding, and parsing of the index.

A shard is its chunks one after another, then the index: for every place of the chunk grid, in C order, two
little-endian uint64 ``offset, nbytes`` (both ``2**64 - 1`` for an absent chunk), then the crc32c of these
bytes.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ABSENT = 2**64 - 1
CRC_BYTES = 4


def index_nbytes(grid: Sequence[int], *, has_crc: bool = True) -> int:
    """Size in bytes of the index of a shard of ``grid`` chunks."""
    return 16 * math.prod(grid) + (CRC_BYTES if has_crc else 0)


def encode_shard_parts(chunks: Mapping[tuple[int, ...], bytes], grid: Sequence[int]) -> list[bytes]:
    """The pieces that, one after another, are the shard; saves a copy against :func:`encode_shard`."""
    places = sorted(chunks)
    parts = [chunks[place] for place in places]
    for place in places:
        if len(place) != len(grid):
            raise ValueError(f"chunk {place} lies outside the shard's grid {tuple(grid)}")
    place_KD = np.array(places, np.int64).reshape(-1, len(grid))
    return [*parts, *shard_tail(place_KD, [len(part) for part in parts], grid)]


def shard_tail(
    place_KD: npt.NDArray[np.int64], nbytes_K: npt.ArrayLike, grid: Sequence[int]
) -> tuple[bytes, bytes]:
    """The index of a shard whose chunks lie one after another at these places, and its crc32c."""
    outside = np.flatnonzero(((place_KD < 0) | (place_KD >= np.array(grid))).any(axis=1))
    if len(outside):
        place = tuple(place_KD[outside[0]].tolist())
        raise ValueError(f"chunk {place} lies outside the shard's grid {tuple(grid)}")
    index = np.full((*grid, 2), ABSENT, dtype="<u8")
    sizes = np.asarray(nbytes_K, np.uint64)
    index[tuple(place_KD.T)] = np.stack([np.cumsum(sizes) - sizes, sizes], axis=-1)
    index_bytes = index.tobytes()
    return index_bytes, struct.pack("<I", google_crc32c.value(index_bytes))


def encode_shard(chunks: Mapping[tuple[int, ...], bytes], grid: Sequence[int]) -> bytes:
    """A shard of the encoded ``chunks`` (place in the grid -> bytes); places without bytes are absent.

    >>> shard = encode_shard({(0, 1): b"abc"}, (1, 2))
    >>> parse_index(shard, (1, 2)).tolist() == [[[ABSENT, ABSENT], [0, 3]]]
    True
    """
    return b"".join(encode_shard_parts(chunks, grid))


def parse_index(data: bytes, grid: Sequence[int], *, has_crc: bool = True) -> npt.NDArray[np.uint64]:
    """The index (``*grid``, 2) of offsets and sizes from a shard or from its last bytes.

    Raises ValueError when the bytes are too few or their crc32c does not match.
    """
    size = index_nbytes(grid, has_crc=has_crc)
    if len(data) < size:
        raise ValueError(f"truncated shard: {len(data)} bytes, its index alone has {size}")
    tail = data[len(data) - size :]
    if has_crc:
        stored = struct.unpack("<I", tail[-CRC_BYTES:])[0]
        computed = google_crc32c.value(tail[:-CRC_BYTES])
        if stored != computed:
            raise ValueError(f"shard index is damaged: crc32c {computed:08x}, stored {stored:08x}")
        tail = tail[:-CRC_BYTES]
    return np.frombuffer(tail, dtype="<u8").reshape(*grid, 2).astype(np.uint64)


def check_index(index_2: npt.NDArray[np.uint64], data_nbytes: int) -> None:
    """ValueError unless every present chunk of the index lies inside the first ``data_nbytes`` bytes."""
    present = index_2[..., 0] != ABSENT
    # python integers: offset + nbytes of a hostile index may wrap around in uint64
    if bool(present.any()):
        offsets, sizes = index_2[..., 0][present], index_2[..., 1][present]
        if int(offsets.max()) > data_nbytes or int(sizes.max()) > data_nbytes:
            raise ValueError(f"truncated shard: its index points past its {data_nbytes} bytes of chunks")
        if int((offsets + sizes).max()) > data_nbytes:
            raise ValueError(f"truncated shard: its index points past its {data_nbytes} bytes of chunks")
