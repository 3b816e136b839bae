"""Where the chunks of one level come from: local zarr v3 files, any array that zarr-python opens, or memory.

Every source shows its level as (C, *space), whatever axes the stored array has.
"""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ats_stream.io.layout import check_bounds
from ats_stream.io.shard import ABSENT, check_index, index_nbytes, parse_index

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ats_stream.io.layout import ArrayLayout

Array = npt.NDArray[Any]
Place = tuple[int, ...]
# without O_NONBLOCK, opening a pipe would wait for its writer
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
INDEX_CACHE_BYTES = 16 << 20  # 16 MiB: a thousand shards of 32 x 32 chunks


class ChunkError(Exception):
    """A chunk or shard cannot be read; the pyramid turns it into an error that names the slide and the
    level."""


@dataclass(frozen=True)
class RawChunk:
    """A chunk as it is stored; ``data`` is None when the store holds nothing for it."""

    place: Place
    data: Any
    stored_bytes: int


class ChunkSource(Protocol):
    """What the fetcher needs of a level."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_shape: tuple[int, ...]
    shard_shape: tuple[int, ...]
    fill_value: Any

    def fetch(self, shard: Place, /, places: Sequence[Place]) -> Iterator[RawChunk]:
        """Yield the stored chunks of one shard in the order asked for."""

    def decode(self, raw: RawChunk) -> Array:
        """Turn a stored chunk with data into pixels (C, *space); outside of the level it may be cut off."""


@dataclass(frozen=True)
class AxisMap:
    """How stored axes become (C, *space): ``keep[i]`` is the stored axis of axis i, None for a new one."""

    keep: tuple[int | None, ...]
    ndim: int

    @cached_property
    def is_identity(self) -> bool:
        """Whether the stored axes are (C, *space) already."""
        return self.keep == tuple(range(self.ndim))

    def view(self, values: Sequence[int]) -> tuple[int, ...]:
        """Reorder one number per stored axis."""
        return tuple(1 if a is None else int(values[a]) for a in self.keep)

    def stored(self, place: Sequence[int]) -> tuple[int, ...]:
        """Back from a place in (C, *space) to the stored axes; axes that were dropped are at 0."""
        result = [0] * self.ndim
        for value, axis in zip(place, self.keep, strict=True):
            if axis is not None:
                result[axis] = int(value)
        return tuple(result)

    def array(self, array: Array) -> Array:
        """Reorder the axes of a block; dropped axes have length 1, so their first plane is all."""
        if self.is_identity:
            return array
        kept = [a for a in self.keep if a is not None]
        array = array[tuple(slice(None) if a in kept else 0 for a in range(self.ndim))]
        array = array.transpose([sorted(kept).index(a) for a in kept])
        return array.reshape(
            *[1 if a is None else n for a, n in zip(self.keep, self._sizes(array), strict=True)]
        )

    def _sizes(self, array: Array) -> list[int]:
        sizes = iter(array.shape)
        return [1 if a is None else next(sizes) for a in self.keep]


class LocalSource:
    """Chunks of a zarr v3 array in local files, sharded or not, with codecs known here."""

    def __init__(self, folder: Path, layout: ArrayLayout, axes: AxisMap) -> None:
        self.folder, self.layout, self.axes = folder, layout, axes
        self.shape, self.dtype = axes.view(layout.shape), layout.dtype
        self.chunk_shape, self.shard_shape = axes.view(layout.chunk_shape), axes.view(layout.shard_shape)
        self.fill_value = layout.fill_value
        self._indices = _IndexCache()

    def fetch(self, shard: Place, /, places: Sequence[Place]) -> Iterator[RawChunk]:
        """Read the byte ranges of the chunks; a missing file means that all its chunks are absent."""
        key = self.layout.key(self.axes.stored(shard))
        try:
            fd = os.open(self.folder / key, OPEN_FLAGS)
        except FileNotFoundError:
            yield from (RawChunk(place, None, 0) for place in places)
            return
        except OSError as error:
            raise ChunkError(f"cannot open {key}: {error.strerror}") from error
        try:
            yield from self._fetch_open(fd, key, places)
        except OSError as error:
            raise ChunkError(f"cannot read {key}: {error.strerror}") from error
        finally:
            os.close(fd)

    def _fetch_open(self, fd: int, key: str, places: Sequence[Place]) -> Iterator[RawChunk]:
        info = os.fstat(fd)
        if stat.S_ISFIFO(info.st_mode):
            raise ChunkError(f"cannot read {key}: not a file")
        if not self.layout.is_sharded:
            self._check_size(f"chunk {places[0]}", info.st_size)
            yield RawChunk(places[0], os.pread(fd, info.st_size, 0), info.st_size)
            return
        index = self._indices.get(key, (info.st_size, info.st_mtime_ns))
        if index is None:
            index = self._read_index(fd, key, info.st_size)
            self._indices.put(key, (info.st_size, info.st_mtime_ns), index)
        grid = self.layout.grid
        for place in places:
            inner = tuple(p % g for p, g in zip(self.axes.stored(place), grid, strict=True))
            offset, nbytes = (int(v) for v in index[inner])
            if offset == ABSENT:
                yield RawChunk(place, None, 0)
                continue
            self._check_size(f"chunk {place}", nbytes)
            data = os.pread(fd, nbytes, offset)
            if len(data) != nbytes:
                raise ChunkError(f"shard {key} is truncated: chunk {inner} has {len(data)} of {nbytes} bytes")
            yield RawChunk(place, data, nbytes)

    def _check_size(self, what: str, nbytes: int) -> None:
        limit = self.layout.decoder.max_stored_bytes
        if nbytes > limit:
            raise ChunkError(f"{what} is damaged: {nbytes} bytes, no codec needs more than {limit}")

    def _read_index(self, fd: int, key: str, size: int) -> npt.NDArray[np.uint64]:
        layout = self.layout
        wanted = index_nbytes(layout.grid, has_crc=layout.index_has_crc)
        try:
            if wanted > size:
                raise ValueError(f"truncated shard: {size} bytes, its index alone has {wanted}")
            tail = os.pread(fd, wanted, max(0, size - wanted) if layout.index_at_end else 0)
            index = parse_index(tail, layout.grid, has_crc=layout.index_has_crc)
            check_index(index, size - wanted if layout.index_at_end else size)
        except ValueError as error:
            raise ChunkError(f"shard {key}: {error}") from error
        return index

    def decode(self, raw: RawChunk) -> Array:
        """Decode with the array's codecs."""
        try:
            return self.axes.array(self.layout.decoder(raw.data))
        except ValueError as error:
            raise ChunkError(f"chunk {raw.place} is damaged: {error}") from error


