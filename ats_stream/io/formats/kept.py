"""Things that are dear to open, kept for the whole process up to a bound: open slides, decoded pictures."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

T = TypeVar("T")


class Kept(Generic[T]):
    """The things used last, of ``max_size`` in all, safe between threads; the newest one always stays.

    A child made by a fork never sees what its parent opened: libraries keep locks and file positions in it.
    What is dropped is closed when its last user is done, so a thing must close itself when it is collected.
    """

    def __init__(self, max_size: int, size_of: Callable[[T], int] = lambda _: 1) -> None:
        self.max_size, self._size_of = max_size, size_of
        self._lock = threading.Lock()
        self._things: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._size = 0
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._inherited = self._things  # closing them here would disturb the parent
        self._things, self._size = OrderedDict(), 0

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The thing of a key, made if it is not there; several threads make it once."""
        with self._lock:
            if key in self._things:
                self._things.move_to_end(key)
                return self._things[key][0]
            made = make()
            size = self._size_of(made)
            self._things[key] = (made, size)
            self._size += size
            while self._size > self.max_size and len(self._things) > 1:
                self._size -= self._things.popitem(last=False)[1][1]
            return made

    def drop(self, key: Hashable) -> None:
        """Forget a thing, one that broke for instance."""
        with self._lock:
            _, size = self._things.pop(key, (None, 0))
            self._size -= size
