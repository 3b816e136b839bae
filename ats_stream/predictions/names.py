"""File names for slides: readable, safe on any file system, and no two alike."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_BYTES = 160  # file systems take 255, and what is written gets endings
_UNSAFE = re.compile(r"[^\w.+=@-]+")


def unique_names(names: Sequence[str]) -> tuple[str, ...]:
    """A file name for each name, in order: a function of the whole list alone.

    Letters, digits and ``. _ + = @ -`` stay. Names that would be equal, also where a file system takes no
    notice of case, get the number of their row, counted from 1, until none is like another.

    >>> unique_names(["a", "b", "A", "a-1", "x y?"])
    ('a-1-1', 'b', 'A-3', 'a-1-4', 'x_y_')
    >>> unique_names(["", ".."])
    ('slide-1', 'slide-2')
    """
    found = [_safe(name) for name in names]
    while True:
        often = Counter(name.casefold() for name in found)
        if len(often) == len(found):
            return tuple(found)
        found = [
            name if often[name.casefold()] == 1 else f"{name}-{row}"
            for row, name in enumerate(found, start=1)
        ]


def _safe(name: str) -> str:
    plain = _UNSAFE.sub("_", unicodedata.normalize("NFC", name)).lstrip(".")
    return plain.encode()[:MAX_BYTES].decode(errors="ignore") or "slide"
