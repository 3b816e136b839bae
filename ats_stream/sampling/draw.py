"""Drawing positions from an attention map.

Shapes: B rows (images), M positions of the flattened map, N draws, K = N + 1 arrivals kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ats_stream.errors import InputError
from ats_stream.kernels.arithmetic import NUM_LEVELS, PADDING_INDEX
from ats_stream.sampling.balanced import balanced_draw
from ats_stream.sampling.logarithm import log
from ats_stream.sampling.mass import Mass
from ats_stream.sampling.philox import Noise
from ats_stream.sampling.race import (
    Order,
    Race,
    exponentials,
    merge_races,
    run_race,
    smallest_first,
)
from ats_stream.sampling.weights import Scheme, check_scheme, weights_from_logs

if TYPE_CHECKING:
    from collections.abc import Sequence

_NEGATIVE_INFINITY = float("-inf")
_MAX_POSITIONS = 1 << 34  # a Philox counter word holds index / 4


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Positions drawn from each row, with all that turns them into an estimate. Nothing carries a gradient.

    Rows with fewer drawable positions than N are padded at the end: index 0, log_prob -inf, weight 0.
    """

    index: Tensor
    """(B, N) int64 positions in draw order; global ones if ``global_index`` was given."""
    log_prob: Tensor
    """(B, N) float32 log q."""
    weight: Tensor
    """(B, N) float32 R, see :func:`ats_stream.sampling.estimator_weights`."""
    num_drawn: Tensor
    """(B,) int64, N unless the row had fewer drawable positions."""
    scheme: Scheme
    log_normaliser: Tensor
    """(B,) float64 log-sum-exp of the row's logits."""
    noise: Noise
    race: Race | None = None
    """The N + 1 first arrivals, from which draws of tiles are merged; None for "balanced"."""
    inclusion: Tensor | None = None
    """(B, N) float64 inclusion probabilities of "balanced", 1 at padding."""

    @property
    def keys(self) -> Tensor | None:
        """(B, N) float64 race keys of the N first arrivals, ascending; None for "balanced"."""
        return None if self.race is None else self.race.key[:, :-1]

    @property
    def threshold(self) -> Tensor | None:
        """(B,) float64 key of arrival N + 1, +inf where there is none; None for "balanced"."""
        return None if self.race is None else self.race.key[:, -1]


@torch.no_grad()
def draw(
    logits_BM: Tensor,
    num_samples: int,
    *,
    replace: bool = False,
    scheme: str = "murthy",
    seed: int = 0,
    stream_ids: Tensor | Sequence[int] | None = None,
    global_index: Tensor | None = None,
    map_shape: Sequence[int] | None = None,
) -> Draw:
    """Draw ``num_samples`` positions of each row from softmax(logits).

    ``logits_BM`` (B, M) floating point, -inf where nothing may be drawn. ``scheme`` is "with_replacement",
    "des_raj", "murthy", "balanced" or "top"; ``replace=True`` means the first. The noise of a position
    depends on ``seed``, the row's entry of ``stream_ids`` (B integers of 64 bits, by default the row number)
    and its index alone: for the same logits the draw is the same in any batch, row, process and on any
    device. ``global_index`` (M,) or (B, M) int64 names the positions when the logits are a part of a map,
    see :func:`merge_draws`. "balanced" needs ``map_shape``, whose product is M.

    Raises InputError (a ValueError) for NaN or +inf logits, for shapes that do not fit, and for a row with
    no drawable position.

    >>> draw(torch.tensor([[float("-inf"), 0.0]]), 1).index
    tensor([[1]])
    """
    known = check_scheme("with_replacement" if replace else scheme)
    _check_shape(logits_BM, num_samples)
    streams_B = _stream_ids(stream_ids, len(logits_BM), logits_BM.device)
    noise = Noise(seed=_check_seed(seed), stream_ids=streams_B)
    shape: list[int] | None = None
    if known == "balanced":
        if global_index is not None:
            raise InputError("scheme 'balanced' draws from whole maps; global_index must be None")
        shape = _check_map_shape(map_shape, logits_BM.shape[1])
    if torch.compiler.is_compiling():
        # one opaque step of the graph
        signed_seed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)
        tensors = _draw_op(logits_BM, num_samples, known, signed_seed, streams_B, global_index, shape)
        return _draw_of(tensors, noise, known)
    return _draw(logits_BM.detach(), num_samples, known, noise, global_index, shape)


