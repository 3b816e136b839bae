"""Making the shards of a pyramid, depth first: at most one unfinished shard per level is in memory.

What is not to be made is there already, and is read back where the level above needs it. So a whole run, a
run that goes on where another one was killed, and the work of many workers are the same function.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from ats_stream.io.conversion.block_encoder import shard_of_block
from ats_stream.io.conversion.manifest import ManifestEntry, entry_of
from ats_stream.io.conversion.plan import ConvertPlan, Kind, Shard
from ats_stream.io.conversion.scratch import Scratch
from ats_stream.io.layout import parse_array_json
from ats_stream.io.pyramid import Pyramid
from ats_stream.io.pyramid_info import Level, PyramidInfo
from ats_stream.io.reduce import halve
from ats_stream.io.sources import StoreSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ats_stream.io.conversion.slides import SlideSource
    from ats_stream.io.conversion.targets import Target
    from ats_stream.io.formats.stored_tiles import StoredTiles

Array = npt.NDArray[Any]
MAX_THREADS = 8


class ShardBuilder:
    """Makes shards of one pyramid; ``on_done`` hears of each when it is stored."""

    def __init__(
        self, plan: ConvertPlan, source: SlideSource, target: Target, *, num_threads: int | None = None
    ) -> None:
        self.plan, self.source, self.target = plan, source, target
        self.num_threads = num_threads or min(MAX_THREADS, os.cpu_count() or 1)
        self._pool = (
            ThreadPoolExecutor(self.num_threads, thread_name_prefix="ats-encode")
            if self.num_threads > 1
            else None
        )

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def build(
        self, shards: Iterable[Shard], roots: Iterable[Shard], on_done: Callable[[Shard, ManifestEntry], None]
    ) -> None:
        """Make these shards, all of them under the roots."""
        pending, tops = frozenset(shards), list(roots)
        # nothing is made from these, and copying is mostly waiting for reads and writes
        loose = [s for s in tops if s.level < self.plan.base and s in pending]
        self._copy_all(loose, on_done)
        work = _Work(self, pending.difference(loose), on_done)
        for root in tops:
            work.visit(root, wants_half=False)

    def _copy_all(self, shards: Sequence[Shard], on_done: Callable[[Shard, ManifestEntry], None]) -> None:
        """Copy shards in the threads; after an error none of them is at work any more."""
        if self._pool is None:
            for shard in shards:
                on_done(shard, self._copy(shard))
            return
        futures = [self._pool.submit(self._copy, shard) for shard in shards]
        try:
            for shard, future in zip(shards, futures, strict=True):
                on_done(shard, future.result())
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def read_back(self, level: int) -> Array:
        """A whole level (C, *space) of what is stored."""
        return self._stored.read(level)

    @cached_property
    def _stored(self) -> Pyramid:
        return stored_pyramid(self.plan, self.target, num_threads=self.num_threads)

    @cached_property
    def _tiles(self) -> dict[int, StoredTiles]:
        from ats_stream.io.conversion.passthrough import stored_tiles

        assert self.source.parts is not None
        return stored_tiles(self.source.parts)

    def _copy(self, shard: Shard) -> ManifestEntry:
        """Store the tiles of a shard as they lie in the slide."""
        from ats_stream.io.conversion.passthrough import shard_parts

        level = self.plan.levels[shard.level]
        tiles = self._tiles[level.source_level]
        place = level.stored_place(shard.place)
        return self._put(shard, shard_parts(tiles, level.spec, place, level.source_level))

    def _put(self, shard: Shard, parts: Sequence[Any]) -> ManifestEntry:
        key = self.plan.key(shard)
        if parts:
            self.target.put(key, parts)
        return entry_of(key, parts)


class _Work:
    """One call of the builder: which shards are to be made, and what lies over them."""

    def __init__(
        self,
        builder: ShardBuilder,
        pending: frozenset[Shard],
        on_done: Callable[[Shard, ManifestEntry], None],
    ) -> None:
        self.builder, self.plan = builder, builder.plan
        self.pending, self.on_done = pending, on_done
        # a block in the making per level, and the frames of the shard that is stored
        self.scratch = Scratch()
        self.open = set(pending)
        for shard in pending:
            above = self.plan.parent(shard)
            while above is not None and above not in self.open:
                self.open.add(above)
                above = self.plan.parent(above)

    def visit(self, shard: Shard, *, wants_half: bool) -> Array | None:
        """Make a shard and all under it that is to be made; return its pixels halved, if they are wanted."""
        is_pending = shard in self.pending
        level = self.plan.levels[shard.level]
        if level.kind == Kind.COPIED and is_pending:
            self.on_done(shard, self.builder._copy(shard))
            is_pending = False
        if level.kind == Kind.BUILT and shard in self.open:
            block = self._from_children(shard, wants_block=is_pending or wants_half)
        elif is_pending or wants_half:
            block = self._pixels(shard, is_pending)
        else:
            return None
        if is_pending:
            assert block is not None
            stored = _stored_order(block, level.axes.keep)
            parts = shard_of_block(level.spec, stored, self.scratch, self.builder._pool)
            self.on_done(shard, self.builder._put(shard, parts))
        return halve(block) if wants_half and block is not None else None

    def _from_children(self, shard: Shard, *, wants_block: bool) -> Array | None:
        block: Array | None = None
        if wants_block:
            block = self._memory(shard)
        for child, box in self.plan.children(shard):
            if wants_block or child in self.open:
                half = self.visit(child, wants_half=wants_block)
                if block is not None:
                    block[box] = half
        return block

    def _memory(self, shard: Shard) -> Array:
        """Memory for the pixels of a shard; of each level there is one at a time."""
        level = self.plan.levels[shard.level]
        start, stop = level.box(shard.place)
        shape = [b - a for a, b in zip(start, stop, strict=True)]
        return self.scratch.array(shard.level, shape, level.spec.dtype)

    def _pixels(self, shard: Shard, is_pending: bool) -> Array:
        """Pixels of a shard that has none under it that are to be made."""
        level = self.plan.levels[shard.level]
        if level.kind == Kind.BUILT and level.spec.codec.jpeg is not None:
            # a pixel that was stored as JPEG is not the one that was encoded
            block = self._from_children(shard, wants_block=True)
            assert block is not None
            return block
        start, stop = level.box(shard.place)
        if level.kind == Kind.DECODED and is_pending:
            return self.builder.source.read(start, stop, self._memory(shard))
        return self.builder._stored.read(shard.level, start, stop)


def _stored_order(block: Array, keep: tuple[int | None, ...]) -> Array:
    """A block (C, *space) in the order of the stored axes."""
    order = [keep.index(axis) for axis in range(len(keep))]
    return block if order == sorted(order) else block.transpose(order)


def stored_pyramid(plan: ConvertPlan, target: Target, *, num_threads: int = 1) -> Pyramid:
    """What is stored of a pyramid that has no metadata yet."""
    sources, levels = [], []
    for index, level in enumerate(plan.levels):
        layout = parse_array_json(level.spec.metadata())
        assert layout is not None
        source = StoreSource(target.store, f"{index}/", layout, level.axes)
        sources.append(source)
        levels.append(
            Level(
                index=index,
                shape=source.shape,
                dtype=source.dtype,
                downsample=level.downsample,
                pixel_size_um=None,
                chunk_shape=source.chunk_shape,
            )
        )
    info = PyramidInfo(slide=target.shown, name="", axes=(), channels=(), levels=tuple(levels))
    return Pyramid(info, sources, num_threads=num_threads)
