"""From stored chunks to patches: decoding, and copying of the pieces to where they belong.

There are two ways, and both give the same bytes. The plain one decodes a chunk and copies its pieces by
slices. The compiled one, for larger reads, copies those of many chunks in one call that does not hold the
interpreter lock; zstd chunks are decoded in that call, each into the same memory, which stays in the cache.

Shape letters: K chunks, D axes, P pieces, as in :mod:`ats_stream.io.plan`.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ats_stream.compiled import compiled_module
from ats_stream.io.sources import ChunkError, ChunkSource, RawChunk, StoreSource
from ats_stream.io.zstd_library import address_of, pread_address, zstd_library

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ats_stream.io.chunk_cache import ChunkCache
    from ats_stream.io.plan import PatchPlan
    from ats_stream.io.sources import Place

Array = npt.NDArray[Any]
Int = npt.NDArray[np.int64]
Numbered = tuple[int, RawChunk]
"""A chunk with its number in the plan."""


@dataclass(frozen=True, kw_only=True)
class ReadJob:
    """The part of a read that concerns one level of one image."""

    source: ChunkSource
    plan: PatchPlan
    rows_N: npt.NDArray[np.int64] | None
    """Where each patch of the plan goes in the result; None for the same order."""
    level: int
    cache: ChunkCache | None
    is_once: bool = False
    """Whether the cache keeps only chunks that do not lie wholly in a patch."""

    def keep(self, number: int, place: Place, chunk: Array) -> None:
        """Put a chunk into the cache, if it is to be kept."""
        if self.cache is not None and not (self.is_once and self._is_whole[number]):
            self.cache.put((self.level, place), chunk)

    @functools.cached_property
    def _is_whole(self) -> npt.NDArray[np.bool_]:
        """Which chunks come as one piece that is all of them, as far as they lie in the level."""
        plan = self.plan
        chunk, shape = np.array(self.source.chunk_shape), np.array(self.source.shape)
        extent_KD = np.minimum(chunk, shape - plan.chunks * chunk)
        whole_K: npt.NDArray[np.bool_] = (plan.piece_size[plan.first_piece[:-1]] == extent_KD).all(axis=1)
        return whole_K


class Placer:
    """Decodes the chunks of one job and copies their pieces into ``out`` (N, *size).

    Several threads may place different chunks at once.
    """

    def __init__(self, job: ReadJob, out: Array, *, compiled: bool) -> None:
        """``compiled`` asks for the compiled way, taken where it is possible."""
        plan = job.plan
        self.job, self.out = job, out
        self._rows_P = plan.piece_patch if job.rows_N is None else job.rows_N[plan.piece_patch]
        self._code: Any = compiled_code() if compiled and _is_plain_memory(out) else None
        self._zstd = None
        if self._code is None:
            return
        of_chunks = plan.first_piece, self._rows_P, plan.piece_source, plan.piece_target, plan.piece_size
        self._pieces = tuple(np.ascontiguousarray(a, np.int64) for a in of_chunks)
        self._memory = address_of(out), _numbers(out.shape), _numbers(out.strides), out.itemsize
        self._layout = _zstd_layout(job.source)
        # chunks that are to be kept must become arrays of their own
        is_frame = self._layout is not None and job.cache is None and job.source.dtype == out.dtype
        self._zstd = zstd_library() if is_frame else None

    def place(self, chunks: Sequence[Numbered]) -> None:
        """Copy the pieces of chunks; ChunkError for one that cannot be decoded."""
        if self._code is None:
            for number, raw in chunks:
                self._place_plainly(number, raw)
            return
        frames: list[Numbered] = []
        arrays: list[tuple[int, Array]] = []
        for number, raw in chunks:
            if self._zstd is not None and raw.data is not None:
                frames.append((number, raw))
            else:
                arrays.append((number, self._pixels(number, raw)))
        if arrays:
            self._place_arrays(arrays)
        if frames:
            self._place_frames(frames)

    def _pixels(self, number: int, raw: RawChunk) -> Array:
        source = self.job.source
        if raw.data is None:
            return np.broadcast_to(np.asarray(source.fill_value).astype(source.dtype), source.chunk_shape)
        if isinstance(raw.data, np.ndarray):
            return raw.data  # from the cache
        chunk = source.decode(raw)
        self.job.keep(number, raw.place, chunk)
        return chunk

    def _place_plainly(self, number: int, raw: RawChunk) -> None:
        chunk = self._pixels(number, raw)
        first_piece, source, target = self._slices
        for p in range(first_piece[number], first_piece[number + 1]):
            self.out[target[p]] = chunk[source[p]]

    @functools.cached_property
    def _slices(self) -> tuple[list[int], list[tuple[slice, ...]], list[tuple[Any, ...]]]:
        """The first piece of every chunk; of every piece, where it is in its chunk and where it goes."""
        plan = self.job.plan
        source, target = (
            [
                (*map(slice, a, b),)
                for a, b in zip(first.tolist(), (first + plan.piece_size).tolist(), strict=True)
            ]
            for first in (plan.piece_source, plan.piece_target)
        )
        rows = self._rows_P.tolist()
        return plan.first_piece.tolist(), source, [(n, *at) for n, at in zip(rows, target, strict=True)]

    def _place_arrays(self, arrays: Sequence[tuple[int, Array]]) -> None:
        chunks = [np.asarray(chunk, self.out.dtype) for _, chunk in arrays]
        numbers = [number for number, _ in arrays]
        done = self._code.place(
            _numbers([address_of(chunk) for chunk in chunks]),
            _numbers([chunk.strides for chunk in chunks]),
            _numbers([chunk.shape for chunk in chunks]),
            _numbers(numbers),
            self._pieces,
            self._memory,
        )
        if done < len(chunks):
            place = self.job.plan.chunks[numbers[done]].tolist()
            raise ChunkError(f"chunk {place} of shape {chunks[done].shape} does not hold what is read of it")

    def _place_frames(self, frames: Sequence[Numbered]) -> None:
        """Decode and copy; a chunk that is no whole frame of the right size is left to the plain way."""
        # a byte more, because no bytes have no address
        data = np.frombuffer(b"".join([*(raw.data for _, raw in frames), b"\0"]), np.uint8)
        sizes_K = _numbers([len(raw.data) for _, raw in frames])
        data_K2 = np.stack([address_of(data) + np.cumsum(sizes_K) - sizes_K, sizes_K], axis=1)
        is_done_K = self._run_zstd(-1, data_K2, _numbers([number for number, _ in frames]))
        for k in np.flatnonzero(~is_done_K).tolist():
            self._place_plainly(*frames[k])

    @property
    def can_read_files(self) -> bool:
        """Whether :meth:`place_file` may be used."""
        return self._zstd is not None and pread_address() is not None

    def place_file(self, file: int, data_K2: Int, numbers_K: Int) -> npt.NDArray[np.bool_]:
        """Read, decode and copy chunks of an open file, given where they begin and their sizes.

        Returns which of them are done (K,). The others are left to the plain way: absent ones (-1), such as
        could not be read, and what is no whole frame of the right size.
        """
        return self._run_zstd(file, data_K2, numbers_K)

    def _run_zstd(self, file: int, data_K2: Int, numbers_K: Int) -> npt.NDArray[np.bool_]:
        assert self._zstd is not None
        assert self._layout is not None
        if not hasattr(_kept, "zstd"):
            _kept.zstd = self._zstd.new_context()
        nbytes, shape, strides = self._layout
        chunk = np.empty(nbytes, np.uint8)
        frame = np.empty(max(0, int(data_K2[:, 1].max())) if file >= 0 else 0, np.uint8)
        is_done_K = np.zeros(len(numbers_K), np.bool_)
        self._code.place_zstd(
            is_done_K,
            (pread_address() or 0, self._zstd.decompress),
            (file, address_of(frame)),
            data_K2,
            (_kept.zstd.address, address_of(chunk), nbytes),
            (shape, strides),
            numbers_K,
            self._pieces,
            self._memory,
        )
        return is_done_K


_kept = threading.local()


def compiled_code() -> Any:
    """The compiled way, None where numba cannot be used; numba is imported at the first call."""
    return compiled_module("ats_stream.io.place_numba")


def _zstd_layout(source: ChunkSource) -> tuple[int, Int, Int] | None:
    """Bytes of a chunk that is one zstd frame, and its shape and strides; None for other chunks."""
    layout = source.zstd_layout if isinstance(source, StoreSource) else None
    return None if layout is None else (layout[0], _numbers(layout[1]), _numbers(layout[2]))


def _is_plain_memory(out: Array) -> bool:
    return out.flags.writeable and out.dtype.isnative and out.itemsize in (1, 2, 4, 8)


def _numbers(values: Any) -> Int:
    return np.array(values, np.int64)
