"""Where the chunks of one level come from: a zarr array in a store, any array that zarr-python opens, or
memory.

Every source shows its level as (C, *space), whatever axes the stored array has.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ats_stream.io.shard import ABSENT, check_index, index_nbytes, parse_index
from ats_stream.io.storage.retry import with_retries
from ats_stream.io.storage.store_error import MissingKeyError, StoreError, TransientError
from ats_stream.io.storage.stores import OPEN_FLAGS as OPEN_FLAGS
from ats_stream.io.storage.stores import LocalBlob

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence
    from threading import Event

    from ats_stream.io.axis_map import AxisMap
    from ats_stream.io.layout import ArrayLayout
    from ats_stream.io.storage.stores import Blob, Store

Array = npt.NDArray[Any]
Place = tuple[int, ...]
Value = TypeVar("Value")
UseRanges = Callable[[int, npt.NDArray[np.int64]], None]
INDEX_CACHE_BYTES = 16 << 20  # 16 MiB: a thousand shards of 32 x 32 chunks


class ChunkError(Exception):
    """A chunk or shard cannot be read; the pyramid turns it into an error that names the slide and the
    level."""

    job: int = 0
    """Number of the job, among those read at once, that it belongs to."""


class RawChunk(NamedTuple):
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


@dataclass(frozen=True, slots=True)
class StoredRange:
    """Where a chunk lies inside its shard; ``nbytes`` is None when the whole key is the chunk."""

    place: Place
    start: int
    nbytes: int | None


class StoreSource:
    """Chunks of a zarr array in a store, sharded or not, with codecs known here.

    Local stores are read by :meth:`fetch`, key by key. Of remote ones the fetcher asks first where the chunks
    lie (:meth:`locate`), then for ranges (:meth:`read`), many at once.
    """

    def __init__(
        self, store: Store, prefix: str, layout: ArrayLayout, axes: AxisMap, digest: str = ""
    ) -> None:
        """``digest`` is that of the array's metadata."""
        self.store, self.prefix, self.layout, self.axes, self.digest = store, prefix, layout, axes, digest
        self.shape, self.dtype = axes.view(layout.shape), layout.dtype
        self.chunk_shape, self.shard_shape = axes.view(layout.chunk_shape), axes.view(layout.shard_shape)
        self.fill_value = layout.fill_value
        self._indices = _IndexCache()

    @property
    def identity(self) -> Hashable:
        """Equal for two sources that read the same array."""
        return (self.store.identity, self.prefix)

    @property
    def description(self) -> Hashable:
        """Equal for two sources that read the same array in the same way."""
        return (self.identity, self.axes, self.digest)

    @property
    def stored_grid(self) -> tuple[int, ...]:
        """Number of shards along each axis (C, *space)."""
        return tuple(-(-n // s) for n, s in zip(self.shape, self.shard_shape, strict=True))

    def keys(self) -> list[str]:
        """Every key that pixels may lie in."""
        places = np.ndindex(*self.stored_grid)
        return [self.prefix + self.layout.key(self.axes.stored(place)) for place in places]

    def afresh(self) -> StoreSource:
        """The same source, without anything remembered of what it read."""
        again = copy.copy(self)
        again.store, again._indices = self.store.afresh(), _IndexCache()
        return again

    @property
    def index_bytes(self) -> int:
        """Size of the index of a shard."""
        return index_nbytes(self.layout.grid, has_crc=self.layout.index_has_crc)

    @cached_property
    def zstd_layout(self) -> tuple[int, tuple[int, ...], tuple[int, ...]] | None:
        """Bytes in the zstd frame of a chunk; shape (C, *space) and strides in bytes of the chunk in them.

        None when chunks are anything else than one zstd frame of pixels.
        """
        decoder = self.layout.decoder
        if not decoder.is_zstd_alone:
            return None
        stored = np.empty(decoder.stored_shape, self.dtype)
        chunk = self.axes.array(decoder.transposed(stored))
        is_view = chunk.ctypes.data == stored.ctypes.data
        return (decoder.nbytes, chunk.shape, chunk.strides) if is_view else None

    def fetch(self, shard: Place, /, places: Sequence[Place]) -> Iterator[RawChunk]:
        """Read the byte ranges of the chunks; a missing key means that all its chunks are absent."""
        name = self.layout.key(self.axes.stored(shard))
        try:
            blob = self.store.open(self.prefix + name)
            if blob is None:
                yield from (RawChunk(place, None, 0) for place in places)
                return
            with blob:
                yield from self._fetch_open(blob, name, places)
        except StoreError as error:
            raise ChunkError(self._short(error, name)) from error

    def _fetch_open(self, blob: Blob, name: str, places: Sequence[Place]) -> Iterator[RawChunk]:
        if not self.layout.is_sharded:
            data = blob.whole(self.layout.decoder.max_stored_bytes)
            yield RawChunk(places[0], data, len(data))
            return
        found = self._find(self._index_of(blob, name), places).tolist()
        for place, (start, nbytes) in zip(places, found, strict=True):
            if start == ABSENT:
                yield RawChunk(place, None, 0)
                continue
            data = blob.read(start, nbytes)
            if len(data) != nbytes:
                raise ChunkError(
                    f"shard {name} is truncated: chunk {place} has {len(data)} of {nbytes} bytes"
                )
            yield RawChunk(place, data, nbytes)

    def fetch_located(self, shard: Place, places_KD: npt.NDArray[np.int64], use: UseRanges) -> None:
        """Let compiled code read chunks of a shard: ``use`` gets the number of the open file, and for every
        chunk where it begins and its size (K, 2), both -1 where it is absent.

        It is not called where the shard is no file, or one that should rather be looked at by :meth:`fetch`.
        """
        name, layout = self.layout.key(self.axes.stored(shard)), self.layout
        try:
            blob = self.store.open(self.prefix + name)
            if blob is None:
                return
            with blob:
                if not isinstance(blob, LocalBlob):
                    return
                if layout.is_sharded:
                    found_K2 = self._find(self._index_of(blob, name), places_KD)
                    found_K2[found_K2[:, 0] == ABSENT] = ABSENT
                elif blob.size <= layout.decoder.max_stored_bytes:
                    found_K2 = np.array([[0, blob.size]], np.uint64)
                else:
                    return
                use(blob.fileno(), found_K2.view(np.int64))
        except StoreError as error:
            raise ChunkError(self._short(error, name)) from error

    def locate(self, shard: Place, places: Sequence[Place], stop: Event) -> list[StoredRange] | None:
        """Where the chunks lie that are there; None when the whole shard is absent."""
        if not self.layout.is_sharded:
            return [StoredRange(place, 0, None) for place in places]
        name = self.layout.key(self.axes.stored(shard))
        index = self._indices.get(name, None)
        if index is None:
            try:
                index = self._try(lambda blob: self._read_index(blob, name), name, stop)
            except MissingKeyError:
                index = None
            if index is None:
                return None
            self._indices.put(name, None, index)
        found = zip(places, self._find(index, places).tolist(), strict=True)
        return [StoredRange(place, start, nbytes) for place, (start, nbytes) in found if start != ABSENT]

    def read(self, shard: Place, start: int, nbytes: int | None, stop: Event) -> bytes | None:
        """Bytes of a shard, or all of the key when ``nbytes`` is None; None when the key is absent."""
        name = self.layout.key(self.axes.stored(shard))

        def read(blob: Blob) -> bytes:
            if nbytes is None:
                return blob.whole(self.layout.decoder.max_stored_bytes)
            data = blob.read(start, nbytes)
            if len(data) != nbytes:
                raise TransientError(f"{name} is truncated: {len(data)} of {nbytes} bytes from {start}")
            return data

        try:
            return self._try(read, name, stop)
        except MissingKeyError as error:
            if nbytes is not None:
                raise ChunkError(f"{name} disappeared after its index was read") from error
            return None

    def _try(self, action: Callable[[Blob], Value], name: str, stop: Event) -> Value | None:
        """What the action makes of an open key, tried again if need be; None when the key is absent."""

        def once() -> Value | None:
            blob = self.store.open(self.prefix + name)
            if blob is None:
                return None
            with blob:
                return action(blob)

        try:
            return with_retries(once, self.store.policy, stop)
        except MissingKeyError:
            raise
        except StoreError as error:
            raise ChunkError(self._short(error, name)) from error

    def _short(self, error: StoreError, name: str) -> str:
        """The key inside of the level alone: the error that users see names slide and level."""
        return str(error).replace(self.prefix + name, name, 1)

    def _index_of(self, blob: Blob, name: str) -> npt.NDArray[np.uint64]:
        """The index of a local shard, read when it is not known or the file has changed since."""
        index = self._indices.get(name, blob.stamp)
        if index is None:
            index = self._read_index(blob, name)
            self._indices.put(name, blob.stamp, index)
        return index

    def _find(
        self, index: npt.NDArray[np.uint64], places: Sequence[Place] | npt.NDArray[np.int64]
    ) -> npt.NDArray[np.uint64]:
        """Start and size in bytes (K, 2) of the chunks of a shard, as its index has them: ABSENT for none."""
        inner_KD = self.axes.stored_rows(places) % self.layout.grid
        found_K2: npt.NDArray[np.uint64] = index[tuple(inner_KD.T)]
        limit = self.layout.decoder.max_stored_bytes
        for k in np.flatnonzero((found_K2[:, 0] != ABSENT) & (found_K2[:, 1] > limit)).tolist()[:1]:
            place, nbytes = tuple(map(int, places[k])), found_K2[k, 1]
            raise ChunkError(f"chunk {place} is damaged: {nbytes} bytes, no codec needs more than {limit}")
        return found_K2

    def _read_index(self, blob: Blob, name: str) -> npt.NDArray[np.uint64]:
        layout = self.layout
        wanted = self.index_bytes
        try:
            tail, size = blob.tail(wanted)
            if wanted > size:
                raise ValueError(f"truncated shard: {size} bytes, its index alone has {wanted}")
            if not layout.index_at_end:
                tail = blob.read(0, wanted)
            index = parse_index(tail, layout.grid, has_crc=layout.index_has_crc)
            check_index(index, size - wanted if layout.index_at_end else size)
        except ValueError as error:
            raise ChunkError(f"shard {name}: {error}") from error
        return index

    def decode(self, raw: RawChunk) -> Array:
        """Decode with the array's codecs."""
        try:
            return self.axes.array(self.layout.decoder(raw.data))
        except ValueError as error:
            raise ChunkError(f"chunk {raw.place} is damaged: {error}") from error


class _IndexCache:
    """Shard indices by key, least recently used dropped; an entry holds for one stamp of its key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, tuple[Hashable, npt.NDArray[np.uint64]]] = OrderedDict()
        self._bytes = 0

    def get(self, key: str, stamp: Hashable) -> npt.NDArray[np.uint64] | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry[0] != stamp:
                return None
            self._entries.move_to_end(key)
            return entry[1]

    def put(self, key: str, stamp: Hashable, index: npt.NDArray[np.uint64]) -> None:
        with self._lock:
            old = self._entries.pop(key, None)
            self._entries[key] = (stamp, index)
            self._bytes += index.nbytes - (old[1].nbytes if old else 0)
            while self._bytes > INDEX_CACHE_BYTES and len(self._entries) > 1:
                self._bytes -= self._entries.popitem(last=False)[1][1].nbytes

    def __reduce__(self) -> tuple[type[_IndexCache], tuple[()]]:
        return (_IndexCache, ())


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
