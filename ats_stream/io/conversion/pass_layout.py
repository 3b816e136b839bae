"""How many tiles of a slide make a shard. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ats_stream.io.layout import MAX_CHUNKS_PER_SHARD

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class ShardSize:
    """How large the shards of a level should be."""

    nbytes: int
    """About so many bytes."""
    side_px: int | None = None
    """Instead: about so many pixels along each side."""
    max_px: int | None = None
    """At most so many pixels (y, x) where a single tile is not larger."""

    def tiles(
        self, grid: Sequence[int], tile_px: Sequence[int], *, depth: int, tile_bytes: float
    ) -> tuple[int, int]:
        """Rows and columns of tiles of a shard of a level of a grid (rows, columns) of tiles.

        At each place of the grid ``depth`` tiles lie on each other, channels and planes, of ``tile_bytes`` on
        average; all of them are in one shard. Where there are several shards, their sides are even, so that
        halves of shards are whole pixels.

        >>> ShardSize(nbytes=16 << 20).tiles((80, 80), (256, 256), depth=1, tile_bytes=12_800)
        (27, 27)
        >>> ShardSize(nbytes=1, side_px=1000).tiles((80, 2), (256, 256), depth=1, tile_bytes=1)
        (3, 2)
        """
        max_places = max(1, MAX_CHUNKS_PER_SHARD // depth)
        if self.max_px is not None:
            max_places = min(max_places, max(1, self.max_px // (tile_px[0] * tile_px[1])))
        if self.side_px is not None:
            down, across = (min(g, max(1, self.side_px // s)) for g, s in zip(grid, tile_px, strict=True))
            down = min(down, max(1, max_places // across))
        else:
            wanted = int(self.nbytes / max(1.0, tile_bytes * depth))
            down, across = tiles_per_shard(grid, min(max(1, wanted), max_places))
        return _even(down, grid[0], tile_px[0]), _even(across, grid[1], tile_px[1])


def tiles_per_shard(grid: Sequence[int], num_places: int) -> tuple[int, int]:
    """Rows and columns of about square shards of at most ``num_places``, all of much the same size.

    >>> tiles_per_shard((80, 80), 800), tiles_per_shard((100, 4), 64), tiles_per_shard((100, 4), 640)
    ((27, 27), (15, 4), (100, 4))
    """
    across = min(grid[1], max(1, math.isqrt(num_places)))
    down = min(grid[0], max(1, num_places // across))
    across = min(grid[1], max(1, num_places // down))
    rows, columns = -(-grid[0] // down), -(-grid[1] // across)
    return -(-grid[0] // rows), -(-grid[1] // columns)


def _even(count: int, num_tiles: int, side: int) -> int:
    """One tile more where several shards would have an odd side."""
    return count + 1 if count < num_tiles and count * side % 2 else count
