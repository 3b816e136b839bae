"""Whole levels of low resolution, kept by the process: read once, however many look at them.

What is kept holds for a stamp: of the file, or of every key that the level's pixels lie in. The stamp is
taken before the pixels are read and again each time they are asked for, so that what was overwritten in
between is read again. What cannot be told apart by a stamp is never kept: arrays in memory, files written a
moment ago, servers that state no entity tag, levels of very many keys.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ats_stream.io.sources import StoreSource
from ats_stream.io.storage.store_error import StoreError
from ats_stream.io.storage.stores import local_stamp
from ats_stream.io.zarr_source import ZarrSource

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from ats_stream.io.sources import ChunkSource

Array = npt.NDArray[Any]
VIEW_CACHE_BYTES = 128 << 20  # 128 MiB
"""Bytes of views that are kept at most, of all pyramids of a process."""
# asking for the stamp of more keys than this costs as much as reading them
MAX_LOCAL_KEYS = 4096
MAX_REMOTE_KEYS = 64


class ViewCache:
    """Read-only arrays, those used last up to a number of bytes; safe between threads.

    A child made by a fork begins with an empty one.
    """

    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[Hashable, Array]] = OrderedDict()
        self._making: dict[Hashable, Future[tuple[Hashable, Array]]] = {}
        self.num_bytes = 0

    def clear(self) -> None:
        """Forget everything that is kept."""
        with self._lock:
            self._kept.clear()
            self.num_bytes = 0

    def get(self, key: Hashable, stamp: Hashable, make: Callable[[], Array], *, max_bytes: int) -> Array:
        """The array of a key: the one kept for this stamp, else made, once for all threads that ask at once.

        Nobody can write into what is returned. After making, no more than ``max_bytes`` are kept in all; a
        larger array is handed out and not kept. What ``make`` raises reaches its own caller alone.
        """
        while True:
            with self._lock:
                found = self._kept.get(key)
                if found is not None and found[0] == stamp:
                    self._kept.move_to_end(key)
                    return found[1].view()
                others = self._making.get(key)
                if others is None:
                    mine = self._making[key] = Future()
                    break
            failure = others.exception()  # waits
            if failure is None and others.result()[0] == stamp:
                return others.result()[1].view()
        try:
            made = frozen(make())
        except BaseException as error:
            with self._lock:
                del self._making[key]
            mine.set_exception(error)
            raise
        with self._lock:
            self._keep(key, stamp, made, max_bytes)
            del self._making[key]
        mine.set_result((stamp, made))
        return made.view()

    def _keep(self, key: Hashable, stamp: Hashable, made: Array, max_bytes: int) -> None:
        old = self._kept.pop(key, None)
        self.num_bytes -= old[1].nbytes if old is not None else 0
        if made.nbytes <= max_bytes:
            self._kept[key] = (stamp, made)
            self.num_bytes += made.nbytes
        while self.num_bytes > max_bytes:
            self.num_bytes -= self._kept.popitem(last=False)[1][1].nbytes


VIEWS = ViewCache()


def frozen(array: Array) -> Array:
    """The array, read-only down to the memory that it is a view of.

    >>> frozen(np.zeros(2)).view().flags.writeable
    False
    """
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner.flags.writeable = False
        owner = owner.base
    return array


@runtime_checkable
class FileSource(Protocol):
    """A level of a file that is read in place; size and time of change are those when it was opened."""

    path: str
    stamp: tuple[int, int]


def fingerprint(source: ChunkSource, level: int) -> tuple[Hashable, Hashable] | None:
    """What a level of an image is known by, and the stamp of its pixels as they are now; None without one."""
    if isinstance(source, (StoreSource, ZarrSource)):
        most = MAX_REMOTE_KEYS if source.store.is_remote else MAX_LOCAL_KEYS
        if math.prod(source.stored_grid) > most:
            return None
        try:
            stamps = source.store.stamps(source.keys())
        except StoreError:
            return None  # reading will say what is wrong
        return None if stamps is None else (source.description, stamps)
    if isinstance(source, FileSource):
        stamp = local_stamp(source.path)
        return None if not stamp else ((type(source), source.path, level, source.stamp), stamp)
    return None
