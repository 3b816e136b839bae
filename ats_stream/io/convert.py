"""Slides and arrays to OME-Zarr pyramids in one pass over their pixels.

Levels are halved until they fit in 256 pixels. Work goes depth first through a tree of shards: a shard of a
level is put together from the halves of the four under it, so at most one unfinished shard per level is in
memory, whatever the size of the slide. Shape letters: C channels, Y rows, X columns.
"""

from __future__ import annotations

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ats_stream.errors import AtsStreamError, InputError, StorageError
from ats_stream.io.layout import grid_shape
from ats_stream.io.reduce import halve
from ats_stream.io.slides import ArraySlide, associated_images, open_slide
from ats_stream.io.tissue import tissue_level, tissue_mask
from ats_stream.io.writer import CHUNK_PX, CODECS, SHARD_PX, PyramidWriter

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ats_stream.io.ngff import Channel
    from ats_stream.io.slides import SlideSource

Array = npt.NDArray[Any]
SUFFIX = ".ome.zarr"


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """How pyramids are written."""

    chunk_px: int = CHUNK_PX
    """Side of the chunks that are decoded at once."""
    shard_px: int = SHARD_PX
    """Side of the files' content; an even multiple of chunk_px. Memory goes with its square."""
    codec: str = "zstd"
    """``zstd`` or ``raw``."""
    codec_level: int = 1
    """Effort of zstd, 1 to 22."""
    coarsest_px: int = 256
    """Levels are added until the longer side is no larger."""
    tissue: bool = True
    """Whether to store the mask ``labels/tissue``."""
    keep_associated: bool = False
    """Whether to copy label, macro and thumbnail pictures, which may show names."""
    pixel_size_um: float | None = None
    """Overrides the pixel size that the slide states."""
    overwrite: bool = False
    """Whether to replace a target that exists."""
    num_threads: int | None = None
    """Threads that encode; by default one per core, at most 8."""

    def __post_init__(self) -> None:
        if self.chunk_px < 1:
            raise ValueError(f"chunk_px must be positive, got {self.chunk_px}")
        if self.shard_px < 2 or self.shard_px % self.chunk_px or self.shard_px % 2:
            raise ValueError(
                f"shard_px must be an even multiple of chunk_px={self.chunk_px}, got {self.shard_px}"
            )
        if self.codec not in CODECS:
            raise ValueError(f"codec must be one of {CODECS}, got {self.codec!r}")
        if not 1 <= self.codec_level <= 22:
            raise ValueError(f"codec_level must be 1 to 22, got {self.codec_level}")
        if self.coarsest_px < 1:
            raise ValueError(f"coarsest_px must be positive, got {self.coarsest_px}")
        if self.pixel_size_um is not None and not 0 < self.pixel_size_um < math.inf:
            raise ValueError(f"pixel_size_um must be positive, got {self.pixel_size_um}")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads must be positive, got {self.num_threads}")


@dataclass(frozen=True, kw_only=True)
class ConvertSummary:
    """What one conversion did; prints as one line."""

    source: str
    target: Path
    name: str
    shape: tuple[int, int, int]
    num_levels: int
    pixel_size_um: tuple[float, float] | None
    seconds: float
    source_bytes: int
    stored_bytes: int
    tissue_share: float | None

    ok = True

    def __str__(self) -> str:
        _, height, width = self.shape
        size = (
            f"{math.sqrt(math.prod(self.pixel_size_um)):.3g} um/px" if self.pixel_size_um else "um/px unknown"
        )
        tissue = f", tissue {self.tissue_share:.1%}" if self.tissue_share is not None else ""
        speed = height * width / 1e6 / max(self.seconds, 1e-9)
        return (
            f"{self.name}: {width} x {height}, {self.num_levels} levels, {size}, {speed:.1f} MPix/s, "
            f"{self.source_bytes / 1e6:.1f} -> {self.stored_bytes / 1e6:.1f} MB{tissue}"
        )


@dataclass(frozen=True, kw_only=True)
class ConvertFailure:
    """A slide that was not converted, and why; prints as one line."""

    source: str
    reason: str

    ok = False

    def __str__(self) -> str:
        return (
            f"failed: {self.reason}"
            if self.source in self.reason
            else f"failed: {self.source}: {self.reason}"
        )


