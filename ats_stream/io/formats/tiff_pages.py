"""The chain of pages of a TIFF file, checked before a library reads it: a copy cut short is not whole.

TIFF 6.0: each page is a count, entries of tag, type, count and value (or its offset), and the next page's
offset. BigTIFF is the same with wider fields.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, BinaryIO

from ats_stream.errors import SlideError

if TYPE_CHECKING:
    from pathlib import Path

HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# offsets and sizes of strips and tiles, and the tables of their JPEG data
STRUCTURE_TAGS = frozenset({273, 279, 324, 325, 347})
VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 6: 1, 7: 1, 8: 2, 9: 4, 11: 4, 13: 4, 16: 8, 17: 8, 18: 8}


def is_tiff(path: Path) -> bool:
    """Whether a file begins like a TIFF or BigTIFF."""
    with path.open("rb") as file:
        return file.read(4) in HEADS


def check_pages(path: Path) -> None:
    """SlideError when a page, or the table of a page's tiles, lies past the end of the file."""
    size = path.stat().st_size
    number, offset = 0, 0
    try:
        with path.open("rb") as file:
            head = file.read(16)
            order = "<" if head[:2] == b"II" else ">"
            is_big = head[2:4] in (b"+\0", b"\0+")
            offset = (
                struct.unpack(order + "Q", head[8:16])[0]
                if is_big
                else struct.unpack(order + "I", head[4:8])[0]
            )
            seen: set[int] = set()
            while offset and offset not in seen:
                seen.add(offset)
                file.seek(offset)
                offset = _check_page(file, str(path), number, size, order, is_big=is_big)
                number += 1
    except (struct.error, OverflowError) as error:
        where = f"page {number} at byte {offset}" if offset else "its head"
        raise SlideError(str(path), f"truncated: {where} lies past the {size} bytes of the file") from error


def _check_page(file: BinaryIO, path: str, number: int, size: int, order: str, *, is_big: bool) -> int:
    """Check the page at the file's position; return the offset of the next one."""
    count_format, entry_format = (order + "Q", order + "HHQ8s") if is_big else (order + "H", order + "HHI4s")
    next_format, inline_bytes = (order + "Q", 8) if is_big else (order + "I", 4)
    count = _unpack(file, count_format)[0]
    if count == 0:
        raise SlideError(path, f"broken TIFF: page {number} has no tags")
    for _ in range(count):
        tag, kind, num_values, value = _unpack(file, entry_format)
        num_bytes = num_values * VALUE_BYTES.get(kind, 0)
        if tag in STRUCTURE_TAGS and num_bytes > inline_bytes:
            end = struct.unpack(next_format, value)[0] + num_bytes
            if end > size:
                raise SlideError(
                    path, f"truncated: page {number} needs bytes up to {end}, the file has {size}"
                )
    following: int = _unpack(file, next_format)[0]
    return following


def _unpack(file: BinaryIO, code: str) -> tuple[Any, ...]:
    """The next fields of the file."""
    return struct.unpack(code, file.read(struct.calcsize(code)))