def _draw(
    logits_BM: Tensor,
    num_samples: int,
    scheme: Scheme,
    noise: Noise,
    global_index: Tensor | None,
    map_shape: list[int] | None,
) -> Draw:
    _check_values(logits_BM)
    if scheme == "balanced":
        assert map_shape is not None
        return _finish_balanced(logits_BM, num_samples, noise, tuple(map_shape))
    if global_index is not None:
        global_index = _check_global_index(global_index, logits_BM)
    order: Order = "logit" if scheme == "top" else "race"
    race = run_race(logits_BM, num_samples + 1, noise, order=order, global_index=global_index)
    return _finish(race, num_samples, noise, scheme)


_Tensors = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]  # index, log_prob, weight, num_drawn, log_normaliser, inclusion; key, index, logit, peak, levels of a race


@torch.library.custom_op("ats_stream::draw", mutates_args=())
def _draw_op(
    logits_BM: Tensor,
    num_samples: int,
    scheme: str,
    seed: int,
    stream_ids: Tensor,
    global_index: Tensor | None,
    map_shape: list[int] | None,
) -> _Tensors:
    noise = Noise(seed=seed, stream_ids=stream_ids)
    drawn = _draw(logits_BM, num_samples, check_scheme(scheme), noise, global_index, map_shape)
    common = (drawn.index, drawn.log_prob, drawn.weight, drawn.num_drawn, drawn.log_normaliser)
    if drawn.race is None:
        assert drawn.inclusion is not None
        return *common, drawn.inclusion, *_absent(logits_BM)
    race = drawn.race
    absent = torch.empty(0, dtype=torch.float64, device=logits_BM.device)
    return *common, absent, race.key, race.index, race.logit, race.rest.peak, race.rest.levels


@_draw_op.register_fake
def _draw_op_fake(
    logits_BM: Tensor,
    num_samples: int,
    scheme: str,
    seed: int,  # noqa: ARG001  the operator's signature
    stream_ids: Tensor,  # noqa: ARG001
    global_index: Tensor | None,  # noqa: ARG001
    map_shape: list[int] | None,  # noqa: ARG001
) -> _Tensors:
    num_rows = logits_BM.shape[0]
    common = (
        logits_BM.new_empty((num_rows, num_samples), dtype=torch.int64),
        logits_BM.new_empty((num_rows, num_samples), dtype=torch.float32),
        logits_BM.new_empty((num_rows, num_samples), dtype=torch.float32),
        logits_BM.new_empty(num_rows, dtype=torch.int64),
        logits_BM.new_empty(num_rows, dtype=torch.float64),
    )
    if scheme == "balanced":
        inclusion_BN = logits_BM.new_empty((num_rows, num_samples), dtype=torch.float64)
        return *common, inclusion_BN, *_absent(logits_BM)
    return (
        *common,
        logits_BM.new_empty(0, dtype=torch.float64),
        logits_BM.new_empty((num_rows, num_samples + 1), dtype=torch.float64),
        logits_BM.new_empty((num_rows, num_samples + 1), dtype=torch.int64),
        logits_BM.new_empty((num_rows, num_samples + 1), dtype=torch.float64),
        logits_BM.new_empty(num_rows, dtype=torch.float64),
        logits_BM.new_empty((num_rows, NUM_LEVELS), dtype=torch.int64),
    )


