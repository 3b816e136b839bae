"""The JSON documents of a store: zarr's and OME's metadata, each read once, of bounded size, objects all."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from ats_stream.io.storage.retry import with_retries
from ats_stream.io.storage.store_error import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ats_stream.io.storage.stores import Store

MAX_JSON_BYTES = 64 << 20  # 64 MiB
# requests for metadata of a remote store that are under way at once
METADATA_REQUESTS = 16


class Metadata:
    """JSON documents of a store, each read once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._raw: dict[str, bytes | StoreError | None] = {}

    def prefetch(self, keys: Iterable[str]) -> None:
        """Read documents of a remote store at once; what fails is raised where it is asked for."""
        keys = list(keys)
        if self.store.is_remote and keys:
            with ThreadPoolExecutor(min(METADATA_REQUESTS, len(keys))) as pool:
                self._raw.update(zip(keys, pool.map(self._read, keys), strict=True))

    def _read(self, key: str) -> bytes | StoreError | None:
        try:
            return with_retries(lambda: self.store.get(key, MAX_JSON_BYTES), self.store.policy)
        except StoreError as error:
            return error

    def get(self, key: str) -> dict[str, Any] | None:
        """A document, None when it is absent; ValueError when it is none."""
        if key not in self._raw:
            self._raw[key] = self._read(key)
        data = self._raw[key]
        if data is None:
            return None
        name = key.rsplit("/", 1)[-1]
        if isinstance(data, StoreError):
            raise data
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"broken {name}: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"broken {name}: not an object")
        return content


def attributes_of(metadata: Metadata, prefix: str) -> dict[str, Any]:
    """Attributes of a group of zarr v3 (zarr.json) or v2 (.zgroup, .zattrs)."""
    meta = metadata.get(f"{prefix}zarr.json")
    if meta is not None:
        if meta.get("node_type") != "group":
            raise ValueError("no OME-Zarr image: zarr.json is not that of a group")
        attributes = meta.get("attributes", {})
        return attributes if isinstance(attributes, dict) else {}
    attributes = metadata.get(f"{prefix}.zattrs")
    if attributes is None:
        raise ValueError("no OME-Zarr image: there is neither zarr.json nor .zattrs")
    return attributes


def is_inside(name: str) -> bool:
    """Whether a path that metadata give stays under their folder.

    >>> [is_inside(name) for name in ("0", "a/b", "../b", "/etc", "a\\0", "n" * 300)]
    [True, True, False, False, False, False]
    """
    path = PurePosixPath(name)
    is_path = "\0" not in name and name.isprintable() and all(len(part) < 256 for part in path.parts)
    return is_path and not path.is_absolute() and ".." not in path.parts
