"""What stands before the pixels of JPEG data: size, tables, sampling, segments that may hold text. Pure."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ats_stream.io.formats.image_header import FRAMES, MARKERS_ALONE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Array = npt.NDArray[Any]
_SCAN, _TABLES, _HUFFMAN, _QUANTISATION, _END = 0xDA, (0xDB, 0xC4, 0xCC), 0xC4, 0xDB, 0xD9
# segments that hold whatever a program likes: APP0 to APP15, and comments
_FREE = frozenset({*range(0xE0, 0xF0), 0xFE})
# what libjpeg-turbo and every other decoder of slides reads: baseline, extended with 8 bits, progressive
_COMMON_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
_JFIF_BYTES, _ADOBE_BYTES = 14, 12
_SUBSAMPLINGS = {(1, 1): "444", (2, 1): "422", (2, 2): "420", (4, 1): "411", (1, 2): "440"}
# JPEG, annex K, tables K.1 and K.2, in rows
_LUMINANCE = """
    16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
    18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101
    72 92 95 98 112 100 103 99"""
_CHROMINANCE = """
    17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99  47 66 99 99 99 99 99 99
    99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99"""


@dataclass(frozen=True, kw_only=True)
class JpegHead:
    """The segments of JPEG data up to its first scan."""

    nbytes: int
    """Where the compressed pixels begin."""
    size: tuple[int, int, int]
    """(height, width, components)."""
    is_common: bool
    """Whether any decoder reads it: 8 bits, Huffman coded, lossy."""
    component_ids: tuple[int, ...]
    sampling: tuple[tuple[int, int], ...]
    """Across and down, per component."""
    quantisation: tuple[tuple[int, ...] | None, ...]
    """Table of each component in rows; None for one that is not in these data."""
    has_jfif: bool
    adobe_transform: int | None
    free_segments: tuple[str, ...]
    """Names of segments that may hold anything, text too; a plain JFIF or Adobe mark is none of them."""

    @property
    def is_ycbcr(self) -> bool:
        """Whether decoders take three components for YCbCr, by the rules of libjpeg."""
        if len(self.component_ids) != 3:
            return False
        if self.has_jfif:
            return True
        if self.adobe_transform is not None:
            return self.adobe_transform != 0
        return self.component_ids != tuple(b"RGB")

    @property
    def subsampling(self) -> str | None:
        """Sampling of colour as encoders name it, None for grey; 444 for what has no name."""
        if len(self.sampling) < 3:
            return None
        (across, down), *others = self.sampling
        return _SUBSAMPLINGS.get((across, down), "444") if set(others) == {(1, 1)} else "444"


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, begin and end of the content of each segment; ValueError when they do not follow each other."""
    if data[:2] != b"\xff\xd8":
        raise ValueError("no JPEG data")
    at = 2
    while at + 4 <= len(data):
        kind = data[at + 1]
        if data[at] != 0xFF:
            raise ValueError("broken JPEG head")
        if kind == 0xFF:  # fill bytes may stand before a marker
            at += 1
        elif kind in MARKERS_ALONE:
            at += 2
        elif kind == _END:
            return
        else:
            end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
            if end < at + 4 or end > len(data):
                raise ValueError("broken JPEG head")
            yield kind, at + 4, end
            at = end