class _IndexCache:
    """Shard indices by key, least recently used dropped; an entry holds for one size and time of its file."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, tuple[tuple[int, int], npt.NDArray[np.uint64]]] = OrderedDict()
        self._bytes = 0

    def get(self, key: str, stamp: tuple[int, int]) -> npt.NDArray[np.uint64] | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry[0] != stamp:
                return None
            self._entries.move_to_end(key)
            return entry[1]

    def put(self, key: str, stamp: tuple[int, int], index: npt.NDArray[np.uint64]) -> None:
        with self._lock:
            old = self._entries.pop(key, None)
            self._entries[key] = (stamp, index)
            self._bytes += index.nbytes - (old[1].nbytes if old else 0)
            while self._bytes > INDEX_CACHE_BYTES and len(self._entries) > 1:
                self._bytes -= self._entries.popitem(last=False)[1][1].nbytes

    def __reduce__(self) -> tuple[type[_IndexCache], tuple[()]]:
        return (_IndexCache, ())


@dataclass
class ZarrSource:
    """Chunks of any local array that zarr-python opens (zarr v2, other codecs)."""

    folder: Path
    axes: AxisMap
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_shape: tuple[int, ...]
    shard_shape: tuple[int, ...]
    fill_value: Any
    _array: Any = field(default=None, repr=False)

    @classmethod
    def open(cls, folder: Path, axes: AxisMap) -> ZarrSource:
        """Open the array; ValueError when zarr-python cannot."""
        array = _open_zarr(folder)
        dtype = np.dtype(array.dtype).newbyteorder("=")
        if (
            array.ndim != axes.ndim
            or min((*array.shape, *array.chunks), default=0) < 1
            or dtype.kind not in "buif"
        ):
            raise ValueError(f"array is {dtype} {array.shape}, expected numbers along {axes.ndim} axes")
        check_bounds(array.shape, array.chunks, array.chunks, dtype)
        # reading through zarr-python works per request, so a shard is the chunk
        chunk = axes.view(array.chunks)
        fill = np.asarray(array.fill_value or 0).astype(dtype)[()]
        return cls(folder, axes, axes.view(array.shape), dtype, chunk, chunk, fill, array)

    def fetch(self, _shard: Place, /, places: Sequence[Place]) -> Iterator[RawChunk]:
        """Hand over the place alone: zarr-python reads and decodes in one go."""
        for place in places:
            yield RawChunk(place, place, self._stored_bytes(place))

    def decode(self, raw: RawChunk) -> Array:
        """Read the chunk through zarr-python, cut off at the edge (no piece reaches further)."""
        array = self._opened()
        starts = [p * c for p, c in zip(raw.place, self.chunk_shape, strict=True)]
        ends = [min(a + c, n) for a, c, n in zip(starts, self.chunk_shape, self.shape, strict=True)]
        box = zip(self.axes.stored(starts), self.axes.stored(ends), strict=True)
        try:
            stored = array[tuple(slice(a, max(b, a + 1)) for a, b in box)]
        except Exception as error:  # codecs raise what they like
            raise ChunkError(f"chunk {raw.place} cannot be read: {type(error).__name__}: {error}") from error
        return self.axes.array(np.asarray(stored, dtype=self.dtype))

    def _opened(self) -> Any:
        if self._array is None:
            try:
                self._array = _open_zarr(self.folder)
            except ValueError as error:
                raise ChunkError(str(error)) from error
        return self._array

    def _stored_bytes(self, place: Place) -> int:
        array = self._opened()
        if getattr(array, "shards", None) is not None:
            return 0  # the size of a chunk inside a foreign shard is not known without its index
        try:
            key = str(array.metadata.encode_chunk_key(self.axes.stored(place)))
            return (self.folder / key).stat().st_size
        except OSError:
            return 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}


def _open_zarr(folder: Path) -> Any:
    import zarr

    try:
        array = zarr.open_array(str(folder), mode="r")
        _ = array.chunks, array.fill_value  # irregular chunks have no size
        return array
    except Exception as error:  # zarr-python and its codecs raise many kinds
        raise ValueError(f"zarr-python cannot open it: {type(error).__name__}: {error}") from error


class ArraySource:
    """An array in memory, shown in chunks so that statistics mean the same as for files."""

    def __init__(self, array: Array, chunk_px: int = 256) -> None:
        self.pixels = array
        self.shape, self.dtype = array.shape, array.dtype
        self.chunk_shape = (array.shape[0], *(min(chunk_px, n) for n in array.shape[1:]))
        self.shard_shape = self.chunk_shape
        self.fill_value = np.zeros((), array.dtype)[()]

    def fetch(self, _shard: Place, /, places: Sequence[Place]) -> Iterator[RawChunk]:
        """Nothing is stored: the pixels are there already."""
        for place in places:
            yield RawChunk(place, place, 0)

    def decode(self, raw: RawChunk) -> Array:
        """A view of the pixels, cut off at the edge (no piece reaches further)."""
        starts = [p * c for p, c in zip(raw.place, self.chunk_shape, strict=True)]
        return self.pixels[tuple(slice(a, a + c) for a, c in zip(starts, self.chunk_shape, strict=True))]
