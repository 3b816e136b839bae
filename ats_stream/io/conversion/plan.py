"""The plan of a conversion: its levels, the shards of each, and the pieces of work. Pure.

The levels from the last one that comes from the source (the base) form a tree: a shard of a built level is
put together from the halves of the 2^D shards under it. Finer levels, if any, are copied shard by shard.
"""

from __future__ import annotations

import enum
import hashlib
import itertools
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import zstandard

from ats_stream.io import ngff
from ats_stream.io.axis_map import AxisMap
from ats_stream.io.codecs import ChunkCodec
from ats_stream.io.conversion.array_writer import ArraySpec
from ats_stream.io.conversion.config import PROFILE_CODECS, ConvertConfig
from ats_stream.io.conversion.layout import block_shapes, level_shapes
from ats_stream.io.layout import grid_shape
from ats_stream.io.tissue import tissue_level
from ats_stream.io.tissue_method import OTSU

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Place = tuple[int, ...]
# shards of the base that one piece of work covers at most, and levels that it builds over them
GROUP_SHARDS = 4
# counts up when the same plan would give other bytes
BYTES_VERSION = 1
# bytes that finding tissue takes for each byte of the view, and how many it may take
VIEW_COPIES = 12
MAX_VIEW_BYTES = 768 << 20  # 768 MiB
MAX_LEVELS = 64


class Kind(enum.StrEnum):
    """Where the pixels of a level come from."""

    DECODED = "decoded"
    COPIED = "copied"
    BUILT = "built"


@dataclass(frozen=True, order=True)
class Shard:
    """One shard: its level and its place along the space axes."""

    level: int
    place: Place


@dataclass(frozen=True, kw_only=True)
class LevelPlan:
    """One level in the making."""

    kind: Kind
    spec: ArraySpec
    axes: AxisMap
    """How the stored axes become (C, *space)."""
    downsample: tuple[float, ...]
    source_level: int = 0
    """Level of the source that is decoded or copied."""

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """(C, *space)."""
        return self.axes.view(self.spec.shape)

    @cached_property
    def shard(self) -> tuple[int, ...]:
        """Side of the shards per space axis."""
        return self.axes.view(self.spec.shard)[1:]

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """Number of shards per space axis."""
        return grid_shape(self.shape[1:], self.shard)

    def box(self, place: Place) -> tuple[Place, Place]:
        """First pixel of a shard and the one after its last, (C, *space), cut off at the edge."""
        start = tuple(p * s for p, s in zip(place, self.shard, strict=True))
        stop = tuple(min(a + s, n) for a, s, n in zip(start, self.shard, self.shape[1:], strict=True))
        return (0, *start), (self.shape[0], *stop)

    def stored_place(self, place: Place) -> Place:
        """Place of a shard in the order of the stored axes."""
        return self.axes.stored((0, *place))


@dataclass(frozen=True, kw_only=True)
class Task:
    """Shards that one worker makes in one go; what lies under them is done before."""

    shards: tuple[Shard, ...]
    roots: tuple[Shard, ...]
    """The coarsest of them, from which the others are found."""


