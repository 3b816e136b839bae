"""Writing an OME-Zarr 0.5 pyramid of local files, all or nothing.

Everything goes into a sibling folder ``<target>.partial-<pid>``; the group metadata that make it a pyramid
are written last, then the folder takes the target's name. After any exception the folder is gone.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from ats_stream.errors import TargetExistsError
from ats_stream.io import ngff
from ats_stream.io.codecs import ChunkCodec
from ats_stream.io.conversion.array_writer import ArraySpec, ArrayWriter, guarded, write_json
from ats_stream.io.conversion.label_image import label_image

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

CHUNK_PX = 128
SHARD_PX = 4096
CODECS = ("zstd", "raw")
Array = npt.NDArray[Any]


class PyramidWriter:
    """Write a 2-D pyramid level by level, shard by shard; use it as a context manager.

    ``level_shapes`` holds one (C, y, x) per level, finest first; levels may differ by any factor
    (``downsamples``, per level one number or a pair y, x; by default the rounded ratio of the shapes).
    ``pixel_size_um`` is that of level 0: one number, a pair y, x, or None when unknown. ``codec`` is ``zstd``
    or ``raw``.

    Raises TargetExistsError when the target is there already (unless ``overwrite``: then it is replaced at
    the end), and StorageError, naming the file, when the system refuses to write.

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
        self.fill_value = fill_value if self.dtype.kind == "f" else int(fill_value)
        self.codec, self.codec_level = codec, codec_level
        self.name = name if name is not None else self.target.name.removesuffix(".zarr").removesuffix(".ome")
        num_channels = self.level_shapes[0][0]
        self.channels = (
            ngff.default_channels(num_channels)
            if channels is None
            else ngff.named_channels(channels, num_channels)
        )
        self.metadata = dict(metadata or {})
        self.overwrite = overwrite
        self.num_threads = num_threads or min(8, os.cpu_count() or 1)
        self.partial = self.target.with_name(f"{self.target.name}.partial-{os.getpid()}")
        self._labels: list[str] = []
        self._associated: list[str] = []
        self._pool: ThreadPoolExecutor | None = None
        self._arrays: dict[str, ArrayWriter] = {}
        self._json_bytes = 0

    def __enter__(self) -> Self:
        if not self.overwrite and os.path.lexists(self.target):
            raise TargetExistsError(f"{self.target}: exists already")
        guarded(str(self.target), self._make_partial)
        self._pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="ats-encode")
        try:
            for i, shape in enumerate(self.level_shapes):
                self._create_array(str(i), shape, "cyx", self.dtype, self.fill_value)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._close()

    @property
    def _old(self) -> Path:
        """Where a target that is replaced waits for its end."""
        return self.partial.with_name(self.partial.name.replace(".partial-", ".old-"))

    def _make_partial(self) -> None:
        """Make a folder of this process alone: one that was killed may have had the same id."""
        first = self.partial
        for number in itertools.count(1):
            if not os.path.lexists(self._old):
                try:
                    self.partial.mkdir(parents=True)
                except FileExistsError:
                    pass
                else:
                    return
            self.partial = first.with_name(f"{first.name}-{number}")

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        # after a success the folder has been renamed and nothing is left to remove
        shutil.rmtree(self.partial, ignore_errors=True)

    @property
    def stored_bytes(self) -> int:
        """Bytes written so far that are still in the pyramid."""
        return self._json_bytes + sum(a.stored_bytes for a in self._arrays.values())

    def shard_shape(self, level: int) -> tuple[int, ...]:
        """Shape (C, y, x) of the shards of a level; at the image's edge they are cut off."""
        return self._level(level).spec.shard

    def write_shard(self, level: int, shard_index: tuple[int, int], block_CYX: Array) -> int:
        """Write one whole shard (row, column), cut off at the image's edge.

        Chunks in which every pixel equals the fill value are left absent. Returns the shard's bytes, 0 when
        nothing had to be stored. ValueError when shape or dtype do not fit.
        """
        return self._level(level).write_shard((0, *shard_index), block_CYX)

    def write_chunks(self, level: int, blocks: Mapping[tuple[int, int], Array]) -> int:
        """Write single chunks (row and column in the chunk grid -> block (C, y, x)); the rest stays as it is.

        Blocks are whole chunks, or cut off at the image's edge. Chunks already in the same shards are kept.
        Returns the bytes of the shards written.
        """
        return self._level(level).write_chunks({(0, *place): block for place, block in blocks.items()})

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

        The size of its pixels is ``downsample`` times that of level 0, or ``pixel_size_um`` if given.
        ``colors`` maps values to (red, green, blue, alpha). A label image has as many levels as its image, as
        validators ask: each is coarser by two than the one before, a pixel being the largest value under it.
        """
        kind = mask_YX.dtype.kind
        if mask_YX.ndim != 2 or kind not in "biu" or name in self._labels or not _is_name(name):
            raise ValueError(
                f"label {name!r} must be new, a file name, and an integer (y, x) mask; "
                f"got {mask_YX.dtype} {mask_YX.shape}"
            )
        factors = _pair(downsample)
        if pixel_size_um is not None and self.pixel_size_um is not None:
            factors = tuple(p / s for p, s in zip(_pair(pixel_size_um), self.pixel_size_um, strict=True))
        levels, attributes = label_image(
            name,
            mask_YX,
            len(self.level_shapes),
            factors=factors,
            pixel_size_um=self.pixel_size_um,
            colors=colors,
        )
        for path, level_YX in enumerate(levels):
            array = self._create_array(f"labels/{name}/{path}", level_YX.shape, "yx", level_YX.dtype, 0)
            array.write_all(level_YX)
        self._write_group(f"labels/{name}", attributes)
        self._labels.append(name)

    def write_associated(self, name: str, image_CYX: Array) -> None:
        """Add a small picture (C, y, x) outside of the pyramid: an image ``associated/<name>``."""
        if image_CYX.ndim != 3 or not _is_name(name):
            raise ValueError(
                f"associated image {name!r} must be (C, y, x) with a file name: {image_CYX.shape}"
            )
        folder = f"associated/{name}"
        self._create_array(f"{folder}/0", image_CYX.shape, "cyx", image_CYX.dtype, 0).write_all(image_CYX)
        self._write_group(folder, ngff.build_picture(name, image_CYX.shape[0]))
        self._associated.append(name)

    def _level(self, level: int) -> ArrayWriter:
        if self._pool is None:
            raise ValueError("PyramidWriter writes only inside its 'with' block")
        if not 0 <= level < len(self.level_shapes):
            raise ValueError(f"no level {level}, there are {len(self.level_shapes)}")
        return self._arrays[str(level)]

    def _create_array(
        self, path: str, shape: Sequence[int], axes: str, dtype: np.dtype[Any], fill_value: float
    ) -> ArrayWriter:
        if self._pool is None:
            raise ValueError("PyramidWriter writes only inside its 'with' block")
        spec = ArraySpec.square(
            shape=tuple(shape),
            dtype=dtype,
            axes=axes,
            chunk_px=self.chunk_px,
            shard_px=self.shard_px,
            fill_value=fill_value,
            codec=ChunkCodec(name=self.codec, level=self.codec_level),
        )
        self._arrays[path] = ArrayWriter(self.partial / path, f"{self.target}/{path}", spec, self._pool)
        return self._arrays[path]

    def _write_group(self, folder: str, attributes: Mapping[str, Any]) -> None:
        path = Path(folder) / "zarr.json"
        content = ngff.group_json(attributes)
        self._json_bytes += write_json(self.partial / path, str(self.target / path), content)

    def _finish(self) -> None:
        if self._labels:
            self._write_group("labels", ngff.build_labels_group(self._labels))
        if self._associated:
            self._write_group("associated", ngff.build_associated_group(self._associated))
        value_range = (0.0, float(np.iinfo(self.dtype).max) if self.dtype.kind in "iu" else 1.0)
        attributes = ngff.build_image(
            name=self.name,
            axes="cyx",
            paths=[str(i) for i in range(len(self.level_shapes))],
            downsamples=self.downsamples,
            pixel_size_um=self.pixel_size_um,
            channels=self.channels,
            value_range=value_range,
            metadata=self.metadata,
        )
        self._write_group("", attributes)
        guarded(str(self.target), self._take_name)

    def _take_name(self) -> None:
        old = self._old
        if os.path.lexists(self.target):
            if not self.overwrite:
                raise TargetExistsError(f"{self.target}: exists already")
            self.target.rename(old)
        self.partial.rename(self.target)
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)


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
        return [
            tuple(max(1, round(a / b)) for a, b in zip(shapes[0][1:], s[1:], strict=True)) for s in shapes
        ]
    if len(given) != len(shapes):
        raise ValueError(f"{len(given)} downsamples for {len(shapes)} levels")
    return [_pair(f) for f in given]


def _check(
    shapes: Sequence[tuple[int, ...]],
    chunk_px: int,
    shard_px: int,
    codec: str,
    dtype: np.dtype[Any],
    fill_value: float,
) -> None:
    if not shapes or any(len(s) != 3 or min(s) < 1 or s[0] != shapes[0][0] for s in shapes):
        raise ValueError(f"level_shapes must be (C, y, x) of equal C, got {list(shapes)}")
    if any(a < b for big, small in itertools.pairwise(shapes) for a, b in zip(big, small, strict=True)):
        raise ValueError(f"level_shapes must go from fine to coarse, got {list(shapes)}")
    if chunk_px < 1 or shard_px < 1 or shard_px % chunk_px:
        raise ValueError(f"shard_px must be a multiple of chunk_px, got {shard_px} and {chunk_px}")
    if codec not in CODECS:
        raise ValueError(f"codec must be one of {CODECS}, got {codec!r}")
    if dtype.kind not in "iuf":
        raise ValueError(f"dtype must be integer or floating, got {dtype}")
    limits = np.iinfo(dtype) if dtype.kind != "f" else None
    if limits is not None and not (limits.min <= fill_value <= limits.max and fill_value == int(fill_value)):
        raise ValueError(f"fill_value {fill_value} does not fit dtype {dtype}")
