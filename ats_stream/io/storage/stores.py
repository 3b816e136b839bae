"""Where the bytes of a pyramid lie: a store maps keys such as ``0/c/0/3/1`` to bytes. Here the contract, and
local folders.
"""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ats_stream.io.storage.retry import RetryPolicy
from ats_stream.io.storage.store_error import StoreError, too_large

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence
    from types import TracebackType

# without O_NONBLOCK, opening a pipe would wait for its writer
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)


# file systems count time in steps of up to 10 ms: within one, two writes look like one
YOUNG_NS = 20_000_000  # 20 ms


class Blob(Protocol):
    """The bytes behind one key, open for reading; a context manager.

    A read may give fewer bytes than asked for where the bytes end, never other ones.
    """

    @property
    def stamp(self) -> Hashable:
        """Changes when the bytes do, as far as the store can tell; None if it cannot."""

    def read(self, start: int, nbytes: int) -> bytes:
        """Bytes from ``start``; StoreError if they cannot be read."""

    def tail(self, nbytes: int) -> tuple[bytes, int]:
        """The last bytes, and how many there are in all."""

    def whole(self, max_bytes: int) -> bytes:
        """All bytes; StoreError when they are more than ``max_bytes``, before they are read."""

    def __enter__(self) -> Blob: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Store(Protocol):
    """Keys to bytes, read-only. Pickles without open files or connections, and shows no credentials."""

    is_remote: bool
    """Whether each read waits for a server, so that many should be under way at once."""
    policy: RetryPolicy
    """How often callers repeat what fails for a passing reason; the methods here try once."""

    @property
    def identity(self) -> Hashable:
        """Equal for two stores that hold the same bytes."""

    def place(self, key: str) -> str:
        """What errors call a key: a path or URL without credentials."""

    def open(self, key: str) -> Blob | None:
        """The bytes behind a key, None when it is absent (a remote store says so only at the first read)."""

    def get(self, key: str, max_bytes: int) -> bytes | None:
        """All bytes of a key, None when it is absent, StoreError when there are more than ``max_bytes``."""

    def size(self, key: str) -> int | None:
        """Number of bytes of a key, None when it is absent."""

    def objects(self) -> Iterator[tuple[str, int]]:
        """Every key with its number of bytes, in no order; StoreError where keys cannot be listed."""

    def stamps(self, keys: Sequence[str]) -> Hashable:
        """What changes when any of the keys does, as things are now; None if that cannot be told."""

    def afresh(self) -> Store:
        """The same store, without anything remembered of its content."""


class LocalBlob:
    """A file, open."""

    __slots__ = ("_fd", "_info", "key")

    def __init__(self, fd: int, key: str, info: os.stat_result) -> None:
        self._fd, self._info, self.key = fd, info, key

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self._info.st_size

    @property
    def stamp(self) -> Hashable:
        """Size and time of change."""
        return self._info.st_size, self._info.st_mtime_ns

    def fileno(self) -> int:
        """The file descriptor, as long as the file is open."""
        return self._fd

    def read(self, start: int, nbytes: int) -> bytes:
        """Bytes from ``start``."""
        try:
            return os.pread(self._fd, nbytes, start)
        except OSError as error:
            raise StoreError(f"cannot read {self.key}: {error.strerror}") from error

    def tail(self, nbytes: int) -> tuple[bytes, int]:
        """The last bytes, and the size."""
        return self.read(max(0, self.size - nbytes), min(nbytes, self.size)), self.size

    def whole(self, max_bytes: int) -> bytes:
        """All bytes."""
        if self.size > max_bytes:
            raise too_large(self.key, self.size, max_bytes)
        return self.read(0, self.size)

    def __enter__(self) -> LocalBlob:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


class LocalStore:
    """A folder."""

    is_remote = False
    policy = RetryPolicy(max_retries=0)

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.fspath(folder)

    def __repr__(self) -> str:
        return f"LocalStore({self.folder!r})"

    @property
    def identity(self) -> Hashable:
        """The folder."""
        return ("local", self.folder)

    def place(self, key: str) -> str:
        """The path."""
        return str(Path(self.folder, key))

    def open(self, key: str) -> LocalBlob | None:
        """Open a file, None when there is none."""
        try:
            fd = os.open(f"{self.folder}/{key}", OPEN_FLAGS)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"cannot open {key}: {error.strerror}") from error
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise StoreError(f"cannot read {key}: not a file")
        except BaseException:
            os.close(fd)
            raise
        return LocalBlob(fd, key, info)

    def get(self, key: str, max_bytes: int) -> bytes | None:
        """Read a file, None when there is none."""
        blob = self.open(key)
        if blob is None:
            return None
        with blob:
            return blob.whole(max_bytes)

    def size(self, key: str) -> int | None:
        """Size of a file."""
        blob = self.open(key)
        if blob is None:
            return None
        with blob:
            return blob.size

    def objects(self) -> Iterator[tuple[str, int]]:
        """All files, also those in folders behind no link."""

        def refuse(error: OSError) -> None:
            raise StoreError(f"cannot list {error.filename}: {error.strerror}") from error

        for folder, _, names in os.walk(self.folder, onerror=refuse):
            inside = os.path.relpath(folder, self.folder).replace(os.sep, "/")
            for name in names:
                nbytes = os.lstat(os.path.join(folder, name)).st_size  # noqa: PTH118  one call per file
                yield name if inside == "." else f"{inside}/{name}", nbytes

    def stamps(self, keys: Sequence[str]) -> Hashable:
        """Those of the files."""
        found = [local_stamp(f"{self.folder}/{key}") for key in keys]
        return None if None in found else tuple(found)

    def afresh(self) -> LocalStore:
        """Nothing is remembered."""
        return self


def local_stamp(path: str) -> tuple[int, ...] | None:
    """Size, times of change and number of a file; () when it is absent, None while it is too young."""
    try:
        info = os.stat(path)  # noqa: PTH116  # a string path is wanted in the hot loop
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError:
        return None
    if time.time_ns() - max(info.st_mtime_ns, info.st_ctime_ns) < YOUNG_NS:
        return None
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_dev, info.st_ino
