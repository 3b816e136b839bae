"""Zip files as stores: the central directory says where every member lies, so nothing is unpacked but what is
asked for.

Members may be stored (their ranges are read where they stand) or deflated (unpacked as a whole, bounded).
Layout of the records: APPNOTE.TXT of PKWARE, sections 4.3 and 4.5.3 (Zip64).
"""

from __future__ import annotations

import struct
import threading
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ats_stream.io.storage.retry import with_retries
from ats_stream.io.storage.store_error import MissingKeyError, StoreError, too_large

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from ats_stream.io.storage.stores import Blob, Store

STORED, DEFLATED = 0, 8
END, END64, LOCATOR64, ENTRY, LOCAL = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2", b"PK\3\4"
END_BYTES, ENTRY_BYTES, LOCAL_BYTES = 22, 46, 30
MAX_COMMENT_BYTES = 1 << 16
MAX_DIRECTORY_BYTES = 256 << 20  # 256 MiB: two million members
# a deflated member is unpacked as a whole, so larger ones must be stored
MAX_DEFLATED_BYTES = 256 << 20  # 256 MiB
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Member:
    """One file in a zip."""

    header: int
    packed_bytes: int
    nbytes: int
    method: int
    crc: int


@dataclass(frozen=True)
class Directory:
    """What a zip holds: members by name, the folder of the image among them, and the stamp of the file."""

    members: dict[str, Member]
    root: str
    stamp: Hashable


class ZipStore:
    """The members of a zip file that itself lies behind a key of another store."""

    def __init__(self, outer: Store, name: str) -> None:
        """Read the central directory; StoreError when it is broken."""
        self.outer, self.name = outer, name
        self._reset()
        self.directory()

    def _reset(self) -> None:
        self.is_remote, self.policy = self.outer.is_remote, self.outer.policy
        self._lock = threading.Lock()
        self._directory: Directory | None = None
        self._starts: dict[str, int] = {}
        self._unpacked: tuple[str, bytes] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"outer": self.outer, "name": self.name}

    def __setstate__(self, state: dict[str, object]) -> None:
        """The directory is read again when it is needed: it may be larger than what should travel."""
        self.__dict__.update(state)
        self._reset()

    def __repr__(self) -> str:
        return f"ZipStore({self.place('')!r})"

    @property
    def identity(self) -> Hashable:
        """The zip file."""
        return ("zip", self.outer.identity, self.name)

    def place(self, key: str) -> str:
        """The zip file and the member."""
        return "/".join(part for part in (self.outer.place(self.name), key) if part)

    def open_outer(self) -> Blob:
        """The zip file itself."""
        blob = self.outer.open(self.name)
        if blob is None:
            raise StoreError(f"{self.name} does not exist")
        return blob

    def directory(self) -> Directory:
        """The members by name, read once."""
        found = self._directory
        if found is None:
            found = self._directory = with_retries(self._read_directory, self.policy)
        return found

    def _read_directory(self) -> Directory:
        try:
            with self.open_outer() as blob:
                members = read_directory(blob, self.name)
                return Directory(members, _root(members), blob.stamp)
        except MissingKeyError as error:
            raise StoreError(str(error)) from error

    def open(self, key: str) -> ZipBlob | None:
        """A member, None when there is none."""
        directory = self.directory()
        member = directory.members.get(directory.root + key)
        return None if member is None else ZipBlob(self, directory.root + key, member, directory.stamp)

    def get(self, key: str, max_bytes: int) -> bytes | None:
        """A member's bytes, checked against its CRC-32."""
        blob = self.open(key)
        if blob is None:
            return None
        with blob:
            return blob.whole(max_bytes)

    def size(self, key: str) -> int | None:
        """Unpacked size of a member."""
        directory = self.directory()
        member = directory.members.get(directory.root + key)
        return None if member is None else member.nbytes

    def objects(self) -> Iterator[tuple[str, int]]:
        """All members in the folder of the image."""
        directory = self.directory()
        for name, member in directory.members.items():
            if name.startswith(directory.root):
                yield name.removeprefix(directory.root), member.nbytes

    def stamps(self, keys: Sequence[str]) -> Hashable:  # noqa: ARG002  # whatever they are, they lie in it
        """That of the zip file."""
        return self.outer.stamps([self.name])

    def afresh(self) -> ZipStore:
        """A remote zip file does not show that it changed, so its directory is read again."""
        return ZipStore(self.outer, self.name) if self.is_remote else self

    def read(self, blob: Blob, start: int, nbytes: int) -> bytes:
        """Bytes of the zip file; if it is gone, that is no absent member."""
        try:
            return blob.read(start, nbytes)
        except MissingKeyError as error:
            raise StoreError(str(error)) from error

    def start(self, blob: Blob, key: str, member: Member) -> int:
        """Where the data of a member begin: behind its local header, whose length only it knows."""
        start = self._starts.get(key)
        if start is None:
            header = self.read(blob, member.header, LOCAL_BYTES + len(key.encode()))
            if len(header) < LOCAL_BYTES or header[:4] != LOCAL:
                raise StoreError(f"damaged zip: no header of {key} where the directory says")
            name_len, extra_len = struct.unpack("<HH", header[26:30])
            name = header[LOCAL_BYTES : LOCAL_BYTES + name_len]
            # no checksum covers names, but they are written twice
            if key not in (name.decode("utf-8", "replace"), name.decode("cp437")):
                raise StoreError(f"damaged zip: another header than that of {key} where the directory says")
            start = member.header + LOCAL_BYTES + name_len + extra_len
            self._starts[key] = start
        return start

    def unpacked(self, blob: Blob, key: str, member: Member) -> bytes:
        """All bytes of a deflated member; the last one is kept, because shards are read in ranges."""
        with self._lock:
            if self._unpacked is not None and self._unpacked[0] == key:
                return self._unpacked[1]
        if member.nbytes > MAX_DEFLATED_BYTES:
            raise StoreError(
                f"zip member {key} of {member.nbytes} bytes is deflated, "
                f"at most {MAX_DEFLATED_BYTES} are unpacked: store it without compression"
            )
        packed = self.read(blob, self.start(blob, key, member), member.packed_bytes)
        data = inflate(packed, member, key)
        with self._lock:
            self._unpacked = (key, data)
        return data


