"""How the pixels of a pyramid are cut into levels, shards and chunks. Pure.

Shape letters: C channels; ``*space`` are the sampled axes, D of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

# chunk and shard per space axes; frames of a video are decoded whole, so their shards are flat in time
BLOCKS: dict[tuple[str, ...], tuple[tuple[int, ...], tuple[int, ...]]] = {
    ("y", "x"): ((128, 128), (4096, 4096)),
    ("z", "y", "x"): ((32, 32, 32), (256, 256, 256)),
    ("t", "y", "x"): ((8, 64, 64), (16, 1024, 1024)),
    ("t", "z", "y", "x"): ((2, 32, 32, 32), (4, 128, 128, 128)),
}
# of an image of one row or column
LINE_CHUNK_PX, LINE_SHARD_PX = 1 << 14, 1 << 22
# default shards hold no more pixels than this, whatever the number and size of the channels
MAX_SHARD_BYTES = 64 << 20  # 64 MiB


def check_blocks(chunk_px: int | None, shard_px: int | None) -> None:
    """ValueError, naming the field, for sides of chunks and shards that do not fit each other."""
    if chunk_px is not None and chunk_px < 1:
        raise ValueError(f"chunk_px must be positive, got {chunk_px}")
    if shard_px is None:
        return
    chunk = chunk_px or BLOCKS["y", "x"][0][0]
    if shard_px < 2 or shard_px % chunk or shard_px % 2:
        raise ValueError(f"shard_px must be an even multiple of chunk_px={chunk}, got {shard_px}")


def level_shapes(
    shape: Sequence[int], coarsest_px: int, max_levels: int | None = None
) -> list[tuple[int, ...]]:
    """Shapes (C, *space) of all levels, each half the one before, rounded up.

    >>> level_shapes((3, 1000, 601), 256)
    [(3, 1000, 601), (3, 500, 301), (3, 250, 151)]
    """
    shapes = [tuple(shape)]
    while max(shapes[-1][1:]) > coarsest_px and (max_levels is None or len(shapes) < max_levels):
        shapes.append((shape[0], *(-(-n // 2) for n in shapes[-1][1:])))
    return shapes


def block_shapes(
    shape: Sequence[int],
    axes: Sequence[str],
    dtype: npt.DTypeLike,
    *,
    chunk_px: int | None = None,
    shard_px: int | None = None,
    shard_bytes: int | None = None,
    bytes_per_px: float | None = None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chunk and shard (C, *space) of every level of an image (C, *space); the same for all levels.

    Given sides hold for all space axes but time. Shards of about ``shard_bytes`` hold pixels that take
    ``bytes_per_px`` when they are stored, all channels together. Along axes of length 1 both are 1. Each
    side of a shard is an even multiple of the chunk's, so that halves of shards are whole pixels.

    >>> block_shapes((3, 9000, 9000), ("c", "y", "x"), "uint8")
    ((3, 128, 128), (3, 4096, 4096))
    >>> block_shapes((3, 9000, 9000), ("c", "y", "x"), "uint8", shard_bytes=1 << 20, bytes_per_px=1)
    ((3, 128, 128), (3, 1024, 1024))
    """
    px_bytes = shape[0] * np.dtype(dtype).itemsize
    space = tuple(axes[1:])
    chunk, shard = BLOCKS[space]
    long = [i for i, n in enumerate(shape[1:]) if n > 1]
    if len(long) <= 1:
        chunk, shard = (LINE_CHUNK_PX,) * len(space), (LINE_SHARD_PX,) * len(space)
    is_free = [axis != "t" for axis in space]
    if chunk_px is not None:
        chunk = tuple(chunk_px if free else c for free, c in zip(is_free, chunk, strict=True))
    elif shard_px is not None:
        chunk = tuple(_divisor(shard_px, c) if free else c for free, c in zip(is_free, chunk, strict=True))
    # chunks per side of a shard: fixed along time, along the others at least what makes the side even
    grid = [1 if c % 2 == 0 else 2 for c in chunk]
    grid = [g if free else s // c for g, free, s, c in zip(grid, is_free, shard, chunk, strict=True)]
    if shard_px is not None:
        grid = [shard_px // c if free else g for g, free, c in zip(grid, is_free, chunk, strict=True)]
    else:
        free_long = [i for i in long if is_free[i]]
        while True:
            larger = [2 * g if free else g for g, free in zip(grid, is_free, strict=True)]
            num_px = math.prod(chunk[i] * larger[i] for i in long)
            if shard_bytes is not None:
                # the nearest size, in ratio
                fits = num_px * (bytes_per_px or px_bytes) <= shard_bytes * 2 ** (len(free_long) / 2)
            else:
                fits = all(chunk[i] * larger[i] <= shard[i] for i in free_long)
            if not fits or not free_long or num_px * px_bytes > MAX_SHARD_BYTES:
                break
            grid = larger
    sides = [(c, c * g) for c, g in zip(chunk, grid, strict=True)]
    flat = [(1, 1) if n == 1 else side for n, side in zip(shape[1:], sides, strict=True)]
    return (shape[0], *(c for c, _ in flat)), (shape[0], *(s for _, s in flat))


def _divisor(shard: int, chunk: int) -> int:
    """The largest part of a shard's side that is no larger than the chunk wanted and divides it.

    >>> _divisor(1024, 128), _divisor(16, 128), _divisor(200, 128)
    (128, 16, 100)
    """
    return next(c for c in range(min(chunk, shard), 0, -1) if shard % c == 0)
