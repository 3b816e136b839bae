"""A store of this package as a store of zarr-python, read-only."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest

from ats_stream.io.layout import MAX_CHUNK_BYTES
from ats_stream.io.storage.retry import with_retries
from ats_stream.io.storage.store_error import MissingKeyError, StoreError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from ats_stream.io.storage.stores import Store as OwnStore


class ZarrStore(Store):
    """Reads keys in threads, repeated as the store says; refuses everything else."""

    supports_writes = False
    supports_deletes = False
    supports_listing = False

    def __init__(self, store: OwnStore) -> None:
        super().__init__(read_only=True)
        self._store = store

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZarrStore) and other._store.identity == self._store.identity

    def __hash__(self) -> int:
        return hash(self._store.identity)

    def __repr__(self) -> str:
        return f"ZarrStore({self._store!r})"

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The bytes of a key, or a part of them."""
        data = await asyncio.to_thread(self._read, key, byte_range)
        return None if data is None else prototype.buffer.from_bytes(data)

    def _read(self, key: str, byte_range: ByteRequest | None) -> bytes | None:
        def once() -> bytes | None:
            blob = self._store.open(key)
            if blob is None:
                return None
            with blob:
                match byte_range:
                    case RangeByteRequest(start, end):
                        return blob.read(start, end - start)
                    case SuffixByteRequest(suffix):
                        return blob.tail(suffix)[0]
                    case OffsetByteRequest(offset):
                        return blob.whole(MAX_CHUNK_BYTES)[offset:]
                return blob.whole(MAX_CHUNK_BYTES)

        try:
            return with_retries(once, self._store.policy)
        except MissingKeyError:
            return None

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Several parts, each by itself."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        """Whether a key is there."""
        return await asyncio.to_thread(self._store.size, key) is not None

    async def set(self, key: str, value: Buffer) -> None:  # noqa: ARG002 the name is zarr's
        """Refused."""
        raise StoreError(f"cannot write {key}: read-only")

    async def delete(self, key: str) -> None:
        """Refused."""
        raise StoreError(f"cannot delete {key}: read-only")

    def list(self) -> AsyncIterator[str]:
        """Refused."""
        raise StoreError("keys are not listed")

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Refused."""
        raise StoreError(f"keys of {prefix} are not listed")

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Refused."""
        raise StoreError(f"keys of {prefix} are not listed")

    def __getstate__(self) -> dict[str, Any]:
        return {"_store": self._store}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_store"])  # type: ignore[misc]