class ZipBlob:
    """One member, open."""

    def __init__(self, store: ZipStore, key: str, member: Member, stamp: Hashable) -> None:
        self._store, self.key, self._member = store, key, member
        self._blob = store.open_outer()
        try:
            self._check(stamp)
        except BaseException:
            self._blob.__exit__(None, None, None)
            raise

    def _check(self, stamp: Hashable) -> None:
        if self._blob.stamp != stamp:
            raise StoreError(f"{self._store.name} changed since it was opened")
        if self._member.method not in (STORED, DEFLATED):
            raise StoreError(
                f"zip member {self.key} has compression method {self._member.method}, "
                "only stored and deflated members are read"
            )

    @property
    def stamp(self) -> Hashable:
        """That of the whole zip file."""
        return self._blob.stamp

    def read(self, start: int, nbytes: int) -> bytes:
        """Bytes of the member from ``start``."""
        member = self._member
        if member.method == DEFLATED:
            return self._store.unpacked(self._blob, self.key, member)[start : start + nbytes]
        nbytes = min(nbytes, member.nbytes - start)
        if nbytes <= 0:
            return b""
        place = self._store.start(self._blob, self.key, member) + start
        return self._store.read(self._blob, place, nbytes)

    def tail(self, nbytes: int) -> tuple[bytes, int]:
        """The last bytes, and the size."""
        size = self._member.nbytes
        return self.read(max(0, size - nbytes), min(nbytes, size)), size

    @property
    def crc32(self) -> int:
        """The CRC-32 of all bytes, as the directory states it."""
        return self._member.crc

    def whole(self, max_bytes: int) -> bytes:
        """All bytes, checked against the member's CRC-32."""
        member = self._member
        if member.nbytes > max_bytes:
            raise too_large(self.key, member.nbytes, max_bytes)
        data = self.read(0, member.nbytes)
        if len(data) != member.nbytes or zlib.crc32(data) != member.crc:
            raise StoreError(f"zip member {self.key} is damaged: its CRC-32 does not match")
        return data

    def __enter__(self) -> ZipBlob:
        return self

    def __exit__(self, *_: object) -> None:
        self._blob.__exit__(None, None, None)


def inflate(packed: bytes, member: Member, key: str) -> bytes:
    """Unpack a deflated member to the size that the directory states, and check its CRC-32."""
    unpack = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        # one byte more than stated shows data that unpack to more, however much that would be
        data = unpack.decompress(packed, member.nbytes + 1)
    except zlib.error as error:
        raise StoreError(f"zip member {key} is damaged: {error}") from error
    if len(data) != member.nbytes or zlib.crc32(data) != member.crc:
        raise StoreError(f"zip member {key} is damaged: its size or CRC-32 does not match")
    return data


