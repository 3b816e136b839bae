"""Writing one sharded zarr v3 array of local files, shard by shard or chunk by chunk."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from ats_stream.errors import AtsStreamError, StorageError
from ats_stream.io.layout import build_array_json, grid_shape
from ats_stream.io.shard import ABSENT, encode_shard_parts, parse_index

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from concurrent.futures import Executor
    from pathlib import Path

    from ats_stream.io.codecs import ChunkCodec

Array = npt.NDArray[Any]
Result = TypeVar("Result")
# what POSIX systems write with one call
_MAX_PARTS = 1024


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> int:
    """Write the parts to a file one after another, many with one call; return the bytes written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = [part for part in parts if part]
    waiting.reverse()
    num_bytes = 0
    with path.open("wb", buffering=0) as file:
        while waiting:
            written = os.writev(file.fileno(), waiting[: -_MAX_PARTS - 1 : -1])
            num_bytes += written
            while waiting and written >= len(waiting[-1]):
                written -= len(waiting.pop())
            if written:  # a disk that is full takes some of it before it says so
                waiting[-1] = waiting[-1][written:]
    return num_bytes


def guarded(shown: str, action: Callable[[], Result]) -> Result:
    """Run an action on the file shown; what the system refuses becomes a StorageError with its name and
    reason.
    """
    try:
        return action()
    except AtsStreamError:
        raise
    except OSError as error:
        raise StorageError(f"{shown}: cannot write: {error.strerror or error}") from error


def write_json(path: Path, shown: str, content: Mapping[str, Any]) -> int:
    """Write a JSON file; return its bytes."""
    data = json.dumps(content, indent=1).encode()
    return guarded(shown, lambda: write_parts(path, [data]))


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """Shape, cut and encoding of an array in the making."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axes: str
    chunk: tuple[int, ...]
    shard: tuple[int, ...]
    """A multiple of ``chunk``, which may reach past the array."""
    fill_value: float
    codec: ChunkCodec

    def __post_init__(self) -> None:
        sizes = (self.axes, self.shape, self.chunk, self.shard)
        if len({len(s) for s in sizes}) != 1 or any(
            c < 1 or s < c or s % c for s, c in zip(self.shard, self.chunk, strict=True)
        ):
            raise ValueError(
                f"shards {self.shard} must be multiples of chunks {self.chunk} of {self.axes} {self.shape}"
            )

    @classmethod
    def square(
        cls,
        *,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        axes: str,
        chunk_px: int,
        shard_px: int,
        fill_value: float,
        codec: ChunkCodec,
    ) -> ArraySpec:
        """Chunks of ``chunk_px`` along y and x, of everything along the others; shards of ``shard_px``, no
        wider than the image: small levels do not carry the index of a large shard.
        """
        chunk = tuple(chunk_px if a in "yx" else n for a, n in zip(axes, shape, strict=True))
        cover = [g * c for g, c in zip(grid_shape(shape, chunk), chunk, strict=True)]
        shard = tuple(min(shard_px, n) if a in "yx" else n for a, n in zip(axes, cover, strict=True))
        return cls(
            shape=shape, dtype=dtype, axes=axes, chunk=chunk, shard=shard, fill_value=fill_value, codec=codec
        )

    @property
    def grid(self) -> tuple[int, ...]:
        """Chunks per shard."""
        return grid_shape(self.shard, self.chunk)

    def metadata(self) -> dict[str, Any]:
        """The array's ``zarr.json``."""
        return build_array_json(
            shape=self.shape,
            dtype=self.dtype,
            chunk_shape=self.chunk,
            shard_shape=self.shard,
            fill_value=self.fill_value,
            codecs=self.codec.metadata(self.chunk, self.dtype.itemsize),
            dimension_names=list(self.axes),
        )


def encode_block(spec: ArraySpec, block: Array, pool: Executor | None = None) -> dict[tuple[int, ...], bytes]:
    """The chunks of a shard (place in its grid -> data) from its pixels, cut off at the array's edge; those
    of nothing but the fill value are left out.
    """
    places = list(np.ndindex(*grid_shape(block.shape, spec.chunk)))
    run = map if pool is None else pool.map
    encoded = run(lambda place: encode_chunk(spec, block[_box(place, spec.chunk)]), places)
    return {place: data for place, data in zip(places, encoded, strict=True) if data}


def encode_chunk(spec: ArraySpec, block: Array) -> bytes:
    """Encoded chunk, padded at the edge; empty when every pixel equals the fill value."""
    if block[(0,) * block.ndim] == spec.fill_value and bool((block == spec.fill_value).all()):
        return b""
    if block.shape != spec.chunk:
        missing = [(0, c - n) for c, n in zip(spec.chunk, block.shape, strict=True)]
        # an edge inside of a block of JPEG would ring into the image
        block = (
            np.pad(block, missing, mode="edge")
            if spec.codec.jpeg is not None
            else np.pad(block, missing, constant_values=spec.fill_value)
        )
    return spec.codec.encode(block)


