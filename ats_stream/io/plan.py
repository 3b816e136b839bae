"""From patches to chunks: pure planning of reads.

Shape letters: N patches, D axes, K chunks needed, P pieces (one piece = the part of one chunk that lands in
one patch).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

Int = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PatchPlan:
    """Which chunks to read, each once, and where their parts go.

    The pieces of chunk ``k`` are those from ``first_piece[k]`` to before ``first_piece[k + 1]``. Chunks are
    sorted by shard, then by place in the shard; ``first_chunk`` bounds those of each shard in the same way.
    """

    chunks: Int
    """(K, D) place of each chunk in the chunk grid."""
    shards: Int
    """(S, D) place of each shard in the shard grid."""
    first_chunk: Int
    """(S + 1,)."""
    first_piece: Int
    """(K + 1,)."""
    piece_patch: Int
    """(P,) number of the patch that receives the piece."""
    piece_source: Int
    """(P, D) where the piece begins inside its chunk."""
    piece_target: Int
    """(P, D) where the piece begins inside its patch."""
    piece_size: Int
    """(P, D) in pixels."""
    outside: npt.NDArray[np.bool_]
    """(N,) True for patches that reach over the level's border, so part of them must be filled."""

    @property
    def num_chunks(self) -> int:
        """Number of chunks to read."""
        return len(self.chunks)


def plan_patches(
    level_shape: Sequence[int],
    chunk_shape: Sequence[int],
    shard_shape: Sequence[int],
    offsets_ND: npt.ArrayLike,
    size_D: Sequence[int],
) -> PatchPlan:
    """Plan the reading of N patches of one size from a chunked level; every needed chunk comes once.

    All arguments are in pixels over the same D axes; offsets may be negative or reach past the edge (no piece
    covers what lies outside). ``shard_shape`` is a multiple of ``chunk_shape``, or equal to it when there are
    no shards.

    >>> plan = plan_patches((100,), (10,), (50,), [[8], [-3]], (4,))
    >>> plan.chunks.ravel().tolist(), plan.piece_patch.tolist(), plan.piece_target.ravel().tolist()
    ([0, 1], [0, 1, 0], [0, 3, 2])
    """
    shape, chunk, shard, size = (
        np.asarray(v, np.int64) for v in (level_shape, chunk_shape, shard_shape, size_D)
    )
    offsets = np.asarray(offsets_ND, np.int64).reshape(-1, len(shape))
    # a patch outside stays outside, and sums of far offsets cannot overflow
    offsets = np.clip(offsets, -size, shape)
    begin, end = np.maximum(offsets, 0), np.minimum(offsets + size, shape)
    outside_N = np.any((offsets < 0) | (offsets + size > shape), axis=1)
    first, last = begin // chunk, (end - 1) // chunk
    count_ND = np.where((end > begin).all(axis=1)[:, None], last - first + 1, 0)
    patch_P, place_PD = _enumerate(count_ND)
    place_PD += first[patch_P]

    chunk_start = place_PD * chunk
    piece_begin = np.maximum(begin[patch_P], chunk_start)
    piece_end = np.minimum(end[patch_P], chunk_start + chunk)

    # one number per chunk that sorts by shard first: np.unique then groups the shards
    per_shard = shard // chunk
    shard_grid = -(-shape // shard)
    shard_PD, inner_PD = place_PD // per_shard, place_PD % per_shard
    shard_id = np.ravel_multi_index(tuple(shard_PD.T), tuple(shard_grid))
    inner_id = np.ravel_multi_index(tuple(inner_PD.T), tuple(per_shard))
    key_P = shard_id.astype(np.int64) * int(per_shard.prod()) + inner_id
    order = np.argsort(key_P, kind="stable")
    _, first_piece = np.unique(key_P[order], return_index=True)
    chunks_KD = place_PD[order][first_piece]
    shards_KD = shard_PD[order][first_piece]
    _, first_chunk = np.unique(shard_id[order][first_piece], return_index=True)
    return PatchPlan(
        chunks=chunks_KD,
        shards=shards_KD[first_chunk],
        first_chunk=np.append(first_chunk, len(chunks_KD)),
        first_piece=np.append(first_piece, len(order)),
        piece_patch=patch_P[order],
        piece_source=(piece_begin - chunk_start)[order],
        piece_target=(piece_begin - offsets[patch_P])[order],
        piece_size=(piece_end - piece_begin)[order],
        outside=outside_N,
    )


def _enumerate(count_ND: Int) -> tuple[Int, Int]:
    """Places in the boxes ``0 .. count`` of all N items: number of the item (P,) and place (P, D)."""
    per_item = count_ND.prod(axis=1)
    item_P = np.repeat(np.arange(len(count_ND)), per_item)
    rank_P = np.arange(len(item_P)) - np.repeat(np.cumsum(per_item) - per_item, per_item)
    place = np.empty((len(item_P), count_ND.shape[1]), np.int64)
    for axis in range(count_ND.shape[1] - 1, -1, -1):
        along = count_ND[item_P, axis]
        place[:, axis] = rank_P % along
        rank_P = rank_P // along
    return item_P, place


def coalesce(
    starts: Sequence[int], sizes: Sequence[int], *, gap_bytes: int, max_bytes: int
) -> list[list[int]]:
    """Group ranges of bytes by the requests that should read them; each range comes in one group.

    A group spans at most ``max_bytes`` (a longer range is a group of its own), and no gap inside it is longer
    than ``gap_bytes``.

    >>> coalesce([100, 0, 20], [10, 10, 10], gap_bytes=15, max_bytes=100)
    [[1, 2], [0]]
    """
    groups: list[list[int]] = []
    begin = end = 0
    for number in sorted(range(len(starts)), key=lambda i: (starts[i], sizes[i])):
        start, stop = starts[number], starts[number] + sizes[number]
        if groups and start - end <= gap_bytes and max(end, stop) - begin <= max_bytes:
            groups[-1].append(number)
            end = max(end, stop)
        else:
            groups.append([number])
            begin, end = start, stop
    return groups
