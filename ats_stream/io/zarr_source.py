"""Chunks of any array that zarr-python opens: codecs and layouts that are not known here."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ats_stream.io.layout import check_bounds
from ats_stream.io.sources import ChunkError, RawChunk
from ats_stream.io.storage.store_error import StoreError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from ats_stream.io.axis_map import AxisMap
    from ats_stream.io.sources import Place
    from ats_stream.io.storage.stores import Store

Array = npt.NDArray[Any]
logger = logging.getLogger(__name__)
_told: set[str] = set()


@dataclass
class ZarrSource:
    """An array that zarr-python reads and decodes, a chunk at a time; slower than what is known here."""

    store: Store
    prefix: str
    axes: AxisMap
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_shape: tuple[int, ...]
    shard_shape: tuple[int, ...]
    fill_value: Any
    digest: str
    """Of the array's metadata."""
    _array: Any = field(default=None, repr=False)

    @classmethod
    def open(cls, store: Store, prefix: str, axes: AxisMap, digest: str = "") -> ZarrSource:
        """Open the array; ValueError when zarr-python cannot. Says so once per process and codec."""
        array = _open_zarr(store, prefix)
        dtype = np.dtype(array.dtype).newbyteorder("=")
        if (
            array.ndim != axes.ndim
            or min((*array.shape, *array.chunks), default=0) < 1
            or dtype.kind not in "buif"
        ):
            raise ValueError(f"array is {dtype} {array.shape}, expected numbers along {axes.ndim} axes")
        check_bounds(array.shape, array.chunks, array.chunks, dtype)
        _tell(array, store.place(prefix.rstrip("/")))
        # reading through zarr-python works per request, so a shard is the chunk
        chunk = axes.view(array.chunks)
        fill = np.asarray(array.fill_value or 0).astype(dtype)[()]
        return cls(store, prefix, axes, axes.view(array.shape), dtype, chunk, chunk, fill, digest, array)

    @property
    def description(self) -> Hashable:
        """Equal for two sources that read the same array in the same way."""
        return (self.store.identity, self.prefix, self.axes, self.digest)

    @property
    def stored_grid(self) -> tuple[int, ...]:
        """Number of keys along each stored axis."""
        array = self._opened()
        return tuple(-(-n // s) for n, s in zip(array.shape, array.shards or array.chunks, strict=True))

    def keys(self) -> list[str]:
        """Every key that pixels may lie in."""
        encode = self._opened().metadata.encode_chunk_key
        return [f"{self.prefix}{encode(place)}" for place in np.ndindex(*self.stored_grid)]

    def afresh(self) -> ZarrSource:
        """The same source, without anything remembered of what it read."""
        store = self.store.afresh()
        return self if store is self.store else replace(self, store=store, _array=None)

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
                self._array = _open_zarr(self.store, self.prefix)
            except ValueError as error:
                raise ChunkError(str(error)) from error
        return self._array

    def _stored_bytes(self, place: Place) -> int:
        array = self._opened()
        if self.store.is_remote or getattr(array, "shards", None) is not None:
            return 0  # it would take a request more; of a chunk inside a foreign shard it is not known at all
        try:
            key = str(array.metadata.encode_chunk_key(self.axes.stored(place)))
            return self.store.size(self.prefix + key) or 0
        except StoreError:
            return 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}


def _open_zarr(store: Store, prefix: str) -> Any:
    import zarr

    from ats_stream.io.storage.zarr_store import ZarrStore

    try:
        array = zarr.open_array(ZarrStore(store), path=prefix.rstrip("/"), mode="r")
        _ = array.chunks, array.fill_value  # irregular chunks have no size
        return array
    except Exception as error:  # zarr-python and its codecs raise many kinds
        raise ValueError(f"zarr-python cannot open it: {type(error).__name__}: {error}") from error


def _tell(array: Any, place: str) -> None:
    meta = array.metadata.to_dict()
    codecs = meta.get("codecs") or [meta.get("compressor"), *(meta.get("filters") or ())]
    names = [
        str(c.get("name") or c.get("id")) if isinstance(c, dict) else type(c).__name__ for c in codecs if c
    ]
    key = " + ".join(names) or "none"
    if key not in _told:
        _told.add(key)
        logger.warning("%s: codecs %s are read through zarr-python, which is slower", place, key)