@dataclass(frozen=True, kw_only=True)
class ConvertPlan:
    """Everything that decides the bytes of a pyramid, apart from pixels."""

    levels: tuple[LevelPlan, ...]
    attributes: Mapping[str, Any]
    """Of the group."""
    profile: str
    pixel_size_um: tuple[float, ...] | None
    """Per space axis, NaN along time."""
    tissue_level: int | None
    """The level from which the mask of the tissue is made."""
    tissue_method: str = OTSU
    """How it is made."""
    associated_names: tuple[str, ...] = ()
    """Pictures that are copied."""

    @cached_property
    def base(self) -> int:
        """The last level that comes from the source."""
        return max(i for i, level in enumerate(self.levels) if level.kind != Kind.BUILT)

    @property
    def digest(self) -> str:
        """SHA-256 over everything that decides the bytes."""
        content = {
            "version": BYTES_VERSION,
            "codecs": [imagecodecs.__version__, zstandard.ZSTD_VERSION],
            "levels": [[str(v.kind), v.source_level, v.spec.metadata()] for v in self.levels],
            "attributes": self.attributes,
            "tissue": [self.tissue_level, self.tissue_method],
            "associated": self.associated_names,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def num_px(self) -> int:
        """Pixels that come from the source: the measure of progress."""
        return sum(math.prod(v.shape[1:]) for v in self.levels if v.kind != Kind.BUILT)

    @cached_property
    def num_shards(self) -> int:
        """Shards of all levels."""
        return sum(math.prod(v.grid) for v in self.levels)

    def shard_px(self, shard: Shard) -> int:
        """Pixels of the source that a shard stands for in the measure of progress."""
        level = self.levels[shard.level]
        if level.kind == Kind.BUILT:
            return 0
        start, stop = level.box(shard.place)
        return math.prod(b - a for a, b in zip(start[1:], stop[1:], strict=True))

    def key(self, shard: Shard) -> str:
        """Where a shard is stored."""
        place = self.levels[shard.level].stored_place(shard.place)
        return "/".join((str(shard.level), "c", *map(str, place)))

    def shards(self) -> Iterator[Shard]:
        """All shards, finest level first."""
        for index, level in enumerate(self.levels):
            yield from (Shard(index, place) for place in np.ndindex(*level.grid))

    def children(self, shard: Shard) -> Iterator[tuple[Shard, tuple[slice, ...]]]:
        """The shards under one of a built level, and where the half of each lies in it (C, *space)."""
        level, under = self.levels[shard.level], self.levels[shard.level - 1]
        # a level of one shard is narrower than the shards under it, which tell where their halves lie
        half = [max(1, s // 2) for s in under.shard]
        sides = [range(2) if s > 1 else range(1) for s in level.shard]
        for corner in itertools.product(*sides):
            place = tuple(
                2 * p + c if s > 1 else p for p, c, s in zip(shard.place, corner, level.shard, strict=True)
            )
            if all(p < g for p, g in zip(place, under.grid, strict=True)):
                box = [
                    slice(c * h, c * h + -(-(min((p + 1) * s, n) - p * s) // 2))
                    for c, h, p, s, n in zip(corner, half, place, under.shard, under.shape[1:], strict=True)
                ]
                yield Shard(shard.level - 1, place), (slice(None), *box)

    def parent(self, shard: Shard) -> Shard | None:
        """The shard over one of the tree; None over the last level and for the levels before the base."""
        if shard.level < self.base or shard.level + 1 == len(self.levels):
            return None
        sides = self.levels[shard.level].shard
        place = tuple(p // 2 if s > 1 else p for p, s in zip(shard.place, sides, strict=True))
        return Shard(shard.level + 1, place)

    def tasks(self, pending: Sequence[Shard], *, is_whole: bool) -> list[tuple[Task, tuple[int, ...]]]:
        """Cut the shards that are not done into tasks, each with the numbers of those that come before it.

        ``is_whole`` gives a task each coarsest shard with all under it, so that nothing is read back.
        Otherwise a task covers at most about four shards of a level and those built over them.
        """
        groups: dict[tuple[int, Shard], list[Shard]] = {}
        loose: dict[int, int] = {}
        for shard in pending:
            if shard.level < self.base:
                number = loose.get(shard.level, 0)
                loose[shard.level] = number + 1
                groups.setdefault((-1, Shard(shard.level, (number // GROUP_SHARDS,))), []).append(shard)
                continue
            wave, root = self._root(shard, is_whole)
            groups.setdefault((wave, root), []).append(shard)
        keys = sorted(groups, key=lambda key: key[0])
        numbers = {root: number for number, (wave, root) in enumerate(keys) if wave >= 0}
        tasks: list[tuple[Task, tuple[int, ...]]] = []
        needs: list[set[int]] = [set() for _ in keys]
        for root, number in numbers.items():
            above = self.parent(root)
            while above is not None:
                over = numbers.get(self._root(above, is_whole)[1])
                if over is not None:
                    needs[over].add(number)
                    break
                above = self.parent(self._root(above, is_whole)[1])
        for number, key in enumerate(keys):
            shards = groups[key]
            roots = shards if key[0] < 0 else [key[1]]
            task = Task(shards=tuple(shards), roots=tuple(roots))
            tasks.append((task, tuple(sorted(needs[number]))))
        return tasks

    def _root(self, shard: Shard, is_whole: bool) -> tuple[int, Shard]:
        """Number of the wave of a shard of the tree, and the coarsest shard of its task."""
        last = len(self.levels) - 1
        per_wave = 1 + max(1, round(math.log2(GROUP_SHARDS) / max(1, self._num_halved)))
        wave = 0 if is_whole else (shard.level - self.base) // per_wave
        top = last if is_whole else min(last, self.base + (wave + 1) * per_wave - 1)
        while shard.level < top:
            above = self.parent(shard)
            assert above is not None
            shard = above
        return wave, shard

    @property
    def _num_halved(self) -> int:
        return sum(n > 1 for n in self.levels[self.base].shape[1:])


def axes_of(space: Sequence[str]) -> tuple[str, AxisMap]:
    """Names of the stored axes of an image (C, *space), time first as NGFF asks, and their map to it.

    >>> axes_of(("t", "y", "x"))
    ('tcyx', AxisMap(keep=(1, 0, 2, 3), ndim=4))
    """
    stored = [*(a for a in space if a == "t"), "c", *(a for a in space if a != "t")]
    return "".join(stored), AxisMap(tuple(stored.index(a) for a in ("c", *space)), len(stored))


def level_spec(
    shape: Sequence[int],
    space: Sequence[str],
    *,
    dtype: np.dtype[Any],
    chunk: Sequence[int],
    shard: Sequence[int],
    fill_value: float,
    codec: ChunkCodec,
) -> ArraySpec:
    """The array of a level; shapes are (C, *space), and shards no wider than the level."""
    names, axes = axes_of(space)
    cover = [g * c for g, c in zip(grid_shape(shape, chunk), chunk, strict=True)]
    return ArraySpec(
        shape=axes.stored(shape),
        dtype=dtype,
        axes=names,
        chunk=axes.stored(chunk),
        shard=axes.stored([min(s, n) for s, n in zip(shard, cover, strict=True)]),
        fill_value=fill_value,
        codec=codec,
    )


def build_levels(
    shapes: Sequence[Sequence[int]],
    space: Sequence[str],
    dtype: np.dtype[Any],
    config: ConvertConfig,
    *,
    bytes_per_px: float | None = None,
) -> tuple[LevelPlan, ...]:
    """Levels of which the first is decoded and the others are halves of those before them."""
    chunk, shard = block_shapes(
        shapes[0],
        ("c", *space),
        dtype,
        chunk_px=config.chunk_px,
        shard_px=config.shard_px,
        shard_bytes=config.shard_bytes,
        bytes_per_px=bytes_per_px,
    )
    codec = ChunkCodec(name=PROFILE_CODECS.get(config.profile, "zstd"), level=config.codec_level)
    fill = fill_value(shapes[0], dtype)
    return tuple(
        LevelPlan(
            kind=Kind.BUILT if i else Kind.DECODED,
            spec=level_spec(
                shape, space, dtype=dtype, chunk=chunk, shard=shard, fill_value=fill, codec=codec
            ),
            axes=axes_of(space)[1],
            downsample=(2.0**i,) * len(space),
        )
        for i, shape in enumerate(shapes)
    )


def fill_value(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    """White for colours, where padding and blank parts are bright; else 0."""
    return 255 if shape[0] == 3 and dtype == np.uint8 and len(shape) == 3 else 0


def working_memory_bytes(
    shape: Sequence[int],
    dtype: npt.DTypeLike,
    config: ConvertConfig,
    *,
    axes: Sequence[str] | None = None,
) -> int:
    """Upper bound of what a worker holds, apart from the libraries and what reading a region takes.

    One shard in the making per level, one more being read, its half, its encoded chunks and one that waits to
    be written; or, after that, the view from which the tissue mask is made with its work space.
    """
    item = np.dtype(dtype).itemsize
    scales = [2.0**i for i in range(MAX_LEVELS)]
    names = tuple(axes) if axes is not None else {3: ("c", "y", "x"), 4: ("c", "z", "y", "x")}[len(shape)]
    shapes = level_shapes(shape, config.coarsest_px, config.levels)
    _, shard = block_shapes(
        shape,
        names,
        dtype,
        chunk_px=config.chunk_px,
        shard_px=config.shard_px,
        shard_bytes=config.shard_bytes,
    )
    blocks = [math.prod(min(s, n) for s, n in zip(shard, v, strict=True)) * item for v in shapes]
    view = 0
    if config.tissue and len(shape) == 3:
        view = math.prod(shapes[view_level(shapes, scales[: len(shapes)], (1, 1), item)]) * item
    return max(sum(blocks) + 4 * blocks[0], VIEW_COPIES * view)


def view_level(
    shapes: Sequence[Sequence[int]],
    downsamples: Sequence[float],
    pixel_size_um: Sequence[float] | None,
    itemsize: int,
) -> int:
    """The level from which the mask of the tissue is made: a coarser one where channels are many."""
    level = tissue_level(shapes, downsamples, pixel_size_um)
    while level + 1 < len(shapes) and VIEW_COPIES * math.prod(shapes[level]) * itemsize > MAX_VIEW_BYTES:
        level += 1
    return level


def group_attributes(
    *,
    name: str,
    levels: Sequence[LevelPlan],
    pixel_size_um: Sequence[float] | None,
    channels: Sequence[ngff.Channel],
    metadata: Mapping[str, Any],
) -> dict[str, Any]:
    """Attributes of the group of a pyramid."""
    dtype = levels[0].spec.dtype
    return ngff.build_image(
        name=name,
        axes=levels[0].spec.axes,
        paths=[str(i) for i in range(len(levels))],
        downsamples=[level.downsample for level in levels],
        pixel_size_um=pixel_size_um,
        channels=channels or ngff.default_channels(levels[0].shape[0]),
        value_range=(0.0, float(np.iinfo(dtype).max) if dtype.kind in "iu" else 1.0),
        metadata=metadata,
    )