def pyramid_shapes(shape: Sequence[int], coarsest_px: int) -> list[tuple[int, int, int]]:
    """Shapes of all levels, each half the one before, rounded up.

    >>> pyramid_shapes((3, 1000, 601), 256)
    [(3, 1000, 601), (3, 500, 301), (3, 250, 151)]
    """
    channels, height, width = shape
    shapes = [(channels, height, width)]
    while max(height, width) > coarsest_px:
        height, width = -(-height // 2), -(-width // 2)
        shapes.append((channels, height, width))
    return shapes


def working_memory_bytes(shape: Sequence[int], dtype: npt.DTypeLike, config: ConvertConfig) -> int:
    """Upper bound of what a conversion holds, apart from the libraries and what reading a region takes.

    One shard in the making per level, one more being read, sums of twice the width while halving, encoded
    chunks, and the view from which the tissue mask is made (with its work space).
    """
    item = np.dtype(dtype).itemsize
    shapes = pyramid_shapes(shape, config.coarsest_px)
    blocks = [
        math.prod((s[0], min(config.shard_px, s[1]), min(config.shard_px, s[2]))) * item for s in shapes
    ]
    view = math.prod(shapes[tissue_level(shapes, [2**i for i in range(len(shapes))], (1, 1))]) * item
    return sum(blocks) + 4 * blocks[0] + 12 * view


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    config: ConvertConfig | None = None,
    *,
    progress: bool | None = None,
) -> ConvertSummary:
    """Convert a slide file to an OME-Zarr 0.5 pyramid.

    Coarse levels are exact means of 2 x 2 pixels of the level above, rounded half to even. Pixel size is
    kept; pictures of the label and all metadata that could identify a patient are left out. ``progress``
    shows a bar on standard error, by default when that is a terminal. Raises SlideError, TargetExistsError or
    StorageError; then, as after Ctrl-C, there is no target.
    """
    config = config or ConvertConfig()
    with open_slide(source) as slide:
        return _convert(slide, Path(target), config, channels=None, progress=progress)


def write_pyramid(
    array: Any,
    target: str | os.PathLike[str],
    config: ConvertConfig | None = None,
    *,
    pixel_size_um: float | Sequence[float] | None = None,
    name: str | None = None,
    channels: Sequence[Channel | str] | None = None,
    progress: bool | None = None,
) -> ConvertSummary:
    """Write an array (C, y, x), numpy or dask, as a pyramid, in the same way as :func:`convert`."""
    sizes = (pixel_size_um, pixel_size_um) if isinstance(pixel_size_um, (int, float)) else pixel_size_um
    pair = (float(sizes[0]), float(sizes[1])) if sizes is not None else None
    label = name or Path(target).name.removesuffix(".zarr").removesuffix(".ome")
    slide = ArraySlide(array, name=label, pixel_size_um=pair)
    return _convert(slide, Path(target), config or ConvertConfig(), channels=channels, progress=progress)


def _convert(
    slide: SlideSource,
    target: Path,
    config: ConvertConfig,
    *,
    channels: Sequence[Channel | str] | None,
    progress: bool | None,
) -> ConvertSummary:
    began = time.perf_counter()
    shapes = pyramid_shapes(slide.shape, config.coarsest_px)
    factors = [2**i for i in range(len(shapes))]
    pixel_size_um = slide.pixel_size_um
    if config.pixel_size_um is not None:
        pixel_size_um = (config.pixel_size_um, config.pixel_size_um)
    is_rgb = slide.shape[0] == 3 and slide.dtype == np.uint8
    writer = PyramidWriter(
        target,
        level_shapes=shapes,
        downsamples=factors,
        dtype=slide.dtype,
        pixel_size_um=pixel_size_um,
        chunk_px=config.chunk_px,
        shard_px=config.shard_px,
        # bright slides: padding and blank parts are white
        fill_value=255 if is_rgb else 0,
        codec=config.codec,
        codec_level=config.codec_level,
        name=slide.name,
        channels=channels,
        metadata=slide.metadata,
        overwrite=config.overwrite,
        num_threads=config.num_threads,
    )
    looked_at = tissue_level(shapes, factors, pixel_size_um) if config.tissue else None
    share = None
    with writer, _progress_bar(slide, progress) as bar:
        view = None if looked_at is None else np.empty(shapes[looked_at], slide.dtype)
        tree = _ShardTree(slide, writer, config.shard_px, looked_at, view, bar.update if bar else None)
        for place in np.ndindex(*grid_shape(shapes[-1][1:], (config.shard_px,) * 2)):
            tree.build(len(shapes) - 1, place[0], place[1])
        if view is not None and looked_at is not None:
            mask = tissue_mask(view)
            share = float(mask.mean())
            writer.write_label("tissue", mask, downsample=factors[looked_at], colors={1: (0, 200, 0, 128)})
        if config.keep_associated:
            for name, picture in associated_images(slide):
                writer.write_associated(name, picture)
    return ConvertSummary(
        source=slide.path,
        target=target,
        name=slide.name,
        shape=slide.shape,
        num_levels=len(shapes),
        pixel_size_um=pixel_size_um,
        seconds=time.perf_counter() - began,
        source_bytes=slide.source_bytes,
        stored_bytes=writer.stored_bytes,
        tissue_share=share,
    )


