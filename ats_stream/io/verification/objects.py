"""Verifying the objects of a store, one by one: size and checksum of their bytes, and the index of shards."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

from ats_stream.io.layout import grid_shape
from ats_stream.io.shard import ABSENT, check_index, index_nbytes, parse_index
from ats_stream.io.storage.retry import with_retries
from ats_stream.io.storage.store_error import MissingKeyError, StoreError
from ats_stream.io.storage.zip_store import ZipBlob

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ats_stream.io.conversion.manifest import ManifestEntry
    from ats_stream.io.layout import ArrayLayout
    from ats_stream.io.storage.stores import Blob, Store

PIECE_BYTES = 8 << 20  # 8 MiB
METADATA_FILES = ("zarr.json", ".zattrs", ".zgroup", ".zarray", ".zmetadata")


@dataclass(frozen=True)
class Array:
    """An array of the store whose layout is known: the folder that its keys begin with, and the layout."""

    prefix: str
    layout: ArrayLayout


def check_object(
    store: Store,
    key: str,
    nbytes: int | None,
    *,
    array: Array | None,
    entry: ManifestEntry | None,
    is_quick: bool,
) -> str | None:
    """What is wrong with one object of ``nbytes`` (None: it is missing), None if nothing is.

    ``entry`` is what the manifest says of it, ``array`` the array that it is a shard or chunk of. Without
    either, it has to be readable, and in a zip file to match its CRC-32.
    """
    reasons = []
    checksum: str | None = None
    try:
        if nbytes is not None and not is_quick:
            nbytes, checksum = _read_all(store, key, nbytes)
        if nbytes is None:
            return None if entry is not None and entry.crc32c is None else "is missing"
        if entry is not None and entry.crc32c is None:
            reasons.append(f"has {nbytes} bytes, the manifest says that nothing is stored")
        elif entry is not None and nbytes != entry.nbytes:
            reasons.append(f"has {nbytes} bytes, the manifest says {entry.nbytes}")
        elif entry is not None and checksum is not None and checksum != entry.crc32c:
            reasons.append(f"is damaged: its crc32c is {checksum}, the manifest says {entry.crc32c}")
        if array is not None and array.layout.is_sharded and not is_quick:
            # after the checksum, which says less
            reasons += _check_shard(store, key, array.layout)
    except MissingKeyError:
        return "is missing"
    except StoreError as error:
        reasons.append(str(error).removeprefix(f"{key} "))
    return "; ".join(reasons) or None


def _read_all(store: Store, key: str, nbytes: int) -> tuple[int | None, str | None]:
    """How many bytes there are, and their crc32c."""
    blob = store.open(key)
    if blob is None:
        return None, None
    with blob:
        crc32c, crc32, position = 0, 0, 0
        for piece in _pieces(store, blob, nbytes):
            crc32c = google_crc32c.extend(crc32c, piece)
            position += len(piece)
            if isinstance(blob, ZipBlob):
                crc32 = zlib.crc32(piece, crc32)
        if isinstance(blob, ZipBlob) and crc32 != blob.crc32:
            raise StoreError("is damaged: its CRC-32 is not that of the zip file's directory")
    return position, f"{crc32c:08x}"


def _pieces(store: Store, blob: Blob, nbytes: int) -> Iterator[bytes]:
    for start in range(0, nbytes, PIECE_BYTES):
        size = min(PIECE_BYTES, nbytes - start)
        piece = with_retries(lambda a=start, n=size: blob.read(a, n), store.policy)  # type: ignore[misc]
        yield piece
        if len(piece) < size:
            return


def _check_shard(store: Store, key: str, layout: ArrayLayout) -> list[str]:
    """What is wrong with the index of a shard."""
    wanted = index_nbytes(layout.grid, has_crc=layout.index_has_crc)

    def read() -> tuple[bytes, int]:
        blob = store.open(key)
        if blob is None:
            raise MissingKeyError(key)
        with blob:
            tail, size = blob.tail(wanted)
            return (tail if layout.index_at_end else blob.read(0, wanted)), size

    data, size = with_retries(read, store.policy)
    try:
        index = parse_index(data, layout.grid, has_crc=layout.index_has_crc)
        check_index(index, size - wanted if layout.index_at_end else size)
    except ValueError as error:
        return [str(error)]
    is_there, limit = index[..., 0] != ABSENT, layout.decoder.max_stored_bytes
    too_large = np.argwhere(is_there & (index[..., 1] > limit)).tolist()
    return [
        f"its index gives chunk {tuple(place)} {int(index[tuple(place)][1])} bytes, no codec needs {limit}"
        for place in too_large[:1]
    ]


def array_of(key: str, arrays: Mapping[str, Array]) -> Array | None:
    """The array whose folder a key lies in."""
    folder = key
    while folder:
        folder = folder.rpartition("/")[0]
        found = arrays.get(f"{folder}/" if folder else "")
        if found is not None:
            return found
    return None


def is_chunk_key(name: str, layout: ArrayLayout) -> bool:
    """Whether a name inside an array's folder is that of a shard, or chunk, of its grid."""
    if not name.startswith(layout.key_prefix):
        return False
    parts = name.removeprefix(layout.key_prefix).split(layout.key_separator)
    grid = grid_shape(layout.shape, layout.shard_shape)
    return len(parts) == len(grid) and all(
        part.isdecimal() and str(int(part)) == part and int(part) < n
        for part, n in zip(parts, grid, strict=True)
    )


def stray_reason(
    key: str, arrays: Mapping[str, Array], entries: Mapping[str, ManifestEntry] | None
) -> str | None:
    """Why an object does not belong to the store, None when it does or when that cannot be told."""
    if entries is not None:
        return None if key in entries else "is not in the manifest"
    array = array_of(key, arrays)
    if array is None or key.rpartition("/")[2] in METADATA_FILES:
        return None
    if is_chunk_key(key.removeprefix(array.prefix), array.layout):
        return None
    return f"lies in the array {array.prefix.rstrip('/')}, but is no part of it"
