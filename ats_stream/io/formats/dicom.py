"""Frames of DICOM whole-slide files as stored JPEG tiles; each level of a slide is a file (instance).

Facts are read through pydicom, the tables of frames here: pixel data may be hundreds of gigabytes.
DICOM PS3.5 A.4: pixel data are items; the first holds offsets of the frames or nothing, each other one a
frame, padded to an even number of bytes.
"""

from __future__ import annotations

import os
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ats_stream.io.formats.parts import file_stamp
from ats_stream.io.formats.stored_tiles import ITEM_BYTES, ITEM_TAG, StoredTiles

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Array = npt.NDArray[Any]
JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
SLIDE_CLASS = "1.2.840.10008.5.1.4.1.1.77.1.6"
# tag of the pixel data, a byte string of undefined length
_PIXELS = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff"
_LAST_ITEM = b"\xfe\xff\xdd\xe0"
_TAGS = [
    "SOPClassUID",
    "SeriesInstanceUID",
    "ImageType",
    "DimensionOrganizationType",
    "NumberOfFrames",
    "NumberOfOpticalPaths",
    "TotalPixelMatrixFocalPlanes",
    "TotalPixelMatrixRows",
    "TotalPixelMatrixColumns",
    "InConcatenationNumber",
    "SamplesPerPixel",
    "BitsAllocated",
    "Rows",
    "Columns",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
]


def dicom_levels(path: str, shapes: Sequence[tuple[int, ...]]) -> list[StoredTiles | str]:
    """Tiles of each level (3, height, width) of the slide that a file belongs to, or why a level has none.

    The levels of a slide are the files of the same series in the same folder, as for OpenSlide.
    """
    instances = list(_series(Path(path)))
    if not instances:
        return ["cannot be read as DICOM"] * len(shapes)
    found: dict[tuple[int, int], tuple[Path, Any, int]] = {}
    for file, facts, pixels_at in instances:
        kind = [str(part) for part in facts.get("ImageType", [])]
        if facts.get("SOPClassUID") == SLIDE_CLASS and kind[2:3] == ["VOLUME"]:
            size = (int(facts.TotalPixelMatrixRows), int(facts.TotalPixelMatrixColumns))
            found.setdefault(size, (file, facts, pixels_at))
    levels: list[StoredTiles | str] = []
    for shape in shapes:
        instance = found.get((shape[1], shape[2]))
        if instance is None:
            levels.append("its DICOM file was not found")
            continue
        try:
            levels.append(_tiles(*instance))
        except (ValueError, OSError, struct.error) as error:
            levels.append(f"DICOM: {error}")
    return levels


def series_files(path: Path) -> tuple[Path, ...]:
    """The files of the slide that a DICOM file belongs to, itself among them; none when it cannot be read."""
    return tuple(file for file, _, _ in _series(path))


def _series(path: Path) -> Iterator[tuple[Path, Any, int]]:
    """The files of a folder in the series of one of them, with their facts and where their pixels begin."""
    first = _read_facts(path)
    if first is None:
        return
    series = first[0].get("SeriesInstanceUID")
    for file in sorted(path.parent.iterdir()):
        facts, pixels_at = _read_facts(file) or (None, 0)
        if facts is not None and facts.get("SeriesInstanceUID") == series:
            yield file, facts, pixels_at


def _read_facts(path: Path) -> tuple[Any, int] | None:
    """The attributes of a DICOM file that matter here and where its pixels begin; None when it is none."""
    import pydicom

    try:
        if not path.is_file():
            return None
        with path.open("rb") as file, warnings.catch_warnings():
            # what it says of attributes that are not as they should be
            warnings.simplefilter("ignore")
            file.seek(128)
            if file.read(4) != b"DICM":
                return None
            file.seek(0)
            return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS), file.tell()
    except Exception:  # a neighbour that is broken, or none of our business
        return None


