"""Encoding of whole shards: from a block of pixels to the pieces that are stored one after another.

There are two ways, and both give the same bytes. The plain one encodes chunk by chunk. The compiled one, for
larger blocks of integers that become zstd, encodes a row of chunks in one call that does not hold the
interpreter lock, through memory that stays in the cache; chunks that are cut off are left to the plain one.

Shape letters: K chunks, D axes.
"""

from __future__ import annotations

import math
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ats_stream.compiled import compiled_module
from ats_stream.io.conversion.array_writer import encode_block, encode_chunk
from ats_stream.io.conversion.scratch import Scratch
from ats_stream.io.layout import grid_shape
from ats_stream.io.shard import encode_shard_parts, shard_tail
from ats_stream.io.zstd_library import ZstdEncoder, ZstdEncoderContext, address_of, zstd_encoder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor

    from ats_stream.io.conversion.array_writer import ArraySpec

Array = npt.NDArray[Any]
Place = tuple[int, ...]
# below, calling compiled code costs more than it saves
MIN_COMPILED_BYTES = 1 << 20  # 1 MiB


def shard_of_block(
    spec: ArraySpec, block: Array, scratch: Scratch, pool: Executor | None = None
) -> Sequence[bytes | memoryview]:
    """The pieces that, one after another, are the shard of a block of stored axes, cut off at the array's
    edge; none when every pixel equals the fill value. Rows of chunks are encoded in ``pool``.

    Pieces may lie in ``scratch``, where they stay until the next call with it.
    """
    code = _code_for(spec, block)
    if code is None:
        chunks = encode_block(spec, block, pool)
        return encode_shard_parts(chunks, spec.grid) if chunks else []
    grid = grid_shape(block.shape, spec.chunk)
    rows = _CompiledRows(spec, block, code, scratch)
    run = map if pool is None else pool.map
    encoded = list(run(rows.encode, range(math.prod(grid[:-1])), np.ndindex(*grid[:-1])))
    nbytes = np.concatenate([sizes for sizes, _ in encoded]).reshape(grid)
    if not nbytes.any():
        return []
    place_KD = np.argwhere(nbytes)
    parts = [part for _, row in encoded for part in row]
    return [*parts, *shard_tail(place_KD, nbytes[nbytes > 0], spec.grid)]


class _CompiledRows:
    """Rows of the chunks of one block; several threads may encode different ones at once."""

    def __init__(self, spec: ArraySpec, block: Array, code: Any, scratch: Scratch) -> None:
        self.spec, self.block, self._code = spec, block, code
        library = zstd_encoder()
        assert library is not None
        self._library: ZstdEncoder = library
        self._fill = np.frombuffer(np.array(spec.fill_value).astype(block.dtype).tobytes(), np.uint8)
        self._nbytes = math.prod(spec.chunk) * block.itemsize
        *lead, num_columns = grid_shape(block.shape, spec.chunk)
        row_bytes = num_columns * library.max_frame_bytes(self._nbytes)
        self._frames = scratch.array("frames", (math.prod(lead), row_bytes), np.uint8)
        row_bytes = spec.chunk[-1] * block.itemsize
        self._layout = np.array(spec.chunk, np.int64), np.array(block.strides, np.int64), row_bytes

    def encode(self, number: int, place: Place) -> tuple[npt.NDArray[np.int64], list[bytes | memoryview]]:
        """The row of chunks, the ``number``-th, at a place in all axes but the last: their sizes, 0 for those
        that are left out, and the data.
        """
        *lead, side = self.spec.chunk
        box = [slice(p * c, (p + 1) * c) for p, c in zip(place, lead, strict=True)]
        row = self.block[tuple(box)]
        nbytes_K = np.zeros(-(-row.shape[-1] // side), np.int64)
        num_whole = row.shape[-1] // side if row.shape[:-1] == tuple(lead) else 0
        frames = self._frames[number]
        total = self._encode_whole(row, nbytes_K[:num_whole], frames) if num_whole else 0
        if total < 0:
            num_whole = 0
        parts: list[bytes | memoryview] = [frames[:total].data] if total > 0 else []
        for k in range(num_whole, len(nbytes_K)):
            chunk = encode_chunk(self.spec, row[..., k * side : (k + 1) * side])
            nbytes_K[k] = len(chunk)
            parts += [chunk] if chunk else []
        return nbytes_K, parts

    def _encode_whole(
        self, row: Array, nbytes_K: npt.NDArray[np.int64], frames: npt.NDArray[np.uint8]
    ) -> int:
        """Encode the whole chunks of a row; return the bytes of all, -1 when the encoder fails."""
        pixels = _kept.scratch.array("chunk", (self._nbytes,), np.uint8)
        total: int = self._code.encode_row(
            nbytes_K,
            address_of(row),
            self._layout[2],
            self._layout,
            self._fill,
            (pixels, address_of(pixels)),
            (self._library.compress, _kept.context(self._library, self.spec.codec.level).address),
            (address_of(frames), len(frames)),
        )
        return total


class _PerThread(threading.local):
    """What is kept from row to row."""

    def __init__(self) -> None:
        self.scratch = Scratch()
        self._contexts: dict[int, ZstdEncoderContext] = {}

    def context(self, library: ZstdEncoder, level: int) -> ZstdEncoderContext:
        """Making one costs as much as encoding a small chunk."""
        if level not in self._contexts:
            self._contexts[level] = library.new_context(level)
        return self._contexts[level]


_kept = _PerThread()


def _code_for(spec: ArraySpec, block: Array) -> Any:
    """The compiled way, None where it is not for this block."""
    is_plain = spec.codec.name == "zstd" and block.dtype.kind in "iu" and block.dtype.isnative
    if not is_plain or sys.byteorder != "little" or block.dtype != spec.dtype or block.ndim < 2:
        return None
    if block.nbytes < MIN_COMPILED_BYTES or block.strides[-1] != block.itemsize:
        return None
    # importing it for this alone takes longer than it saves
    is_loaded = "numba" in sys.modules and zstd_encoder() is not None
    return compiled_code() if is_loaded else None


def compiled_code() -> Any:
    """The compiled way, None where numba cannot be used; chunks are encoded one by one then."""
    return compiled_module("ats_stream.io.conversion.encode_numba")
