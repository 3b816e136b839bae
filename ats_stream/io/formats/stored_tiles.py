"""JPEG tiles of one level of a slide as they lie in its file: reading many of them, bit for bit, and checking
that they are tiles and nothing else.

Tiles are read in runs: those that follow each other in the file come with one call.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ats_stream.io.formats.image_header import JPEG_END
from ats_stream.io.formats.jpeg_head import JpegHead, parse_head
from ats_stream.io.formats.parts import Stamp, check_stamp
from ats_stream.io.sources import OPEN_FLAGS, ChunkError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ats_stream.io.sources import Place

Array = npt.NDArray[Any]
# a gap that is cheaper to read than to leave out: less than a page
GAP_BYTES = 4096
# an item of encapsulated DICOM pixels: its tag, then its size
ITEM_TAG = b"\xfe\xff\x00\xe0"
ITEM_BYTES = 8
# heads that are compared byte by byte before that of a tile is parsed
_MAX_KNOWN = 16


def plan_runs(begin_N: Array, end_N: Array, gap_bytes: int) -> list[tuple[int, int, Array]]:
    """First and last byte, and numbers of the ranges in it, of as few reads as serve all ranges.

    >>> [(a, b, n.tolist()) for a, b, n in plan_runs(np.array([90, 0, 10]), np.array([99, 9, 20]), 5)]
    [(0, 20, [1, 2]), (90, 99, [0])]
    """
    order = np.argsort(begin_N, kind="stable")
    begin, reach = begin_N[order], np.maximum.accumulate(end_N[order])
    cuts = np.flatnonzero(begin[1:] > reach[:-1] + gap_bytes) + 1
    firsts, lasts = np.append(0, cuts), np.append(cuts, len(order))
    return [
        (int(begin[a]), int(reach[b - 1]), order[a:b]) for a, b in zip(firsts, lasts, strict=True) if b > a
    ]


@dataclass(frozen=True, kw_only=True)
class StoredTiles:
    """Where the tiles of a level lie in a file, and what each of them must be."""

    path: str
    stamp: Stamp
    offset: Array
    """First byte of each tile over the chunk grid (c, *space)."""
    nbytes: Array
    """Bytes of each tile, 0 for one that is not stored."""
    size: tuple[int, int, int]
    """(height, width, samples) of a tile."""
    tables: bytes | None
    """What the heads of tiles leave out."""
    is_dicom: bool = False
    """Whether each tile is an item of encapsulated DICOM pixels."""

    def read(self, start: Place, stop: Place) -> dict[Place, bytes]:
        """Tiles of a box of the chunk grid that are stored, by their place in the box.

        ChunkError when the file changed or one of them is no tile.
        """
        inner = self._stored(start, stop)
        tiles = self._each(inner + start)
        return dict(zip(map(tuple, inner.tolist()), tiles, strict=True))

    def read_joined(self, start: Place, stop: Place) -> tuple[Array, Array, list[memoryview]]:
        """The same tiles as :meth:`read`, in the order of their places: places (K, D) in the box, sizes (K,),
        and the data, tiles that follow each other in the file in one piece.
        """
        inner = self._stored(start, stop)
        pieces: list[tuple[int, memoryview]] = []
        for numbers, data, first_N, last_N in self._runs(inner + start):
            # neighbours both in the box and in the file
            breaks = (np.diff(numbers) != 1) | (first_N[1:] != last_N[:-1])
            cuts = np.flatnonzero(breaks) + 1
            for a, b in zip([0, *cuts.tolist()], [*cuts.tolist(), len(numbers)], strict=True):
                pieces.append((int(numbers[a]), data[first_N[a] : last_N[b - 1]]))
        pieces.sort(key=lambda piece: piece[0])
        return inner, self.nbytes[tuple((inner + start).T)], [data for _, data in pieces]

    def _stored(self, start: Place, stop: Place) -> Array:
        """Places (K, D), in a box, of the tiles in it that are stored."""
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        return np.argwhere(self.nbytes[box] > 0)

    def _each(self, places: Array) -> list[bytes]:
        """Tiles at these places, all of them stored."""
        found = [b""] * len(places)
        for numbers, data, first_N, last_N in self._runs(places):
            for number, a, b in zip(numbers.tolist(), first_N.tolist(), last_N.tolist(), strict=True):
                found[number] = bytes(data[a:b])
        return found

    def _runs(self, places: Array) -> Iterator[tuple[Array, memoryview, Array, Array]]:
        """Read tiles run by run: their numbers in the order of the file, the data, where each is."""
        at = tuple(places.T)
        offset_N, nbytes_N = self.offset[at].astype(np.int64), self.nbytes[at].astype(np.int64)
        head_bytes = ITEM_BYTES if self.is_dicom else 0
        runs = plan_runs(offset_N - head_bytes, offset_N + nbytes_N, GAP_BYTES)
        # one piece of memory for all: the system hands out many small ones page by page, each time anew
        rest = np.empty(sum(end - begin for begin, end, _ in runs), np.uint8).data
        known: dict[bytes, int] = {}
        fd = self._open()
        try:
            for begin, end, numbers in runs:
                data, rest = rest[: end - begin], rest[end - begin :]
                _pread(fd, data, begin)
                first_N = offset_N[numbers] - begin
                last_N = first_N + nbytes_N[numbers]
                self._check(data, first_N, last_N, places[numbers], known)
                yield numbers, data, first_N, last_N
        finally:
            os.close(fd)

    def _open(self) -> int:
        try:
            fd = os.open(self.path, OPEN_FLAGS)
        except OSError as error:
            raise ChunkError(f"cannot open {self.path}: {error.strerror}") from error
        info = os.fstat(fd)
        try:
            check_stamp((info.st_size, info.st_mtime_ns), self.stamp)
        except ChunkError:
            os.close(fd)
            raise
        return fd

    def _check(
        self, data: memoryview, first_N: Array, last_N: Array, places: Array, known: dict[bytes, int]
    ) -> None:
        """ChunkError unless each range is one whole tile without room for text."""
        marks = _free_marks(data)
        counts = np.searchsorted(marks, last_N) - np.searchsorted(marks, first_N)
        head = b""
        for i, (a, b, count) in enumerate(
            zip(first_N.tolist(), last_N.tolist(), counts.tolist(), strict=True)
        ):
            try:
                if self.is_dicom and data[a - ITEM_BYTES : a] != ITEM_TAG + (b - a).to_bytes(4, "little"):
                    raise ValueError("is no single item of the pixel data")
                end = bytes(data[b - len(JPEG_END) : b])
                if end != JPEG_END and not bytes(data[a:b]).rstrip(b"\0").endswith(JPEG_END):
                    raise ValueError("does not end as JPEG data must")
                # heads of neighbours are mostly the same
                if not head or bytes(data[a : a + len(head)]) != head:
                    head = self._known_head(bytes(data[a:b]), known)
                if count != known[head]:
                    raise ValueError("has further segments, which may hold text, behind its head")
            except ValueError as error:
                raise ChunkError(f"{tile_name(places[i])} {error}") from error

    def _known_head(self, tile: bytes, known: dict[bytes, int]) -> bytes:
        """The head of a tile, which is checked and added to the known ones unless it is one of them; each has
        the number of marks of free segments in it.
        """
        head = next((h for h in known if tile.startswith(h)), None)
        if head is None:
            head = tile[: self.check_head(tile).nbytes]
            if len(known) == _MAX_KNOWN:
                known.clear()
            known[head] = len(_free_marks(head))
        return head

    def check_head(self, tile: bytes) -> JpegHead:
        """The head of a tile; ValueError says why tiles like it cannot be copied."""
        try:
            head = parse_head(tile, self.tables)
        except ValueError as error:
            raise ValueError(f"is damaged: {error}") from error
        if head.size != self.size:
            raise ValueError(f"is a JPEG of {_shown(head.size)}, the tile has {_shown(self.size)}")
        if not head.is_common:
            raise ValueError("is JPEG of a kind that few decoders read")
        if head.free_segments:
            names = ", ".join(dict.fromkeys(head.free_segments))
            raise ValueError(f"has {names} segments, which may hold text")
        return head

    def sample(self, max_tiles: int) -> JpegHead:
        """Check some tiles, evenly spread, the first and the last among them; return the first one's head.

        ValueError, as one reason for the whole level, when one of them cannot be copied.
        """
        present = np.argwhere(self.nbytes > 0)
        if not len(present):
            raise ValueError("no tile has bytes")
        numbers = np.unique(np.linspace(0, len(present) - 1, max_tiles).round().astype(int))
        try:
            return self.check_head(self._each(present[numbers])[0])
        except ChunkError as error:
            raise ValueError(str(error)) from error


def tile_name(place: Sequence[int]) -> str:
    """How errors name a tile.

    >>> tile_name((0, 3, 4))
    'tile (row 3, column 4)'
    """
    return f"tile (row {place[-2]}, column {place[-1]})"


def _shown(size: tuple[int, int, int]) -> str:
    return f"{size[0]} x {size[1]} x {size[2]}"


def _free_marks(data: bytes | memoryview) -> Array:
    """Where markers of segments that programs fill as they like may stand: among compressed pixels there are
    none of these pairs of bytes.
    """
    values = np.frombuffer(data, np.uint8)
    at = np.flatnonzero(values[:-1] == 0xFF)
    kinds = values[at + 1]
    found: Array = at[(kinds >= 0xE0) & (kinds != 0xFF)]
    return found


def _pread(fd: int, data: memoryview, begin: int) -> None:
    """Fill memory from a file."""
    end = begin + len(data)
    try:
        num_bytes = os.preadv(fd, [data], begin)
    except OSError as error:
        raise ChunkError(f"cannot read bytes {begin} to {end}: {error.strerror}") from error
    if num_bytes != len(data):
        raise ChunkError(f"truncated: {num_bytes} of {len(data)} bytes from {begin}")