def parse_head(data: bytes, tables: bytes | None = None) -> JpegHead:
    """The head of JPEG data that may leave its tables to ``tables``; ValueError when it is none."""
    found: dict[int, tuple[int, ...]] = {}
    for kind, begin, end in _segments(tables) if tables else ():
        if kind == _QUANTISATION:
            found |= dict(_quantisation(data=tables or b"", begin=begin, end=end))
    frame: tuple[int, bytes] | None = None
    free: list[str] = []
    has_jfif, adobe = False, None
    for kind, begin, end in _segments(data):
        content = data[begin:end]
        if kind in FRAMES:
            frame = kind, content
        elif kind == _QUANTISATION:
            found |= dict(_quantisation(data, begin, end))
        elif kind == 0xE0 and content[:5] == b"JFIF\0" and len(content) == _JFIF_BYTES:
            has_jfif = True
        elif kind == 0xEE and content[:5] == b"Adobe" and len(content) == _ADOBE_BYTES:
            adobe = content[11]
        elif kind in _FREE:
            free.append("COM" if kind == 0xFE else f"APP{kind - 0xE0}")
        elif kind == _SCAN:
            if frame is None or len(frame[1]) < 6 or len(frame[1]) < 6 + 3 * frame[1][5]:
                break
            precision, height, width, count = struct.unpack_from(">BHHB", frame[1])
            parts = [frame[1][6 + 3 * i : 9 + 3 * i] for i in range(count)]
            return JpegHead(
                nbytes=end,
                size=(height, width, count),
                is_common=frame[0] in _COMMON_FRAMES and precision == 8,
                component_ids=tuple(p[0] for p in parts),
                sampling=tuple((p[1] >> 4, p[1] & 15) for p in parts),
                quantisation=tuple(found.get(p[2]) for p in parts),
                has_jfif=has_jfif,
                adobe_transform=adobe,
                free_segments=tuple(free),
            )
    raise ValueError("JPEG data without a frame")


def _quantisation(data: bytes, begin: int, end: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Number and values, in rows, of the quantisation tables of a segment."""
    while begin < end:
        wide, number = data[begin] >> 4, data[begin] & 15
        size = 128 if wide else 64
        if begin + 1 + size > end:
            raise ValueError("broken JPEG head")
        values = np.frombuffer(data, ">u2" if wide else "u1", 64, begin + 1)
        rows = np.empty(64, np.int64)
        rows[_zigzag()] = values
        yield number, tuple(rows.tolist())
        begin += 1 + size


@cache
def _zigzag() -> Array:
    """Place in rows of each value of a table as it is stored."""
    places = [(y, x) for y in range(8) for x in range(8)]
    places.sort(key=lambda p: (sum(p), p[1] if sum(p) % 2 == 0 else p[0]))
    return np.array([8 * y + x for y, x in places])


def tables_alone(tables: bytes) -> bytes:
    """The tables of a JPEG stream, without whatever else stands in it.

    >>> tables_alone(bytes.fromhex("ffd8 fffe0004abcd ffdb0003aa ffd9")).hex()
    'ffd8ffdb0003aaffd9'
    """
    kept = [tables[begin - 4 : end] for kind, begin, end in _segments(tables) if kind in _TABLES]
    return b"\xff\xd8" + b"".join(kept) + b"\xff\xd9"


@cache
def _tables_by_quality() -> Array:
    """(100, 2, 64): what libjpeg writes at qualities 1 to 100 for luminance and chrominance."""
    basic = np.array([_LUMINANCE.split(), _CHROMINANCE.split()], np.int64)
    quality = np.arange(1, 101)
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    tables: Array = np.clip((basic * scale[:, None, None] + 50) // 100, 1, 255)
    return tables


def quality_of(quantisation: Sequence[Sequence[int] | None]) -> int | None:
    """The quality of libjpeg, 1 to 100, whose tables are nearest to those of the components, None without.

    The first component is held against the table of luminance, the others against that of chrominance, or
    of luminance where they share the first one's.

    >>> [quality_of([table]) for table in _tables_by_quality()[[29, 79], 0].tolist()]
    [30, 80]
    """
    known = [(i, table) for i, table in enumerate(quantisation) if table is not None]
    if not known:
        return None
    distance = np.zeros(100, np.int64)
    for i, table in known:
        kind = int(i > 0 and table != quantisation[0])
        distance += np.abs(_tables_by_quality()[:, kind] - np.array(table)).sum(axis=1)
    return int(distance.argmin()) + 1
