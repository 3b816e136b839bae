"""The manifest of a conversion: what was converted how, and size and checksum of every object of the store.

JSON lines beside the store, ``<target>.manifest.jsonl``. The first line says what decides the bytes; each
object follows when it is done, so that an interrupted conversion knows what is there, and ``verify`` what
should be. The last line of a key wins; a line that was cut off is as if it were not there.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c

from ats_stream.errors import SlideError
from ats_stream.io.storage.retry import with_retries
from ats_stream.io.storage.store_error import StoreError
from ats_stream.io.storage.stores import LocalStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ats_stream.io.storage.stores import Store

FORMAT = 1
_COPY_BYTES = 128 << 10  # 128 KiB
SUFFIX = ".manifest.jsonl"
# a line takes about a hundred bytes: ten million objects
MAX_MANIFEST_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class SourceStamp:
    """By what a source is known again."""

    name: str
    """Of the file, without its folder."""
    nbytes: int
    mtime_ns: int
    """Time of the last change; 0 for what has none."""


@dataclass(frozen=True, kw_only=True)
class ManifestHeader:
    """What decides the bytes of a conversion."""

    tool: str
    profile: str
    source: SourceStamp
    plan: str
    """SHA-256 over everything that decides the bytes, apart from the source's pixels."""
    pixel_size_um: tuple[float | None, ...] | None
    """Of level 0 per space axis; None where it is unknown or means nothing."""


@dataclass(frozen=True, kw_only=True)
class ManifestEntry:
    """One object that is done."""

    key: str
    nbytes: int
    """0 for a shard of nothing but the fill value, which is not stored."""
    crc32c: str | None
    """Of all its bytes, eight hexadecimal digits; None for what is not stored."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that a manifest says."""

    header: ManifestHeader
    entries: Mapping[str, ManifestEntry] = field(default_factory=dict)
    is_complete: bool = False
    """Whether the conversion came to its end."""


def manifest_place(target: str | os.PathLike[str]) -> str:
    """Path or URL of the manifest of a store.

    >>> manifest_place("s3://bucket/a.ome.zarr/"), manifest_place("out/a.ome.zarr")
    ('s3://bucket/a.ome.zarr.manifest.jsonl', 'out/a.ome.zarr.manifest.jsonl')
    """
    return os.fspath(target).rstrip("/") + SUFFIX


def entry_of(key: str, parts: Iterable[Any]) -> ManifestEntry:
    """The entry of an object of these bytes, given in pieces; without any it is one that is not stored.

    >>> entry_of("0/c/0/0/0", [b"1234", b"56789"])
    ManifestEntry(key='0/c/0/0/0', nbytes=9, crc32c='e3069283')
    """
    checksum, nbytes = 0, 0
    for part in parts:
        # of views the library takes none; small copies stay in the caches
        step = len(part) if isinstance(part, bytes) else _COPY_BYTES
        for begin in range(0, len(part), step or 1):
            checksum = google_crc32c.extend(checksum, bytes(part[begin : begin + step]))
        nbytes += len(part)
    return ManifestEntry(key=key, nbytes=nbytes, crc32c=f"{checksum:08x}" if nbytes else None)


def header_line(header: ManifestHeader) -> bytes:
    """The first line."""
    source = {
        "name": header.source.name,
        "bytes": header.source.nbytes,
        "mtime_ns": header.source.mtime_ns,
    }
    sizes = None if header.pixel_size_um is None else list(header.pixel_size_um)
    return _line(
        {
            "manifest": FORMAT,
            "tool": header.tool,
            "profile": header.profile,
            "source": source,
            "plan": header.plan,
            "pixel_size_um": sizes,
        }
    )


def entry_line(entry: ManifestEntry) -> bytes:
    """The line of an object."""
    return _line({"key": entry.key, "bytes": entry.nbytes, "crc32c": entry.crc32c})


