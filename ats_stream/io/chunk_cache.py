"""Decoded chunks kept between reads, up to a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

if TYPE_CHECKING:
    from ats_stream.io.sources import Place

Array = npt.NDArray[Any]


class ChunkCache:
    """Decoded chunks up to ``max_bytes`` in all, least recently used dropped first; safe between threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._chunks: OrderedDict[tuple[int, Place], Array] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[int, Place]) -> Array | None:
        """The chunk, or None."""
        with self._lock:
            chunk = self._chunks.get(key)
            if chunk is not None:
                self._chunks.move_to_end(key)
            return chunk

    def put(self, key: tuple[int, Place], chunk: Array) -> None:
        """Keep a chunk; one larger than the whole cache is not kept."""
        if chunk.nbytes > self.max_bytes:
            return
        with self._lock:
            old = self._chunks.pop(key, None)
            self._chunks[key] = chunk
            self._bytes += chunk.nbytes - (old.nbytes if old is not None else 0)
            while self._bytes > self.max_bytes:
                self._bytes -= self._chunks.popitem(last=False)[1].nbytes
