"""The cache against a plain list of what was used when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ats_stream.workers.cache import ByteCache


@given(st.integers(0, 12), st.lists(st.integers(0, 5)))
def test_what_was_used_longest_ago_goes_first_and_the_bound_holds(max_bytes: int, keys: list[int]) -> None:
    cache = ByteCache[int](max_bytes=max_bytes, size_of=lambda key: key)  # value n takes n bytes
    kept: list[int] = []  # oldest first
    misses = 0
    for key in keys:
        assert cache.get(key, lambda key=key: key) == key
        if key in kept:
            kept.remove(key)
        else:
            misses += 1
        if key <= max_bytes:
            kept.append(key)
        while sum(kept) > max_bytes:
            kept.pop(0)
        assert cache.num_misses == misses
        assert cache.num_bytes == sum(kept) <= max_bytes


def test_what_cannot_be_made_is_not_kept() -> None:
    cache = ByteCache[str](max_bytes=9, size_of=len)

    def fail() -> str:
        raise OSError("gone")

    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            cache.get("a", fail)
    assert cache.get("a", lambda: "back") == "back"
    assert cache.num_bytes == 4