def _tiles(path: Path, facts: Any, pixels_at: int) -> StoredTiles:
    """The frames of an instance; ValueError says why they are not tiles to copy."""
    _check_facts(facts)
    height, width = int(facts.TotalPixelMatrixRows), int(facts.TotalPixelMatrixColumns)
    rows, columns = int(facts.Rows), int(facts.Columns)
    grid = (1, -(-height // rows), -(-width // columns))
    num_frames = int(facts.NumberOfFrames)
    if num_frames != grid[1] * grid[2]:
        raise ValueError(f"{num_frames} frames, expected {grid[1]} x {grid[2]}")
    stamp = file_stamp(path)
    with path.open("rb") as file:
        file.seek(pixels_at)
        offset, nbytes = _frames(file, facts, num_frames, stamp[0])
    if bool((offset + nbytes > stamp[0]).any()):
        raise ValueError(f"truncated: frames up to byte {int((offset + nbytes).max())}, it has {stamp[0]}")
    return StoredTiles(
        path=str(path),
        stamp=stamp,
        offset=offset.reshape(grid),
        nbytes=nbytes.reshape(grid),
        size=(rows, columns, 3),
        tables=None,
        is_dicom=True,
    )


def _check_facts(facts: Any) -> None:
    """ValueError unless frames are JPEG tiles, row by row, of one plane in one colour path."""
    syntax = facts.file_meta.TransferSyntaxUID
    if syntax != JPEG_BASELINE:
        raise ValueError(f"pixels are {syntax.name}, not JPEG baseline")
    organization = facts.get("DimensionOrganizationType", "")
    if organization != "TILED_FULL":
        raise ValueError(f"frames are {organization or 'in no stated order'}, not TILED_FULL")
    if "InConcatenationNumber" in facts:
        raise ValueError("a level is spread over several files")
    for name, expected in (
        ("NumberOfOpticalPaths", 1),
        ("TotalPixelMatrixFocalPlanes", 1),
        ("SamplesPerPixel", 3),
        ("BitsAllocated", 8),
    ):
        if int(facts.get(name) or expected) != expected:
            raise ValueError(f"{name} is {facts.get(name)}, expected {expected}")


def _frames(file: BinaryIO, facts: Any, num_frames: int, file_bytes: int) -> tuple[Array, Array]:
    """First byte and size of each frame, from the tables of the file, or from its items where it has none."""
    if file.read(len(_PIXELS)) != _PIXELS:
        raise ValueError("pixels are not encapsulated")
    table = file.read(_item_bytes(file.read(ITEM_BYTES)))
    base = file.tell()
    if "ExtendedOffsetTable" in facts:
        offset = np.frombuffer(facts.ExtendedOffsetTable, "<u8").astype(np.int64)
        nbytes = np.frombuffer(facts.ExtendedOffsetTableLengths, "<u8").astype(np.int64)
        nbytes += nbytes % 2  # items are padded
    elif table and file_bytes < 1 << 32:  # the offsets have 32 bits
        offset = np.frombuffer(table, "<u4").astype(np.int64)
        file.seek(base + int(offset[-1]))
        end = offset[-1] + ITEM_BYTES + _item_bytes(file.read(ITEM_BYTES))
        nbytes = np.diff(offset, append=end) - ITEM_BYTES
    else:
        items = np.array(list(_walk(file.fileno(), base, num_frames)), np.int64).reshape(-1, 2)
        offset, nbytes = items[:, 0] - base - ITEM_BYTES, items[:, 1]
    if len(offset) != num_frames or len(nbytes) != num_frames:
        raise ValueError(f"{len(offset)} items of pixel data for {num_frames} frames")
    if num_frames and (int(offset.min()) < 0 or int(nbytes.min()) < 0):
        raise ValueError("broken table of frames")
    return base + ITEM_BYTES + offset, nbytes


def _walk(fd: int, at: int, max_items: int) -> Iterator[tuple[int, int]]:
    """First byte and size of each item of pixel data; one more than asked for shows that there are more."""
    for _ in range(max_items + 1):
        head = os.pread(fd, ITEM_BYTES, at)
        if head[:4] == _LAST_ITEM:
            return
        size = _item_bytes(head)
        yield at + ITEM_BYTES, size
        at += ITEM_BYTES + size


def _item_bytes(head: bytes) -> int:
    """Size of an item from its head."""
    if len(head) != ITEM_BYTES or head[:4] != ITEM_TAG:
        raise ValueError("broken items of pixel data")
    size: int = struct.unpack_from("<I", head, 4)[0]
    return size
