"""How the levels of a pyramid are stored: shards, codecs, bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ats_stream.io.omezarr import ARRAY_FILES
from ats_stream.io.sources import StoreSource
from ats_stream.io.storage.documents import MAX_JSON_BYTES
from ats_stream.io.storage.retry import with_retries
from ats_stream.io.storage.store_error import StoreError
from ats_stream.io.zarr_source import ZarrSource

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ats_stream.io.pyramid import Pyramid
    from ats_stream.io.sources import ChunkSource

# codecs that order numbers and do not pack them
_PLAIN = frozenset({"bytes", "transpose", "sharding_indexed"})


@dataclass(frozen=True, kw_only=True)
class LevelStorage:
    """How one level is stored."""

    shard_shape: tuple[int, ...] | None
    """(C, *space); None without shards."""
    codec: str
    """Empty when it is not known."""
    num_bytes: int | None
    """Of all its objects; None when they are not its own, or cannot be listed."""
    num_objects: int | None


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How a pyramid is stored."""

    levels: tuple[LevelStorage, ...]
    num_bytes: int | None
    """Of everything in its store, labels included; None when it is a file, or cannot be listed."""
    num_objects: int | None


def storage_of(pyramid: Pyramid) -> Storage:
    """How a pyramid is stored; metadata are read again, and keys listed where that is possible."""
    sizes = _listed(pyramid.sources)
    found = []
    for source in pyramid.sources:
        is_stored = isinstance(source, StoreSource | ZarrSource)
        inside = (
            None
            if sizes is None or not is_stored
            else [n for key, n in sizes.items() if key.startswith(source.prefix)]  # type: ignore[attr-defined]
        )
        is_sharded = is_stored and source.shard_shape != source.chunk_shape
        found.append(
            LevelStorage(
                shard_shape=source.shard_shape if is_sharded else None,
                codec=_codec_of(source),
                num_bytes=None if inside is None else sum(inside),
                num_objects=None if inside is None else len(inside),
            )
        )
    return Storage(
        levels=tuple(found),
        num_bytes=None if sizes is None else sum(sizes.values()),
        num_objects=None if sizes is None else len(sizes),
    )


def _listed(sources: Sequence[ChunkSource]) -> dict[str, int] | None:
    top = sources[0]
    if not isinstance(top, StoreSource | ZarrSource):
        return None
    try:
        return dict(top.store.objects())
    except StoreError:
        return None


def _codec_of(source: ChunkSource) -> str:
    if not isinstance(source, StoreSource | ZarrSource):
        return str(getattr(source, "compression_name", ""))
    for name in ARRAY_FILES:
        key = source.prefix + name
        try:
            data = with_retries(
                lambda k=key: source.store.get(k, MAX_JSON_BYTES),  # type: ignore[misc]
                source.store.policy,
            )
        except StoreError:
            return ""
        if data is not None:
            return codec_text(json.loads(data))
    return ""


def codec_text(meta: Mapping[str, Any]) -> str:
    """The codecs of an array of zarr v3 or v2 that pack its numbers, in words.

    >>> codec_text({"codecs": [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 1}}]})
    'zstd 1'
    >>> codec_text({"compressor": {"id": "blosc", "cname": "lz4", "clevel": 5}})
    'blosc lz4 5'
    >>> codec_text({"compressor": None})
    'raw'
    """
    codecs = list(meta.get("codecs") or ())
    if "codecs" in meta:
        for codec in codecs:
            if codec.get("name") == "sharding_indexed":
                return codec_text({"codecs": codec["configuration"]["codecs"]})
        named = [(str(c.get("name")), c.get("configuration") or {}) for c in codecs]
    else:
        packed = [*(meta.get("filters") or ()), meta.get("compressor")]
        named = [(str(c.get("id")), c) for c in packed if c]
    words = [
        " ".join(
            str(part)
            for part in (
                name.removeprefix("imagecodecs_").removeprefix("numcodecs."),
                config.get("cname"),
                config.get("clevel", config.get("level")),
            )
            if part is not None
        )
        for name, config in named
        if name not in _PLAIN
    ]
    return ", ".join(words) or "raw"
