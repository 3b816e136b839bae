"""Writing an OME-Zarr 0.5 pyramid of local files, all or nothing.

Everything goes into a sibling folder ``<target>.partial-<pid>``; the group metadata that make it a pyramid are written
last, then the folder takes the target's name. After any exception the folder is gone.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ats_stream.errors import StorageError, TargetExistsError
from ats_stream.io import ngff
from ats_stream.io.codecs import encode_chunk
from ats_stream.io.layout import build_array_json
from ats_stream.io.reduce import halve_labels
from ats_stream.io.shard import ABSENT, encode_shard_parts, parse_index

CHUNK_PX = 128
SHARD_PX = 4096
CODECS = ("zstd", "raw")
Array = npt.NDArray[Any]


def write_parts(path: Path, parts: Iterable[bytes]) -> int:
    """Write the parts to a file one after another; return the bytes written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = 0
    with path.open("wb") as file:
        for part in parts:
            num_bytes += file.write(part)
    return num_bytes


@dataclass(frozen=True, kw_only=True)
class _LevelSpec:
    """One array in the making: where it lies and how it is cut."""

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk: tuple[int, ...]
    shard: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(s // c for s, c in zip(self.shard, self.chunk, strict=True))

    def path(self, shard: Sequence[int]) -> Path:
        return self.folder.joinpath("c", *map(str, shard))


class PyramidWriter:
    """Write a 2-D pyramid level by level, shard by shard; use it as a context manager.

    ``level_shapes`` holds one (C, y, x) per level, finest first; levels may differ by any factor (``downsamples``, per
    level one number or a pair y, x; by default the rounded ratio of the shapes). ``pixel_size_um`` is that of level 0,
    one number, a pair y, x, or None when unknown. ``codec`` is ``zstd`` or ``raw``.

    Raises TargetExistsError when the target is there already (unless ``overwrite``: then it is replaced at the end), and
    StorageError, naming the file, when the system refuses to write.

    >>> with PyramidWriter(path, level_shapes=[(3, 512, 512)], dtype="uint8") as writer:  # doctest: +SKIP
    ...     writer.write_shard(0, (0, 0), pixels_CYX)
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        *,
        level_shapes: Sequence[Sequence[int]],
        dtype: npt.DTypeLike,
        downsamples: Sequence[float | Sequence[float]] | None = None,
        pixel_size_um: float | Sequence[float] | None = None,
        chunk_px: int = CHUNK_PX,
        shard_px: int = SHARD_PX,
        fill_value: float = 0,
        codec: str = "zstd",
        codec_level: int = 1,
        name: str | None = None,
        channels: Sequence[ngff.Channel | str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        num_threads: int | None = None,
    ) -> None:
        self.target = Path(target)
        self.dtype = np.dtype(dtype)
        self.level_shapes = [tuple(int(n) for n in shape) for shape in level_shapes]
        _check(self.level_shapes, chunk_px, shard_px, codec, self.dtype, fill_value)
        self.pixel_size_um = _pair(pixel_size_um) if pixel_size_um is not None else None
        self.downsamples = _downsamples(self.level_shapes, downsamples)
        self.chunk_px, self.shard_px = chunk_px, shard_px
        self.fill_value, self.codec, self.codec_level = fill_value, codec, codec_level
        self.name = name if name is not None else self.target.name.removesuffix(".zarr").removesuffix(".ome")
        self.channels = _channels(channels, self.level_shapes[0][0])
        self.metadata = dict(metadata or {})
        self.overwrite = overwrite
        self.num_threads = num_threads or min(8, os.cpu_count() or 1)
        self.partial = self.target.with_name(f"{self.target.name}.partial-{os.getpid()}")
        self.stored_bytes = 0
        self._labels: list[str] = []
        self._pool: ThreadPoolExecutor | None = None
        self._levels: list[_LevelSpec] = []

    def __enter__(self) -> Self:
        if not self.overwrite and os.path.lexists(self.target):
            raise TargetExistsError(f"{self.target}: exists already")
        self._guard(self.partial, lambda: self.partial.mkdir(parents=True))
        try:
            self._levels = [
                self._create_array(str(i), shape, "cyx") for i, shape in enumerate(self.level_shapes)
            ]
        except BaseException:
            shutil.rmtree(self.partial, ignore_errors=True)
            raise
        self._pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="ats-encode")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._pool is not None:
                self._pool.shutdown(wait=True, cancel_futures=True)
            if kind is None:
                self._finish()
        finally:
            # after a success the folder has been renamed and nothing is left to remove
            shutil.rmtree(self.partial, ignore_errors=True)

    def write_shard(self, level: int, shard_index: tuple[int, int], block_CYX: Array) -> int:
        """Write one whole shard (cut off at the image's edge); return its bytes, 0 when all of it equals the fill value."""
        spec = self._levels[level]
        shard = (0, *shard_index)
        expected = _shard_extent(spec, shard)
        if block_CYX.shape != expected or block_CYX.dtype != self.dtype:
            raise ValueError(
                f"shard {shard_index} of level {level} must be {self.dtype} {expected}, got {_say(block_CYX)}"
            )
        return self._write_dense(spec, shard, block_CYX)

    def write_chunks(self, level: int, blocks: Mapping[tuple[int, int], Array]) -> int:
        """Write single chunks (row and column in the chunk grid -> block (C, y, x)), the rest stays as it is.

        Blocks are whole chunks, or cut off at the image's edge. Chunks already in the same shards are kept. Returns the
        bytes of the shards written.
        """
        spec = self._levels[level]
        places = {(0, *place): block for place, block in blocks.items()}
        for place, block in places.items():
            _check_chunk(spec, place, block)
        encoded = zip(places, self._map(lambda b: self._encode(spec, b), places.values()), strict=True)
        shards: dict[tuple[int, ...], dict[tuple[int, ...], bytes]] = {}
        for place, data in encoded:
            shard = tuple(p // g for p, g in zip(place, spec.grid, strict=True))
            inner = tuple(p % g for p, g in zip(place, spec.grid, strict=True))
            shards.setdefault(shard, {})[inner] = data
        num_bytes = 0
        for shard, chunks in shards.items():
            merged = self._stored_chunks(spec, shard) | chunks
            num_bytes += self._write_encoded(spec, shard, {k: v for k, v in merged.items() if v})
        return num_bytes

    def write_label(
        self,
        name: str,
        mask_YX: Array,
        *,
        downsample: float | Sequence[float] = 1,
        pixel_size_um: float | Sequence[float] | None = None,
        colors: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        """Add an integer mask (y, x) as the label image ``name``; bool is stored as uint8.

        The size of its pixels is ``downsample`` times that of level 0, or ``pixel_size_um`` if given. ``colors`` maps
        values to (red, green, blue, alpha).
        """
        mask_YX = mask_YX.astype(np.uint8) if mask_YX.dtype == bool else mask_YX
        if mask_YX.ndim != 2 or mask_YX.dtype.kind not in "iu" or name in self._labels or not _is_name(name):
            raise ValueError(
                f"label {name!r} must be new, a file name, and an integer (y, x) mask; got {_say(mask_YX)}"
            )
        factors = _pair(downsample)
        if pixel_size_um is not None and self.pixel_size_um is not None:
            factors = tuple(p / s for p, s in zip(_pair(pixel_size_um), self.pixel_size_um, strict=True))
        image_label: dict[str, Any] = {"version": ngff.VERSION, "source": {"image": "../../"}}
        if colors:
            image_label["colors"] = [{"label-value": int(v), "rgba": list(c)} for v, c in colors.items()]
        folder = f"labels/{name}"
        # a label image has as many levels as its image: each next one is coarser by two than the one before
        paths = [str(i) for i in range(len(self.level_shapes))]
        for path in paths:
            self._write_array(f"{folder}/{path}", mask_YX, "yx")
            mask_YX = halve_labels(mask_YX)
        attributes = ngff.build_image(
            name=name,
            axes="yx",
            paths=paths,
            downsamples=[tuple(f * 2**i for f in factors) for i in range(len(paths))],
            pixel_size_um=self.pixel_size_um,
            image_label=image_label,
        )
        self._write_json(self.partial / folder / "zarr.json", ngff.group_json(attributes))
        self._labels.append(name)

    def write_associated(self, name: str, image_CYX: Array) -> None:
        """Add a small picture (C, y, x) of its own, outside the pyramid, as an image ``associated/<name>``."""
        if image_CYX.ndim != 3 or not _is_name(name):
            raise ValueError(
                f"associated image {name!r} must be (C, y, x) with a file name, got {_say(image_CYX)}"
            )
        self._write_array(f"associated/{name}/0", image_CYX, "cyx")
        attributes = ngff.build_image(
            name=name,
            axes="cyx",
            paths=["0"],
            downsamples=[(1, 1)],
            pixel_size_um=None,
            channels=ngff.default_channels(image_CYX.shape[0]),
        )
        self._write_json(self.partial / "associated" / name / "zarr.json", ngff.group_json(attributes))
        self._write_json(self.partial / "associated" / "zarr.json", ngff.group_json({}))

    def _create_array(
        self, path: str, shape: Sequence[int], axes: str, dtype: np.dtype[Any] | None = None
    ) -> _LevelSpec:
        dtype = self.dtype if dtype is None else dtype
        chunk = tuple(self.chunk_px if a in "yx" else n for a, n in zip(axes, shape, strict=True))
        # no wider than the image, so that small levels do not carry the index of a large shard
        cover = tuple(math.ceil(n / c) * c for n, c in zip(shape, chunk, strict=True))
        shard = tuple(min(self.shard_px, n) if a in "yx" else n for a, n in zip(axes, cover, strict=True))
        spec = _LevelSpec(
            folder=self.partial / path, shape=tuple(shape), dtype=dtype, chunk=chunk, shard=shard
        )
        meta = build_array_json(
            shape=shape,
            dtype=dtype,
            chunk_shape=chunk,
            shard_shape=shard,
            fill_value=self._fill(dtype),
            codec=self.codec,
            codec_level=self.codec_level,
            dimension_names=list(axes),
        )
        self._write_json(spec.folder / "zarr.json", meta)
        return spec

    def _write_array(self, path: str, array: Array, axes: str) -> None:
        """Write a whole array that is in memory."""
        spec = self._create_array(path, array.shape, axes, array.dtype)
        for shard in np.ndindex(*(math.ceil(n / s) for n, s in zip(spec.shape, spec.shard, strict=True))):
            start = [i * s for i, s in zip(shard, spec.shard, strict=True)]
            self._write_dense(
                spec, shard, array[tuple(slice(a, a + s) for a, s in zip(start, spec.shard, strict=True))]
            )

    def _fill(self, dtype: np.dtype[Any]) -> float:
        """Labels and associated pictures have a dtype of their own; for them the fill value is 0."""
        return (
            self.fill_value
            if dtype == self.dtype and dtype.kind == "f"
            else int(self.fill_value) * (dtype == self.dtype)
        )

    def _write_dense(self, spec: _LevelSpec, shard: Sequence[int], block: Array) -> int:
        places = list(np.ndindex(*(math.ceil(n / c) for n, c in zip(block.shape, spec.chunk, strict=True))))

        def encode_at(place: tuple[int, ...]) -> bytes:
            start = [p * c for p, c in zip(place, spec.chunk, strict=True)]
            return self._encode(
                spec, block[tuple(slice(a, a + c) for a, c in zip(start, spec.chunk, strict=True))]
            )

        encoded = zip(places, self._map(encode_at, places), strict=True)
        return self._write_encoded(spec, shard, {place: data for place, data in encoded if data})

    def _map(self, task: Callable[[Any], bytes], items: Iterable[Any]) -> Iterable[bytes]:
        if self._pool is None:
            raise ValueError("PyramidWriter writes only inside its 'with' block")
        return self._pool.map(task, items)

    def _encode(self, spec: _LevelSpec, block: Array) -> bytes:
        """Encoded chunk, empty when every pixel equals the fill value."""
        fill = self._fill(spec.dtype)
        if block.flat[0] == fill and bool((block == fill).all()):
            return b""
        if block.shape != spec.chunk:
            whole = np.full(spec.chunk, fill, dtype=spec.dtype)
            whole[tuple(slice(0, n) for n in block.shape)] = block
            block = whole
        little = spec.dtype.newbyteorder("<")
        return encode_chunk(np.ascontiguousarray(block, dtype=little), self.codec, self.codec_level)

    def _write_encoded(
        self, spec: _LevelSpec, shard: Sequence[int], chunks: Mapping[tuple[int, ...], bytes]
    ) -> int:
        path = spec.path(shard)
        old_bytes = path.stat().st_size if path.exists() else 0
        if not chunks:
            path.unlink(missing_ok=True)
            self.stored_bytes -= old_bytes
            return 0
        num_bytes: int = self._guard(path, lambda: write_parts(path, encode_shard_parts(chunks, spec.grid)))
        self.stored_bytes += num_bytes - old_bytes
        return num_bytes

    def _stored_chunks(self, spec: _LevelSpec, shard: Sequence[int]) -> dict[tuple[int, ...], bytes]:
        path = spec.path(shard)
        if not path.exists():
            return {}
        data = self._guard(path, path.read_bytes)
        index = parse_index(data, spec.grid)
        present = np.argwhere(index[..., 0] != ABSENT)
        return {tuple(int(i) for i in p): _cut(data, *index[tuple(p)].tolist()) for p in present}

    def _write_json(self, path: Path, content: Mapping[str, Any]) -> None:
        data = json.dumps(content, indent=1).encode()
        self.stored_bytes += self._guard(path, lambda: write_parts(path, [data]))

    def _guard(self, path: Path, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            shown = self.target / path.relative_to(self.partial) if path != self.partial else self.target
            raise StorageError(f"{shown}: cannot write: {error.strerror or error}") from error

    def _finish(self) -> None:
        if self._labels:
            self._write_json(
                self.partial / "labels" / "zarr.json", ngff.group_json(ngff.build_labels_group(self._labels))
            )
        limits = (0, np.iinfo(self.dtype).max) if self.dtype.kind in "iu" else (0.0, 1.0)
        attributes = ngff.build_image(
            name=self.name,
            axes="cyx",
            paths=[str(i) for i in range(len(self.level_shapes))],
            downsamples=self.downsamples,
            pixel_size_um=self.pixel_size_um,
            channels=self.channels,
            value_range=(float(limits[0]), float(limits[1])),
            metadata=self.metadata,
        )
        self._write_json(self.partial / "zarr.json", ngff.group_json(attributes))
        self._guard(self.partial, self._take_name)

    def _take_name(self) -> None:
        old = self.target.with_name(f"{self.target.name}.old-{os.getpid()}")
        if os.path.lexists(self.target):
            if not self.overwrite:
                raise TargetExistsError(f"{self.target}: exists already")
            self.target.rename(old)
        self.partial.rename(self.target)
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)


def _cut(data: bytes, offset: int, nbytes: int) -> bytes:
    return data[offset : offset + nbytes]


def _shard_extent(spec: _LevelSpec, shard: Sequence[int]) -> tuple[int, ...]:
    return tuple(min(s, n - i * s) for i, s, n in zip(shard, spec.shard, spec.shape, strict=True))


def _check_chunk(spec: _LevelSpec, place: Sequence[int], block: Array) -> None:
    extent = tuple(min(c, n - p * c) for p, c, n in zip(place, spec.chunk, spec.shape, strict=True))
    if min(place) < 0 or min(extent) < 1:
        raise ValueError(f"chunk {tuple(place[1:])} lies outside the level {spec.shape}")
    if block.shape not in (spec.chunk, extent) or block.dtype != spec.dtype:
        raise ValueError(f"chunk {tuple(place[1:])} must be {spec.dtype} {spec.chunk}, got {_say(block)}")


def _say(array: Array) -> str:
    return f"{array.dtype} {array.shape}"


def _is_name(name: str) -> bool:
    return bool(name) and not name.startswith((".", "__")) and "/" not in name and "\\" not in name


def _pair(value: float | Sequence[float]) -> tuple[float, ...]:
    pair = (float(value),) * 2 if isinstance(value, (int, float)) else tuple(float(v) for v in value)
    if len(pair) != 2 or not all(0 < v < math.inf for v in pair):
        raise ValueError(f"one positive number or a pair (y, x) expected, got {value!r}")
    return pair


def _downsamples(
    shapes: Sequence[tuple[int, ...]], given: Sequence[float | Sequence[float]] | None
) -> list[tuple[float, ...]]:
    if given is None:
        return [tuple(round(a / b) or 1 for a, b in zip(shapes[0][1:], s[1:], strict=True)) for s in shapes]
    if len(given) != len(shapes):
        raise ValueError(f"{len(given)} downsamples for {len(shapes)} levels")
    return [_pair(f) for f in given]


def _channels(given: Sequence[ngff.Channel | str] | None, num_channels: int) -> tuple[ngff.Channel, ...]:
    if given is None:
        return ngff.default_channels(num_channels)
    if len(given) != num_channels:
        raise ValueError(f"{len(given)} channel names for {num_channels} channels")
    defaults = ngff.default_channels(num_channels)
    return tuple(
        c if isinstance(c, ngff.Channel) else ngff.Channel(label=c, color=d.color)
        for c, d in zip(given, defaults, strict=True)
    )


def _check(
    shapes: Sequence[tuple[int, ...]],
    chunk_px: int,
    shard_px: int,
    codec: str,
    dtype: np.dtype[Any],
    fill: float,
) -> None:
    if not shapes or any(len(s) != 3 or min(s) < 1 or s[0] != shapes[0][0] for s in shapes):
        raise ValueError(f"level_shapes must be (C, y, x) of equal C, got {list(shapes)}")
    if any(
        a < b for big, small in zip(shapes, shapes[1:], strict=False) for a, b in zip(big, small, strict=True)
    ):
        raise ValueError(f"level_shapes must go from fine to coarse, got {list(shapes)}")
    if chunk_px < 1 or shard_px < 1 or shard_px % chunk_px:
        raise ValueError(f"shard_px must be a multiple of chunk_px, got {shard_px} and {chunk_px}")
    if codec not in CODECS:
        raise ValueError(f"codec must be one of {CODECS}, got {codec!r}")
    if dtype.kind not in "iuf" or (dtype.kind != "f" and np.array(fill).astype(dtype) != fill):
        raise ValueError(f"fill_value {fill} does not fit dtype {dtype}")
