"""The ``zarr.json`` of a zarr v3 array: building it, and parsing what the fast reader needs. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ats_stream.io.codecs import ChunkDecoder, parse_codecs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DTYPES = frozenset(
    {
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
    }
)
# what metadata may claim; more is an error in them, or an attack
MAX_LEVEL_PX = 1 << 46  # eight million pixels squared
MAX_CHUNK_BYTES = 512 << 20  # 512 MiB: a chunk is decoded as a whole
MAX_CHUNKS_PER_SHARD = 1 << 22  # an index of 64 MiB
INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """How the chunks of an array lie in files; without sharding ``shard_shape`` equals ``chunk_shape``."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_shape: tuple[int, ...]
    shard_shape: tuple[int, ...]
    is_sharded: bool
    index_has_crc: bool
    index_at_end: bool
    fill_value: Any
    decoder: ChunkDecoder
    key_prefix: str
    key_separator: str

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """Chunks per shard along each axis."""
        return tuple(s // c for s, c in zip(self.shard_shape, self.chunk_shape, strict=True))

    def key(self, shard: Sequence[int]) -> str:
        """Path of a shard (or of a chunk of an array without shards) relative to the array's folder."""
        return self.key_prefix + self.key_separator.join(str(int(i)) for i in shard)


def build_array_json(
    *,
    shape: Sequence[int],
    dtype: np.dtype[Any],
    chunk_shape: Sequence[int],
    shard_shape: Sequence[int],
    fill_value: float,
    codecs: Sequence[Mapping[str, Any]],
    dimension_names: Sequence[str],
) -> dict[str, Any]:
    """Metadata of a sharded array; ``codecs`` are those of its chunks."""
    sharding = {
        "chunk_shape": list(chunk_shape),
        "codecs": list(codecs),
        "index_codecs": INDEX_CODECS,
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill_value,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": list(dimension_names),
        "attributes": {},
    }


def parse_array_json(meta: Mapping[str, Any]) -> ArrayLayout | None:
    """The layout of a zarr v3 array, ``None`` when it needs zarr-python; ValueError when the metadata are
    broken.
    """
    try:
        return _parse_array_json(meta)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"broken array metadata: {type(error).__name__}: {error}") from error


def _parse_array_json(meta: Mapping[str, Any]) -> ArrayLayout | None:
    if meta.get("zarr_format") != 3 or meta.get("node_type") != "array":
        raise ValueError("not a zarr v3 array")
    shape = whole_numbers(meta["shape"])
    codecs = list(meta["codecs"])
    if (
        meta["data_type"] not in DTYPES
        or meta["chunk_grid"]["name"] != "regular"
        or meta.get("storage_transformers")
    ):
        return None
    dtype = np.dtype(meta["data_type"])
    shard_shape = whole_numbers(meta["chunk_grid"]["configuration"]["chunk_shape"])
    chunk_shape, has_crc, at_end, is_sharded = shard_shape, True, True, False
    if [c["name"] for c in codecs] == ["sharding_indexed"]:
        config = codecs[0]["configuration"]
        chunk_shape = whole_numbers(config["chunk_shape"])
        index_names, location = (
            [c["name"] for c in config["index_codecs"]],
            config.get("index_location", "end"),
        )
        if index_names not in (["bytes", "crc32c"], ["bytes"]) or location not in {"start", "end"}:
            return None
        if config["index_codecs"][0]["configuration"]["endian"] != "little":
            return None
        is_sharded, has_crc, at_end = True, index_names[-1] == "crc32c", location == "end"
        codecs = list(config["codecs"])
    smallest = min((*shape, *shard_shape, *chunk_shape), default=0)
    if not len(shape) == len(shard_shape) == len(chunk_shape) or smallest < 1:
        raise ValueError(f"shape {shape}, shards {shard_shape}, chunks {chunk_shape}")
    if any(s % c for s, c in zip(shard_shape, chunk_shape, strict=True)):
        raise ValueError(f"shards {shard_shape} are no multiples of chunks {chunk_shape}")
    check_bounds(shape, chunk_shape, shard_shape, dtype)
    decoder = parse_codecs(codecs, chunk_shape, dtype)
    encoding = meta["chunk_key_encoding"]
    is_default = encoding["name"] == "default"
    if decoder is None or encoding["name"] not in {"default", "v2"}:
        return None
    separator = (encoding.get("configuration") or {}).get("separator", "/" if is_default else ".")
    if separator not in {"/", "."}:
        raise ValueError(f"chunk keys with separator {separator!r}")
    return ArrayLayout(
        shape=shape,
        dtype=dtype,
        chunk_shape=chunk_shape,
        shard_shape=shard_shape,
        is_sharded=is_sharded,
        index_has_crc=has_crc,
        index_at_end=at_end,
        fill_value=fill_value(meta.get("fill_value", 0), dtype),
        decoder=decoder,
        key_prefix="c" + separator if is_default else "",
        key_separator=separator,
    )


def fill_value(value: Any, dtype: np.dtype[Any]) -> Any:
    """A fill value of JSON as a number; floats may be 'NaN', 'Infinity', '-Infinity' or hexadecimal bits."""
    if isinstance(value, str):
        if value.startswith("0x"):
            return np.array(int(value, 16), dtype=f"u{dtype.itemsize}").view(dtype)[()]
        value = float(value.replace("Infinity", "inf"))
    if not isinstance(value, (int, float)):
        raise ValueError(f"fill_value {value!r}")
    if dtype.kind != "f":
        low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        if value != value or not low <= value <= high or value != int(value):
            raise ValueError(f"fill_value {value} does not fit {dtype}")
        value = int(value)
    with np.errstate(over="ignore"):
        return np.asarray(value).astype(dtype)[()]


def whole_numbers(values: Any) -> tuple[int, ...]:
    """A list of JSON as a tuple; ValueError unless all are integers."""
    if not isinstance(values, list) or not all(type(n) is int for n in values):
        raise ValueError(f"expected a list of whole numbers, got {values!r}")
    return tuple(values)


def check_bounds(
    shape: Sequence[int], chunk_shape: Sequence[int], shard_shape: Sequence[int], dtype: np.dtype[Any]
) -> None:
    """ValueError for an array larger, or with larger chunks, than images have."""
    num_px, chunk_bytes = math.prod(shape), math.prod(chunk_shape) * dtype.itemsize
    per_shard = math.prod(grid_shape(shard_shape, chunk_shape))
    num_chunks = math.prod(grid_shape(shape, shard_shape)) * per_shard
    if max(num_px, num_chunks) > MAX_LEVEL_PX:
        raise ValueError(
            f"too large: {num_px} pixels in {num_chunks} chunks, at most {MAX_LEVEL_PX} are read"
        )
    if chunk_bytes > MAX_CHUNK_BYTES:
        raise ValueError(f"too large: chunks of {chunk_bytes} bytes, at most {MAX_CHUNK_BYTES} are read")
    if per_shard > MAX_CHUNKS_PER_SHARD:
        raise ValueError(f"too large: {per_shard} chunks per shard, at most {MAX_CHUNKS_PER_SHARD} are read")


def grid_shape(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """Number of blocks along each axis that cover ``shape``."""
    return tuple(-(-n // b) for n, b in zip(shape, block, strict=True))