def _absent(like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors in the place of a race."""
    dtypes = (torch.float64, torch.int64, torch.float64, torch.float64, torch.int64)
    key, index, logit, peak, levels = (like.new_empty(0, dtype=dtype) for dtype in dtypes)
    return key, index, logit, peak, levels


def _draw_of(tensors: _Tensors, noise: Noise, scheme: Scheme) -> Draw:
    index, log_prob, weight, num_drawn, log_normaliser, inclusion = tensors[:6]
    key, race_index, logit, peak, levels = tensors[6:]
    race = Race(key=key, index=race_index, logit=logit, rest=Mass(peak=peak, levels=levels))
    return Draw(
        index=index,
        log_prob=log_prob,
        weight=weight,
        num_drawn=num_drawn,
        scheme=scheme,
        log_normaliser=log_normaliser,
        noise=noise,
        race=None if scheme == "balanced" else race,
        inclusion=inclusion if scheme == "balanced" else None,
    )


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
        same_noise = tile.noise.seed == first.noise.seed and torch.equal(
            tile.noise.stream_ids, first.noise.stream_ids
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
    return _finish(merge_races(races, num_samples + 1), num_samples, first.noise, first.scheme)


def _finish(race: Race, num_samples: int, noise: Noise, scheme: Scheme) -> Draw:
    log_normaliser_B = race.log_total
    chosen = race.keep(num_samples)
    if scheme == "with_replacement":
        index_BN, logit_BN = _arrivals(chosen, noise)
    else:
        index_BN, logit_BN = chosen.index, chosen.logit
    log_q_BN = logit_BN - log_normaliser_B[:, None]
    weight_BN = weights_from_logs(log_q_BN, chosen.log_rest - log_normaliser_B, scheme)
    drawn_BN = logit_BN > _NEGATIVE_INFINITY
    return Draw(
        index=index_BN.masked_fill(~drawn_BN, 0),
        log_prob=log_q_BN.float(),
        weight=weight_BN.float(),
        num_drawn=drawn_BN.sum(dim=1),
        scheme=scheme,
        log_normaliser=log_normaliser_B,
        noise=noise,
        race=race,
    )


def _arrivals(race: Race, noise: Noise) -> tuple[Tensor, Tensor]:
    """First N arrivals (index, logit) when every position keeps arriving: N draws with replacement.

    Arrivals of rate w_i at each position make one Poisson process whose successive marks are independent with
    probabilities w / sum w. Whoever is among its first N arrivals has a first arrival among the N first ones.
    """
    num_rows, num_draws = race.index.shape
    arrival_N = torch.arange(num_draws, device=race.index.device)
    wait_BNN = exponentials(race.index[:, :, None], noise, arrival_N)
    times = [wait_BNN[..., 0]]
    for arrival in range(1, num_draws):  # one by one: a parallel sum would round by device
        times.append(times[-1] + wait_BNN[..., arrival])
    key_BNN = log(torch.stack(times, dim=-1)) - race.logit[:, :, None]
    key_BNN = key_BNN.masked_fill(race.logit[:, :, None] == _NEGATIVE_INFINITY, float("inf"))
    index_BNN = race.index[:, :, None].expand_as(key_BNN)
    first_BN = smallest_first(key_BNN.flatten(1), index_BNN.flatten(1))[:, :num_draws]
    logit_BNN = race.logit[:, :, None].expand_as(key_BNN)
    return index_BNN.reshape(num_rows, -1).gather(1, first_BN), logit_BNN.reshape(num_rows, -1).gather(
        1, first_BN
    )


def _finish_balanced(logits_BM: Tensor, num_samples: int, noise: Noise, map_shape: tuple[int, ...]) -> Draw:
    drawn = balanced_draw(logits_BM, num_samples, noise, map_shape)
    log_q_BN = drawn.logit - drawn.log_normaliser[:, None]
    unused_B = torch.zeros_like(drawn.log_normaliser)
    return Draw(
        index=drawn.index,
        log_prob=log_q_BN.float(),
        weight=weights_from_logs(log_q_BN, unused_B, "balanced", drawn.inclusion).float(),
        num_drawn=(drawn.logit > _NEGATIVE_INFINITY).sum(dim=1),
        scheme="balanced",
        log_normaliser=drawn.log_normaliser,
        noise=noise,
        inclusion=drawn.inclusion,
    )


def _check_shape(logits_BM: Tensor, num_samples: int) -> None:
    shape = tuple(logits_BM.shape)
    if logits_BM.ndim != 2 or 0 in shape or not logits_BM.is_floating_point():
        raise InputError(f"logits must be floating point (B, M), got {logits_BM.dtype} {shape}")
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise InputError(f"num_samples must be an integer of at least 1, got {num_samples!r}")


def _check_values(logits_BM: Tensor) -> None:
    shape = tuple(logits_BM.shape)
    largest_B = logits_BM.amax(dim=1)  # NaN wins over everything
    bad_B = ~(largest_B < float("inf"))
    if bool(bad_B.any()):
        row = int(bad_B.nonzero()[0])
        raise InputError(
            f"logits {shape}: row {row} contains {float(largest_B[row])}; finite or -inf expected"
        )
    empty_B = largest_B == _NEGATIVE_INFINITY
    if bool(empty_B.any()):
        row = int(empty_B.nonzero()[0])
        raise InputError(f"logits {shape}: row {row} has no drawable position, all are -inf")


def _check_seed(seed: int) -> int:
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


def _check_global_index(global_index: Tensor, logits_BM: Tensor) -> Tensor:
    shape = tuple(logits_BM.shape)
    if global_index.dtype != torch.int64 or tuple(global_index.shape) not in ((shape[1],), shape):
        got = f"{global_index.dtype} {tuple(global_index.shape)}"
        raise InputError(f"global_index must be int64 ({shape[1]},) or {shape}, got {got}")
    lowest, highest = global_index.aminmax()
    if int(lowest) < 0 or int(highest) >= _MAX_POSITIONS:
        raise InputError(f"global_index must lie in [0, {_MAX_POSITIONS})")
    return global_index.to(logits_BM.device)


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
