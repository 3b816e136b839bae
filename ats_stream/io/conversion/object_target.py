"""A prefix of an object store as the target of a conversion, through obstore."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from ats_stream.errors import InputError, StorageError
from ats_stream.io.conversion.manifest import SUFFIX
from ats_stream.io.conversion.targets import GROUP_KEY
from ats_stream.io.storage.remote import ObjectStore
from ats_stream.io.storage.retry import with_retries
from ats_stream.io.storage.store_error import MissingKeyError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from ats_stream.io.storage.stores import Store

Result = TypeVar("Result")
# the manifest is put anew after this many further lines
LINES_PER_PUT = 64
MAX_MANIFEST_BYTES = 1 << 30


class ObjectTarget:
    """Objects under a URL, written in place.

    There is no lock in an object store: two runs with the same plan write the same bytes, and a run that
    finds, each time that it brings its manifest up to date, that another one has begun anew with another plan
    fails with StorageError.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None) -> None:
        """InputError for a URL or options that cannot be used."""
        outer, _, name = url.rstrip("/").rpartition("/")
        self._store = ObjectStore(url, storage_options)
        if self._store.shown_url.startswith("http"):
            raise InputError(f"{self._store.shown_url}: web servers cannot be written to")
        self._beside = ObjectStore(outer, storage_options)
        self._manifest_key = name + SUFFIX
        self.shown = self._store.shown_url
        self._manifest = b""
        self._num_lines = 0
        self._header: bytes | None = None

    @property
    def store(self) -> Store:
        """The prefix."""
        return self._store

    def _try(self, store: ObjectStore, key: str, action: Callable[[Any], Result]) -> Result:
        try:
            return with_retries(lambda: store.attempt(key, action), store.policy)
        except MissingKeyError:
            raise
        except StoreError as error:
            reason = str(error).replace("cannot read", "cannot write", 1)
            raise StorageError(f"{store.shown_url}: {reason}") from error

    def put(self, key: str, parts: Sequence[Any]) -> None:
        """One put, of several parts where the object is large."""
        import obstore

        data = b"".join(parts)
        self._try(self._store, key, lambda client: obstore.put(client, key, data))

    def delete(self, keys: Iterable[str]) -> None:
        """One request for each."""
        import obstore

        for key in keys:
            try:
                self._try(self._store, key, lambda client, key=key: obstore.delete(client, key))  # type: ignore[misc]  # mypy cannot tell the type
            except MissingKeyError:
                continue

    def sizes(self) -> dict[str, int]:
        """List the prefix."""
        import obstore

        def sizes(client: Any) -> dict[str, int]:
            return {str(item["path"]): int(item["size"]) for batch in obstore.list(client) for item in batch}

        return self._try(self._store, "the objects", sizes)

    def exists(self) -> bool:
        """Whether there is a group."""
        try:
            return with_retries(lambda: self._store.size(GROUP_KEY), self._store.policy) is not None
        except StoreError as error:
            raise StorageError(f"{self.shown}: {error}") from error

    def clear(self) -> None:
        """Keys are written in place, so what is there goes now."""
        self.discard()

    def lock(self) -> None:
        """Nothing to hold."""

    def unlock(self) -> None:
        """Bring the manifest up to date, unless it is another run's by now."""
        if self._num_lines:
            with suppress(StorageError):
                self.write_manifest(self._manifest)

    def discard(self) -> None:
        """Delete every object under the prefix, the group first, so that nothing broken opens."""
        import obstore

        self._num_lines, self._header = 0, None
        keys = sorted(self.sizes(), key=lambda key: key != GROUP_KEY)
        self.delete(keys)
        try:
            self._try(
                self._beside, self._manifest_key, lambda client: obstore.delete(client, self._manifest_key)
            )
        except MissingKeyError:
            return

    def publish(self) -> None:
        """Bring the manifest up to date; the objects have their names."""
        self.write_manifest(self._manifest)

    def read_manifest(self) -> bytes | None:
        """One request."""
        try:
            return with_retries(
                lambda: self._beside.get(self._manifest_key, MAX_MANIFEST_BYTES), self._beside.policy
            )
        except StoreError as error:
            raise StorageError(f"{self._beside.shown_url}: {error}") from error

    def write_manifest(self, data: bytes) -> None:
        """One put; but for the first, after a look at whose manifest is there."""
        import obstore

        self._manifest, self._num_lines = data, 0
        header = data[: data.find(b"\n") + 1]
        if self._header is None:
            self._header = header
        elif not (self.read_manifest() or header).startswith(header):
            self.delete([GROUP_KEY])  # what is there now is of both
            raise StorageError(f"{self.shown}: another run has begun to write here with another plan")
        key = self._manifest_key
        self._try(self._beside, key, lambda client: obstore.put(client, key, data))

    def append_manifest(self, data: bytes) -> None:
        """Kept until there are enough lines for a put."""
        self._manifest += data
        self._num_lines += 1
        if self._num_lines >= LINES_PER_PUT:
            self.write_manifest(self._manifest)