class ArrayWriter:
    """Files of one array in ``folder``; errors name them under ``shown``, the folder's final place.

    Chunks are encoded in ``pool``. ``stored_bytes`` counts what lies in the files.
    """

    def __init__(self, folder: Path, shown: str, spec: ArraySpec, pool: Executor) -> None:
        self.folder, self.shown, self.spec, self._pool = folder, shown, spec, pool
        self.stored_bytes = write_json(folder / "zarr.json", f"{shown}/zarr.json", spec.metadata())

    def write_all(self, array: Array) -> None:
        """Write an array that is in memory as a whole."""
        for shard in np.ndindex(*grid_shape(self.spec.shape, self.spec.shard)):
            self.write_shard(shard, array[_box(shard, self.spec.shard)])

    def write_shard(self, shard: tuple[int, ...], block: Array) -> int:
        """Write a whole shard, cut off at the array's edge; return its bytes, 0 when none were needed."""
        spec = self.spec
        expected = tuple(min(s, n - i * s) for i, s, n in zip(shard, spec.shard, spec.shape, strict=True))
        if block.shape != expected or block.dtype != spec.dtype:
            raise ValueError(
                f"shard {shard} of {self.shown} must be {spec.dtype} {expected}, "
                f"got {block.dtype} {block.shape}"
            )
        return self._write(shard, encode_block(spec, block, self._pool))

    def write_encoded(self, shard: tuple[int, ...], chunks: Mapping[tuple[int, ...], bytes]) -> int:
        """Write a whole shard of chunks that are encoded already (place in its grid -> data); return its
        bytes, 0 when there are no chunks.
        """
        return self._write(shard, chunks)

    def write_chunks(self, blocks: Mapping[tuple[int, ...], Array]) -> int:
        """Write single chunks, whole or cut off at the edge; the others stay. Return the bytes of their
        shards.
        """
        for place, block in blocks.items():
            self._check_chunk(place, block)
        encoded = zip(blocks, self._pool.map(partial(encode_chunk, self.spec), blocks.values()), strict=True)
        shards: dict[tuple[int, ...], dict[tuple[int, ...], bytes]] = {}
        for place, data in encoded:
            shard = tuple(p // g for p, g in zip(place, self.spec.grid, strict=True))
            inner = tuple(p % g for p, g in zip(place, self.spec.grid, strict=True))
            shards.setdefault(shard, {})[inner] = data
        num_bytes = 0
        for shard, chunks in shards.items():
            merged = self._stored(shard) | chunks
            num_bytes += self._write(shard, {place: data for place, data in merged.items() if data})
        return num_bytes

    def _check_chunk(self, place: Sequence[int], block: Array) -> None:
        spec = self.spec
        extent = tuple(min(c, n - p * c) for p, c, n in zip(place, spec.chunk, spec.shape, strict=True))
        if min(place) < 0 or min(extent) < 1:
            raise ValueError(f"chunk {tuple(place)} lies outside of {self.shown}, which is {spec.shape}")
        if block.shape not in (spec.chunk, extent) or block.dtype != spec.dtype:
            raise ValueError(
                f"chunk {tuple(place)} of {self.shown} must be {spec.dtype} {spec.chunk}, "
                f"got {block.dtype} {block.shape}"
            )

    def _path(self, shard: Sequence[int]) -> tuple[Path, str]:
        parts = ("c", *map(str, shard))
        return self.folder.joinpath(*parts), "/".join((self.shown, *parts))

    def _write(self, shard: Sequence[int], chunks: Mapping[tuple[int, ...], bytes]) -> int:
        path, shown = self._path(shard)
        self.stored_bytes -= path.stat().st_size if path.exists() else 0
        if not chunks:
            path.unlink(missing_ok=True)
            return 0
        num_bytes = guarded(shown, lambda: write_parts(path, encode_shard_parts(chunks, self.spec.grid)))
        self.stored_bytes += num_bytes
        return num_bytes

    def _stored(self, shard: Sequence[int]) -> dict[tuple[int, ...], bytes]:
        """Encoded chunks that the shard's file holds already."""
        path, shown = self._path(shard)
        if not path.exists():
            return {}
        data = guarded(shown, path.read_bytes)
        index = parse_index(data, self.spec.grid)
        chunks = {}
        for place in map(tuple, np.argwhere(index[..., 0] != ABSENT).tolist()):
            offset, nbytes = index[place].tolist()
            chunks[place] = data[offset : offset + nbytes]
        return chunks


def _box(place: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(p * s, (p + 1) * s) for p, s in zip(place, size, strict=True))