def complete_line(num_objects: int, checksum: int) -> bytes:
    """The last line; ``checksum`` is the crc32c of all bytes before it."""
    return _line({"complete": True, "objects": num_objects, "crc32c": f"{checksum:08x}"})


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def parse_manifest(data: bytes) -> Manifest:
    """Read a manifest; ValueError says what is wrong with it.

    A last line without its end was cut off and does not count. Lines after ``complete`` come from a
    conversion that went on, so it is complete only when the last line says so.
    """
    *lines, _ = data.split(b"\n")
    if not lines:
        raise ValueError("broken manifest: no first line")
    header = _header(_parsed(1, lines[0]))
    entries: dict[str, ManifestEntry] = {}
    is_complete = False
    checksum = google_crc32c.value(lines[0] + b"\n")
    for number, line in enumerate(lines[1:], start=2):
        content = _parsed(number, line)
        before, checksum = checksum, google_crc32c.extend(checksum, line + b"\n")
        is_complete = content.get("complete") is True
        if is_complete:
            if content.get("objects") != len(entries):
                raise ValueError(
                    f"broken manifest: line {number} counts {content.get('objects')} objects, "
                    f"before it are {len(entries)}"
                )
            # to the letter: nothing else covers this line itself
            if line + b"\n" != complete_line(len(entries), before):
                raise ValueError(f"broken manifest: line {number} has not the checksum of those before it")
            continue
        entry = _entry(number, content)
        entries[entry.key] = entry
    return Manifest(header=header, entries=entries, is_complete=is_complete)


def _parsed(number: int, line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken manifest: line {number} is no JSON") from error
    if not isinstance(content, dict):
        raise ValueError(f"broken manifest: line {number} is no object")
    return content


def _header(content: Mapping[str, Any]) -> ManifestHeader:
    if content.get("manifest") != FORMAT:
        raise ValueError(f"broken manifest: format {content.get('manifest')!r}, expected {FORMAT}")
    try:
        source, sizes = content["source"], content["pixel_size_um"]
        return ManifestHeader(
            tool=str(content["tool"]),
            profile=str(content["profile"]),
            source=SourceStamp(
                name=str(source["name"]), nbytes=int(source["bytes"]), mtime_ns=int(source["mtime_ns"])
            ),
            plan=str(content["plan"]),
            pixel_size_um=None
            if sizes is None
            else tuple(None if size is None else float(size) for size in sizes),
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"broken manifest: line 1: {type(error).__name__}: {error}") from error


def _entry(number: int, content: Mapping[str, Any]) -> ManifestEntry:
    key, nbytes, checksum = content.get("key"), content.get("bytes"), content.get("crc32c")
    is_stored = isinstance(checksum, str) and len(checksum) == 8 and type(nbytes) is int and nbytes > 0
    is_absent = checksum is None and type(nbytes) is int and nbytes == 0
    if not isinstance(key, str) or not key or not (is_stored or is_absent):
        raise ValueError(f"broken manifest: line {number} describes no object")
    return ManifestEntry(key=key, nbytes=int(nbytes or 0), crc32c=checksum)


def read_manifest(
    target: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
) -> Manifest | None:
    """The manifest beside a store, a path or a URL; None when there is none.

    Raises SlideError, naming it without credentials, when it cannot be read or is broken.
    """
    store, name = _store_of(manifest_place(target), storage_options)
    try:
        data = with_retries(lambda: store.get(name, MAX_MANIFEST_BYTES), store.policy)
        return None if data is None else parse_manifest(data)
    except (StoreError, ValueError) as error:
        raise SlideError(store.place(name), str(error)) from error


def _store_of(place: str, storage_options: Mapping[str, Any] | None) -> tuple[Store, str]:
    if "://" not in place:
        return LocalStore(Path(place).parent), Path(place).name
    from ats_stream.io.storage.remote import ObjectStore

    folder, _, name = place.rpartition("/")
    return ObjectStore(folder, storage_options), name
