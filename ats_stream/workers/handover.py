"""Arrays handed from process to process of one node through memory that both map.

Ray's object store takes requests to the node's daemon and a copy for each value, and hands out memory whose
reader has to map it page by page. A rank and the samplers beside it do without: the rank has memory of its
own, cut into places of one size, and lends a place with each call; the sampler copies the arrays into it and
answers with the few bytes that say where they lie. The rank reads them where they are; when the last of them
is gone, the place is lent again, its pages mapped already on both sides.

The memory has no name in any file system: a sampler opens it through the descriptor of the rank's process,
and it is gone with the last process that maps it, however that ended. What cannot be handed over so (another
node or container, an item too large, no place left, no Linux) travels through Ray.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import secrets
import weakref
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

NUM_PLACES = 128
"""Places of a shelf: what is on order and held at most, before Ray's object store takes over."""
ALIGN_BYTES = 64


class Place(NamedTuple):
    """Memory that a call may write its answer to, in the words that another process finds it by."""

    node: str
    """Id of the node."""
    pid: int
    fd: int
    """The descriptor of the memory in that process."""
    name: str
    """What the memory calls itself: a process id can mean another process elsewhere."""
    memory_bytes: int
    first: int
    num_bytes: int


class Shelf:
    """Memory of this process, whose places are lent; a page takes memory once it was written to.

    ``place_bytes`` bounds what one place holds.
    """

    def __init__(self, node: str, place_bytes: int, *, num_places: int = NUM_PLACES) -> None:
        page = mmap.PAGESIZE
        self._place_bytes = -(-place_bytes // page) * page
        self._name = f"ats-stream-{secrets.token_hex(8)}"
        self._fd = os.memfd_create(self._name)
        weakref.finalize(self, os.close, self._fd)
        memory_bytes = num_places * self._place_bytes
        os.ftruncate(self._fd, memory_bytes)
        self._memory = mmap.mmap(self._fd, memory_bytes)
        self._node = node
        self._whole = ctypes.c_ubyte * self._place_bytes
        # the one given back last is lent first: its pages are mapped
        self._free = deque(range(num_places))

    @staticmethod
    def if_possible(node: str, place_bytes: int) -> Shelf | None:
        """A shelf; None where the system has no memory without a name, or not that much."""
        if not hasattr(os, "memfd_create"):
            return None
        try:
            return Shelf(node, place_bytes)
        except (OSError, ValueError, OverflowError):
            return None

    @property
    def num_free(self) -> int:
        """Places that can be lent."""
        return len(self._free)

    def lend(self) -> Place | None:
        """A place, for one writer; None when all are lent."""
        try:
            number = self._free.popleft()
        except IndexError:
            return None
        first = number * self._place_bytes
        return Place(
            self._node, os.getpid(), self._fd, self._name, len(self._memory), first, self._place_bytes
        )

    def give_back(self, place: Place) -> None:
        """Take back a place that nobody writes to or reads from any more."""
        self._free.appendleft(place.first // self._place_bytes)

    def put(self, value: Any, place: Place) -> bytes | None:
        """As :meth:`Neighbour.put`, from this process."""
        return _write(value, np.frombuffer(self._memory, np.uint8), place)

    def take(self, parcel: bytes, place: Place) -> Any:
        """What was written: its arrays are read-only and lie in the place, given back when all are gone."""
        lent = self._whole.from_buffer(self._memory, place.first)
        weakref.finalize(lent, self.give_back, place).atexit = False
        spans, pickled = unpickled(parcel)
        memory = memoryview(lent).toreadonly()
        return unpickled(pickled, [memory[first:stop] for first, stop in spans])


class Neighbour:
    """The other side: writes to places of another process of this node, and reads from them."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._name = ""
        self._memory: np.ndarray[Any, np.dtype[np.uint8]] | None = None

    def put(self, value: Any, place: Place) -> bytes | None:
        """Write the arrays of a value to a place; the parcel to hand to :meth:`Shelf.take`.

        None if the place is on another node or cannot be reached, or if the arrays do not fit.
        """
        memory = self._reach(place)
        return None if memory is None else _write(value, memory, place)

    def get(self, parcel: bytes, place: Place) -> Any:
        """A copy of what the owner of a place has put there; None if it cannot be reached."""
        memory = self._reach(place)
        if memory is None:
            return None
        spans, pickled = unpickled(parcel)
        copies = [memory[place.first + first : place.first + stop].tobytes() for first, stop in spans]
        return unpickled(pickled, copies)

    def _reach(self, place: Place) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        if place.node != self._node:
            return None
        if place.name != self._name:
            path = Path(f"/proc/{place.pid}/fd/{place.fd}")
            try:
                if str(path.readlink()) != f"/memfd:{place.name} (deleted)":
                    return None
                with path.open("r+b") as file:
                    mapped = mmap.mmap(file.fileno(), place.memory_bytes)
            except (OSError, ValueError):
                return None
            self._name, self._memory = place.name, np.frombuffer(mapped, np.uint8)
        return self._memory


def unpickled(data: bytes, buffers: Sequence[Any] = ()) -> Any:
    """What another process of this run has pickled."""
    return pickle.loads(data, buffers=buffers)  # noqa: S301  # nobody else can reach these calls


def _write(value: Any, memory: np.ndarray[Any, np.dtype[np.uint8]], place: Place) -> bytes | None:
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    spans, end = [], 0
    for buffer in buffers:
        first = -(-end // ALIGN_BYTES) * ALIGN_BYTES
        end = first + buffer.raw().nbytes
        spans.append((first, end))
    if end > place.num_bytes:
        return None
    for buffer, (first, stop) in zip(buffers, spans, strict=True):
        # numpy copies without holding the interpreter
        memory[place.first + first : place.first + stop] = np.frombuffer(buffer.raw(), np.uint8)
    return pickle.dumps((spans, pickled), protocol=5)
