"""Arrays as pyramids: numpy, dask, zarr, or whatever has a shape, a dtype and slices; a list is levels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ats_stream.errors import InputError
from ats_stream.io import ngff
from ats_stream.io.formats.parts import box_of
from ats_stream.io.layout import check_bounds
from ats_stream.io.pyramid import Pyramid
from ats_stream.io.pyramid_info import Level, PyramidInfo, axis_downsample
from ats_stream.io.sources import ArraySource, ChunkError, ChunkSource, RawChunk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ats_stream.io.sources import Place

Array = npt.NDArray[Any]
DEFAULT_AXES = {3: ("c", "y", "x"), 4: ("c", "z", "y", "x"), 5: ("c", "t", "z", "y", "x")}
SPACE_AXES = (("y", "x"), ("z", "y", "x"), ("t", "y", "x"), ("t", "z", "y", "x"))
WHERE = "array in memory"


def is_array(source: Any) -> bool:
    """Whether something is an array, or a list of arrays."""
    if isinstance(source, (list, tuple)):
        return bool(source) and all(
            is_array(level) and not isinstance(level, (list, tuple)) for level in source
        )
    return all(hasattr(source, name) for name in ("shape", "dtype", "__getitem__"))


def open_array(
    source: Any,
    *,
    axes: Sequence[str] | None,
    pixel_size_um: Sequence[float] | None,
    cache_bytes: int,
    num_threads: int,
) -> Pyramid:
    """A pyramid over one array (C, *space), or over a list of them, finest first; InputError if unfit."""
    arrays = list(source) if isinstance(source, (list, tuple)) else [source]
    top = arrays[0]
    names = tuple(axes) if axes is not None else DEFAULT_AXES.get(len(top.shape), ())
    if names[:1] != ("c",) or names[1:] not in SPACE_AXES:
        raise InputError(
            "axes of an array pyramid are c, then y x, z y x, t y x or t z y x, "
            f"got {names or 'none'} for shape {tuple(top.shape)}"
        )
    for array in arrays:
        _check(array, names, top)
    space = names[1:]
    sizes = tuple(float(s) for s in pixel_size_um) if pixel_size_um is not None else None
    if sizes is not None and (len(sizes) != len(space) or not all(s > 0 or math.isnan(s) for s in sizes)):
        raise InputError(f"pixel_size_um needs one positive number for each of {space}, got {sizes}")
    sources = [_source(array) for array in arrays]
    levels = []
    for index, level in enumerate(sources):
        factors = tuple(
            axis_downsample(a, b, 0.0) for a, b in zip(sources[0].shape[1:], level.shape[1:], strict=True)
        )
        levels.append(
            Level(
                index=index,
                shape=level.shape,
                dtype=level.dtype,
                downsample=factors,
                pixel_size_um=tuple(s * f for s, f in zip(sizes, factors, strict=True)) if sizes else None,
                chunk_shape=level.chunk_shape,
            )
        )
    channels = ngff.default_channels(sources[0].shape[0])
    info = PyramidInfo(slide=WHERE, name="array", axes=names, channels=channels, levels=tuple(levels))
    return Pyramid(info, sources, cache_bytes=cache_bytes, num_threads=num_threads)


def _check(array: Any, names: tuple[str, ...], top: Any) -> None:
    shape = tuple(array.shape)
    kind = np.dtype(array.dtype).kind
    if len(shape) != len(names) or min(shape, default=0) < 1 or kind not in "buif":
        raise InputError(
            f"an array pyramid must be numbers over {', '.join(names)}, got {array.dtype} {shape}"
        )
    if (array.dtype, shape[0]) != (top.dtype, top.shape[0]):
        raise InputError(
            f"levels differ: {array.dtype} {shape} beside {top.dtype} {tuple(top.shape)} of level 0"
        )
    if any(a > b for a, b in zip(shape, top.shape, strict=True)):
        raise InputError(f"levels must come finest first: {shape} is larger than {tuple(top.shape)}")


def _source(array: Any) -> ChunkSource:
    return ArraySource(array) if isinstance(array, np.ndarray) else LazyArraySource(array)


class LazyArraySource:
    """Chunks of an array that computes or reads its slices when asked, such as dask's and zarr's."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.shape: tuple[int, ...] = tuple(int(n) for n in array.shape)
        self.dtype = np.dtype(array.dtype).newbyteorder("=")
        # dask has the largest of its blocks as chunksize, zarr chunks; other arrays state none
        chunks = getattr(array, "chunksize", None) or getattr(array, "chunks", None)
        whole = (self.shape[0], *(min(256, n) for n in self.shape[1:]))
        self.chunk_shape: tuple[int, ...] = tuple(
            min(int(c), n) for c, n in zip(chunks or whole, self.shape, strict=True)
        )
        self.shard_shape = self.chunk_shape
        self.fill_value = self.dtype.type(0)
        try:
            check_bounds(self.shape, self.chunk_shape, self.chunk_shape, self.dtype)
        except ValueError as error:
            raise InputError(f"{WHERE}: {error}") from error

    def fetch(self, _shard: Place, /, places: Sequence[Place]) -> Iterator[RawChunk]:
        """Hand over the places alone: the array reads and computes in one go."""
        for place in places:
            yield RawChunk(place, place, 0)

    def decode(self, raw: RawChunk) -> Array:
        """Compute one chunk, cut off at the edge."""
        start, size = box_of(self, raw.place)
        try:
            part = self.array[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
            chunk = np.asarray(part, dtype=self.dtype)
        except Exception as error:  # what computes the array may raise anything
            reason = " ".join(str(error).split())
            raise ChunkError(
                f"chunk {raw.place} cannot be computed: {type(error).__name__}: {reason}"
            ) from error
        if chunk.shape != size:
            raise ChunkError(f"chunk {raw.place} has shape {chunk.shape}, expected {size}")
        return chunk
