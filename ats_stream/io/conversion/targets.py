"""Where the objects of a pyramid in the making go: a folder, or a prefix of an object store.

An object is there as a whole or not at all. A folder is written under another name and takes its own when it
is whole; in an object store the metadata of the group come last, and without them nothing opens.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ats_stream.errors import TargetExistsError
from ats_stream.files import write_atomic
from ats_stream.io.conversion import array_writer
from ats_stream.io.conversion.manifest import manifest_place
from ats_stream.io.storage.stores import LocalStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import IO

    from ats_stream.io.storage.stores import Store

GROUP_KEY = "zarr.json"
TEMPORARY = ".tmp"


class Target(Protocol):
    """Objects in the making; pickles, so that workers write on their own."""

    shown: str
    """Path or URL as messages name it, without credentials."""

    @property
    def store(self) -> Store:
        """What is there, for reading."""

    def put(self, key: str, parts: Sequence[Any]) -> None:
        """Store the parts one after another as one object; StorageError names it."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are not there do not matter."""

    def sizes(self) -> dict[str, int]:
        """Bytes of every object that is there; what was left half written is removed."""

    def exists(self) -> bool:
        """Whether a whole pyramid, or anything else, has the target's name."""

    def clear(self) -> None:
        """Make room for a pyramid that replaces what is there, now or when it is published."""

    def lock(self) -> None:
        """Keep other runs out; TargetExistsError if one is at work."""

    def unlock(self) -> None:
        """Let others in."""

    def discard(self) -> None:
        """Remove what is in the making, with its manifest."""

    def publish(self) -> None:
        """Give it its name, replacing what had it."""

    def read_manifest(self) -> bytes | None:
        """The manifest of what is in the making."""

    def write_manifest(self, data: bytes) -> None:
        """Replace it."""

    def append_manifest(self, data: bytes) -> None:
        """Add lines to it; they may reach an object store later."""


def open_target(place: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Target:
    """The target of a path or URL."""
    text = os.fspath(place)
    if "://" in text:
        from ats_stream.io.conversion.object_target import ObjectTarget

        return ObjectTarget(text, storage_options)
    return LocalTarget(text)


class LocalTarget:
    """A folder, ``<target>.partial`` until it is whole."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.shown = str(self.path)
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self._old = self.path.with_name(f"{self.path.name}.old")
        self._lock_path = self.path.with_name(f"{self.path.name}.partial.lock")
        self._manifest = Path(manifest_place(self.partial))
        self._lock: IO[bytes] | None = None
        self._log: IO[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_log": None}

    @property
    def store(self) -> Store:
        """The folder in the making."""
        return LocalStore(self.partial)

    def put(self, key: str, parts: Sequence[Any]) -> None:
        """Write a temporary file and rename it."""
        path = self.partial / key
        temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
        try:
            array_writer.guarded(
                f"{self.shown}/{key}",
                lambda: (array_writer.write_parts(temporary, parts), temporary.replace(path)),
            )
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def delete(self, keys: Iterable[str]) -> None:
        """Remove files."""
        for key in keys:
            (self.partial / key).unlink(missing_ok=True)

    def sizes(self) -> dict[str, int]:
        """Look at every file."""
        found = {}
        for path in self.partial.rglob("*"):
            if path.is_file():
                if path.name.endswith(TEMPORARY):
                    path.unlink(missing_ok=True)
                else:
                    found[path.relative_to(self.partial).as_posix()] = path.stat().st_size
        return found

    def exists(self) -> bool:
        """Whether something has the name; first a renaming that was cut off is brought to its end."""
        there = os.path.lexists(self.path)
        if there and self._manifest.exists() and not self.partial.exists():
            self._manifest.replace(manifest_place(self.path))
        if not there and self._old.exists() and not self.partial.exists():
            self._old.rename(self.path)
            there = True
        return there

    def clear(self) -> None:
        """What is there stays until it is replaced."""

    def lock(self) -> None:
        """Hold a lock that the system takes back when the process ends, however it ends."""
        array_writer.guarded(self.shown, self._take_lock)

    def _take_lock(self) -> None:
        self._lock_path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            lock = self._lock_path.open("ab")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise TargetExistsError(f"{self.shown}: another run is converting to it") from None
            except BaseException:
                lock.close()
                raise
            # whoever held it before may have removed the file
            if self._lock_path.exists() and os.path.samestat(self._lock_path.stat(), os.fstat(lock.fileno())):
                self._lock = lock
                return
            lock.close()

    def unlock(self) -> None:
        """Remove the lock's file."""
        self._close_log()
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def discard(self) -> None:
        """Remove the folder."""
        self._close_log()
        shutil.rmtree(self.partial, ignore_errors=True)
        self._manifest.unlink(missing_ok=True)

    def publish(self) -> None:
        """Rename the folder, then its manifest."""
        self._close_log()
        array_writer.guarded(self.shown, self._take_name)

    def _take_name(self) -> None:
        if self._old.is_dir():
            shutil.rmtree(self._old)
        if os.path.lexists(self.path):
            self.path.rename(self._old)
        self.partial.rename(self.path)
        self._manifest.replace(manifest_place(self.path))
        if self._old.is_dir() and not self._old.is_symlink():
            shutil.rmtree(self._old)
        else:
            self._old.unlink(missing_ok=True)

    def read_manifest(self) -> bytes | None:
        """All of it."""
        try:
            return self._manifest.read_bytes()
        except FileNotFoundError:
            return None

    def write_manifest(self, data: bytes) -> None:
        """Through a temporary file."""
        self._close_log()
        write_atomic(self._manifest, data)

    def append_manifest(self, data: bytes) -> None:
        """At once, so that a process that is killed next has said so."""

        def append() -> None:
            if self._log is None:
                self._log = self._manifest.open("ab", buffering=0)
            self._log.write(data)

        array_writer.guarded(str(self._manifest), append)

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None
