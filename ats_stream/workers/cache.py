"""A cache bounded in bytes that forgets what was used longest ago."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

Value = TypeVar("Value")


class ByteCache(Generic[Value]):
    """Keep values up to ``max_bytes``; a value larger than that is handed out but never kept.

    >>> cache = ByteCache[str](max_bytes=10, size_of=len)
    >>> [cache.get(key, lambda key=key: key * 4) for key in ("a", "b", "c", "a")]
    ['aaaa', 'bbbb', 'cccc', 'aaaa']
    >>> cache.num_bytes, cache.num_misses
    (8, 4)
    """

    def __init__(self, *, max_bytes: int, size_of: Callable[[Value], int]) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_misses = 0
        self._size_of = size_of
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made if it is not here."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        self.num_misses += 1
        value = make()
        if self._size_of(value) <= self.max_bytes:
            self._values[key] = value
            self.num_bytes += self._size_of(value)
        while self.num_bytes > self.max_bytes:
            _, dropped = self._values.popitem(last=False)
            self.num_bytes -= self._size_of(dropped)
        return value
