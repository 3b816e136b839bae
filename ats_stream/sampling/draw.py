"""Drawing positions from an attention map.

Shapes: B rows (images), M positions of the flattened map, N draws, K = N + 1 arrivals kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ats_stream.errors import InputError
from ats_stream.kernels.arithmetic import PADDING_INDEX
from ats_stream.sampling.draw_op import draw_in_graph
from ats_stream.sampling.drawn import Draw, draw_eagerly, finish_race
from ats_stream.sampling.philox import Noise, settled_seed
from ats_stream.sampling.race import merge_races
from ats_stream.sampling.weights import check_scheme

if TYPE_CHECKING:
    from collections.abc import Sequence


@torch.no_grad()
def draw(
    logits_BM: Tensor,
    num_samples: int,
    *,
    replace: bool = False,
    scheme: str = "murthy",
    seed: int | Tensor = 0,
    stream_ids: Tensor | Sequence[int] | None = None,
    global_index: Tensor | None = None,
    map_shape: Sequence[int] | None = None,
) -> Draw:
    """Draw ``num_samples`` positions of each row from softmax(logits).

    ``logits_BM`` (B, M) floating point, -inf where nothing may be drawn. ``scheme`` is "with_replacement",
    "des_raj", "murthy", "balanced" or "top"; ``replace=True`` means the first. The noise of a position
    depends on ``seed``, the row's entry of ``stream_ids`` (B integers of 64 bits, by default the row number)
    and its index alone: for the same logits the draw is the same in any batch, row, process and on any
    device. ``seed`` is an integer of 64 bits, or a tensor () int64, which is not read on the host if it lies
    on a GPU. ``global_index`` (M,) or (B, M) int64 names the positions when the logits are a part of a map,
    see :func:`merge_draws`. "balanced" needs ``map_shape``, whose product is M.

    Raises InputError (a ValueError) for NaN or +inf logits, for shapes that do not fit, and for a row with
    no drawable position.

    >>> draw(torch.tensor([[float("-inf"), 0.0]]), 1).index
    tensor([[1]])
    """
    known = check_scheme("with_replacement" if replace else scheme)
    _check_shape(logits_BM, num_samples)
    streams_B = _stream_ids(stream_ids, len(logits_BM), logits_BM.device)
    noise = Noise(seed=settled_seed(_check_seed(seed)), stream_ids=streams_B)
    shape: list[int] | None = None
    if known == "balanced":
        if global_index is not None:
            raise InputError("scheme 'balanced' draws from whole maps; global_index must be None")
        shape = _check_map_shape(map_shape, logits_BM.shape[1])
    if torch.compiler.is_compiling():
        # one opaque step of the graph
        return draw_in_graph(logits_BM, num_samples, known, noise, global_index, shape)
    return draw_eagerly(logits_BM.detach(), num_samples, known, noise, global_index, shape)


@torch.no_grad()
def merge_draws(draws: Sequence[Draw], num_samples: int) -> Draw:
    """Merge draws from the disjoint tiles of a map into the draw from the whole map.

    Each tile is drawn with its ``global_index``, the same scheme, seed and stream ids, and at least
    ``num_samples`` samples. Every field is that of the whole map, bit for bit, whatever the tiles. Tiles may
    have no drawable position where others have some; give such a
    tile no draw. Raises InputError if the draws do not fit together.
    """
    if not draws:
        raise InputError("merge_draws needs at least one draw, got none")
    first = draws[0]
    races = []
    for tile in draws:
        if tile.race is None:
            raise InputError("draws of scheme 'balanced' cannot be merged")
        same_noise = torch.equal(tile.noise.stream_ids, first.noise.stream_ids) and (
            int(tile.noise.seed) % (1 << 64) == int(first.noise.seed) % (1 << 64)
        )
        if tile.scheme != first.scheme or not same_noise:
            raise InputError("draws to be merged must share scheme, seed and stream ids")
        if tile.race.num_kept < num_samples + 1:
            raise InputError(
                f"a tile was drawn with {tile.race.num_kept - 1} samples; {num_samples} are to be merged"
            )
        races.append(tile.race)
    everyone = torch.cat([race.index for race in races], dim=1).sort(dim=1).values
    twice = (everyone[:, 1:] == everyone[:, :-1]) & (everyone[:, 1:] != PADDING_INDEX)
    if bool(twice.any()):
        raise InputError(
            f"tiles overlap: global index {int(everyone[:, 1:][twice][0])} was drawn in two of them"
        )
    return finish_race(merge_races(races, num_samples + 1), num_samples, first.noise, first.scheme)


def _check_shape(logits_BM: Tensor, num_samples: int) -> None:
    shape = tuple(logits_BM.shape)
    if logits_BM.ndim != 2 or 0 in shape or not logits_BM.is_floating_point():
        raise InputError(f"logits must be floating point (B, M), got {logits_BM.dtype} {shape}")
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise InputError(f"num_samples must be an integer of at least 1, got {num_samples!r}")


def _check_seed(seed: int | Tensor) -> int | Tensor:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.ndim:
            raise InputError(f"seed must be int64 () as a tensor, got {seed.dtype} {tuple(seed.shape)}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(1 << 63) <= seed < 1 << 64:
        raise InputError(f"seed must be an integer of 64 bits, got {seed!r}")
    return seed


def _stream_ids(stream_ids: Tensor | Sequence[int] | None, num_rows: int, device: torch.device) -> Tensor:
    if stream_ids is None:
        return torch.arange(num_rows, device=device)
    if not isinstance(stream_ids, Tensor):
        # unsigned ids wrap to the int64 of the same bits
        signed = [(int(one) + (1 << 63)) % (1 << 64) - (1 << 63) for one in stream_ids]
        stream_ids = torch.tensor(signed, dtype=torch.int64)
    if stream_ids.dtype != torch.int64 or tuple(stream_ids.shape) != (num_rows,):
        got = f"{stream_ids.dtype} {tuple(stream_ids.shape)}"
        raise InputError(
            f"stream_ids must be {num_rows} integers of 64 bits, one per row of logits, got {got}"
        )
    return stream_ids.to(device)


def _check_map_shape(map_shape: Sequence[int] | None, num_positions: int) -> list[int]:
    if map_shape is None:
        raise InputError("scheme 'balanced' needs map_shape, the shape of the attention map")
    shape = [int(size) for size in map_shape]
    product = 1
    for size in shape:
        product *= size
    if not 1 <= len(shape) <= 3 or product != num_positions or min(shape) < 1:
        raise InputError(
            f"map_shape {tuple(shape)} must have 1 to 3 axes and hold the {num_positions} logits of a row"
        )
    return shape