def read_directory(blob: Blob, name: str) -> dict[str, Member]:
    """All members of a zip by name; StoreError when the directory is broken or absurd."""
    tail, size = blob.tail(END_BYTES + MAX_COMMENT_BYTES)
    at = tail.rfind(END)
    if at < 0 or len(tail) - at < END_BYTES:
        raise StoreError(f"{name} is not a zip file, or it is truncated")
    count, nbytes, start = struct.unpack("<HII", tail[at + 10 : at + 20])
    if count == FULL16 or FULL32 in (nbytes, start):
        count, nbytes, start = _read_end64(blob, size - len(tail) + at, name)
    if nbytes > MAX_DIRECTORY_BYTES or start + nbytes > size or count * ENTRY_BYTES > nbytes:
        raise StoreError(
            f"damaged zip {name}: a directory of {count} members, {nbytes} bytes from {start} of {size}"
        )
    directory = blob.read(start, nbytes) if nbytes else b""
    try:
        return _parse_entries(directory, count, size)
    except (struct.error, ValueError) as error:
        raise StoreError(f"damaged zip {name}: {error}") from error


def _read_end64(blob: Blob, end: int, name: str) -> tuple[int, int, int]:
    """Number of members, size and start of the directory from the records of Zip64."""
    locator = blob.read(max(0, end - 20), 20) if end >= 20 else b""
    if locator[:4] != LOCATOR64 or len(locator) < 20:
        raise StoreError(f"damaged zip {name}: its Zip64 locator is missing")
    record = blob.read(struct.unpack("<Q", locator[8:16])[0] & (2**63 - 1), 56)
    if record[:4] != END64 or len(record) < 56:
        raise StoreError(f"damaged zip {name}: its Zip64 record is missing")
    count, nbytes, start = struct.unpack("<QQQ", record[32:56])
    return count, nbytes, start


def _parse_entries(directory: bytes, count: int, size: int) -> dict[str, Member]:
    members: dict[str, Member] = {}
    at = 0
    for number in range(count):
        if directory[at : at + 4] != ENTRY:
            raise ValueError(f"entry {number} of {count} of the directory is broken")
        flags, method = struct.unpack_from("<HH", directory, at + 8)
        crc, packed, nbytes, name_len, extra_len, comment_len = struct.unpack_from(
            "<IIIHHH", directory, at + 16
        )
        (header,) = struct.unpack_from("<I", directory, at + 42)
        at += ENTRY_BYTES
        raw, extra = directory[at : at + name_len], directory[at + name_len : at + name_len + extra_len]
        at += name_len + extra_len + comment_len
        nbytes, packed, header = _wide(extra, nbytes, packed, header)
        name = raw.decode("utf-8" if flags & 0x800 else "cp437")
        if header + packed > size or (method == STORED and packed != nbytes):
            raise ValueError(f"member {number} points past the end of the file")
        if flags & 1:
            raise ValueError(f"member {number} is encrypted")
        if not name.endswith("/"):
            members[name] = Member(header, packed, nbytes, method, crc)
    return members


def _wide(extra: bytes, nbytes: int, packed: int, header: int) -> tuple[int, int, int]:
    """Values that do not fit into 32 bits stand in the extra field 1, in this order, those alone."""
    at = 0
    while at + 4 <= len(extra) and FULL32 in (nbytes, packed, header):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            try:
                nbytes, packed, header = (
                    next(values) if v == FULL32 else v for v in (nbytes, packed, header)
                )
            except (StopIteration, RuntimeError) as error:
                raise ValueError("a Zip64 field is too short") from error
            break
        at += 4 + length
    return nbytes, packed, header


def _root(members: dict[str, Member]) -> str:
    """The folder of the image: the root, or the one folder that holds everything.

    >>> _root({"a.zarr/zarr.json": None, "a.zarr/0/zarr.json": None}), _root({"zarr.json": None})
    ('a.zarr/', '')
    """
    if "zarr.json" in members or ".zattrs" in members:
        return ""
    tops = {name.split("/", 1)[0] for name in members if "/" in name}
    return f"{tops.pop()}/" if len(tops) == 1 and all("/" in name for name in members) else ""