@dataclass(frozen=True)
class _ShardTree:
    """Builds shards from those under them, writing each when it is whole."""

    slide: SlideSource
    writer: PyramidWriter
    shard_px: int
    view_level: int | None
    view: Array | None
    advance: Callable[[int], Any] | None

    def build(self, level: int, row: int, column: int) -> Array:
        """Write a shard and all under it; return it halved, the caller's share of it."""
        side = self.shard_px
        channels, height, width = self.writer.level_shapes[level]
        y, x = row * side, column * side
        extent = (min(side, height - y), min(side, width - x))
        if level == 0:
            block_CYX = self.slide.read_region(y, x, *extent)
        else:
            block_CYX = np.empty((channels, *extent), self.writer.dtype)
            _, rows_under, columns_under = self.writer.level_shapes[level - 1]
            for down, right in np.ndindex(2, 2):
                if (2 * row + down) * side < rows_under and (2 * column + right) * side < columns_under:
                    part = self.build(level - 1, 2 * row + down, 2 * column + right)
                    top, left = down * side // 2, right * side // 2
                    block_CYX[:, top : top + part.shape[1], left : left + part.shape[2]] = part
        self.writer.write_shard(level, (row, column), block_CYX)
        if self.view is not None and level == self.view_level:
            self.view[:, y : y + extent[0], x : x + extent[1]] = block_CYX
        if level == 0 and self.advance is not None:
            self.advance(extent[0] * extent[1])
        return halve(block_CYX)


def _progress_bar(slide: SlideSource, progress: bool | None) -> Any:
    """A bar over the pixels of level 0, or a context of None."""
    shown = sys.stderr.isatty() if progress is None else progress
    if not shown:
        return nullcontext(None)
    from tqdm import tqdm

    pixels = slide.shape[1] * slide.shape[2]
    return tqdm(total=pixels, desc=slide.name, unit="px", unit_scale=True, leave=False, file=sys.stderr)


def target_path(slide: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> Path:
    """Where :func:`preprocess` puts the pyramid of a slide: ``<out_dir>/<stem>.ome.zarr``.

    >>> target_path("slides/scan.ome.tif", "out").as_posix()
    'out/scan.ome.zarr'
    """
    return Path(out_dir) / (Path(slide).stem.removesuffix(".ome") + SUFFIX)


def preprocess(
    slides: Iterable[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    config: ConvertConfig | None = None,
    *,
    progress: bool | None = None,
) -> Iterator[ConvertSummary | ConvertFailure]:
    """Convert many slides, yielding one summary or failure per slide, in order.

    A slide that cannot be converted is recorded with its reason and the rest goes on; a disk that is full or
    a folder that cannot be written ends it with StorageError. InputError when two slides would get the same
    target.
    """
    paths = [Path(slide) for slide in slides]
    targets: dict[Path, Path] = {}
    for path in paths:
        other = targets.setdefault(target_path(path, out_dir), path)
        if other is not path:
            raise InputError(f"{other} and {path} would both become {target_path(path, out_dir)}")
    return _preprocess(paths, out_dir, config or ConvertConfig(), progress)


def _preprocess(
    paths: Sequence[Path], out_dir: str | os.PathLike[str], config: ConvertConfig, progress: bool | None
) -> Iterator[ConvertSummary | ConvertFailure]:
    for path in paths:
        try:
            yield convert(path, target_path(path, out_dir), config, progress=progress)
        except StorageError:
            raise
        except AtsStreamError as error:
            yield ConvertFailure(source=str(path), reason=str(error))
