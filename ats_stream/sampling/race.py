"""The exponential race: who arrives first, over maps of any size, in pieces of any kind.

Position i with weight w_i = e^{logit_i} arrives at time E_i / w_i, E_i a unit exponential of its own. The
order of arrival is a draw without replacement from softmax(logits) (the Plackett-Luce law; Efraimidis &
Spirakis 2006; the Gumbel-top-k trick in other words). Times are kept as logarithms,

    key_i = log E_i - logit_i        E_i = -log(1 - u_i)        smallest first, ties to the lower index

so no normaliser is needed and tiles of a map merge exactly, and so do the masses of those left behind.

CPU tensors of some size and CUDA tensors go through the operator of :mod:`ats_stream.kernels.sample`, all
others through torch, which is also what the operator is tested against: all give the same bits.

Shapes: B rows, M positions, P positions of one block, K arrivals kept.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ats_stream.errors import InputError
from ats_stream.kernels.arithmetic import PADDING_INDEX
from ats_stream.kernels.sample import is_handled, sample_race
from ats_stream.sampling.logarithm import log, minus_log1m
from ats_stream.sampling.mass import Mass
from ats_stream.sampling.packing import pack_drawable
from ats_stream.sampling.philox import Noise, unit_from_words

if TYPE_CHECKING:
    from collections.abc import Iterator

Order = Literal["race", "logit"]

_BLOCK_VALUES = 1 << 17  # rows * positions handled at once
_SPARE_CANDIDATES = 8
_BOUND_MARGIN = 1e-9  # covers the last places in which a library's log differs from ours


@dataclass(frozen=True, kw_only=True)
class Race:
    """The K first arrivals of each row and what is left behind. Short rows end in key +inf, logit -inf."""

    key: Tensor
    """(B, K) float64, ascending."""
    index: Tensor
    """(B, K) int64 global indices."""
    logit: Tensor
    """(B, K) float64."""
    rest: Mass
    """The mass of all other positions."""
    logs: Tensor | None = None
    """(2, B) float64, where it is known already: ``log_total``, and ``log_behind(K - 1)``."""

    @property
    def num_kept(self) -> int:
        """K."""
        return self.key.shape[1]

    @property
    def log_rest(self) -> Tensor:
        """(B,) float64: log-sum-exp of the logits of all other positions."""
        return self.rest.log()

    @property
    def log_total(self) -> Tensor:
        """(B,) float64: log-sum-exp of the logits of all positions."""
        if self.logs is not None:
            return self.logs[0]
        return self.rest.plus(Mass.of(self.logit)).log()

    def log_behind(self, num_kept: int) -> Tensor:
        """(B,) float64: log-sum-exp of the logits of all positions but the first ``num_kept`` arrivals."""
        if self.logs is not None and num_kept == self.num_kept - 1:
            return self.logs[1]
        return self.keep(num_kept).log_rest

    def keep(self, num_kept: int) -> Race:
        """Return the race with only its first ``num_kept`` arrivals; the others join the rest."""
        if num_kept >= self.num_kept:
            return self
        return Race(
            key=self.key[:, :num_kept],
            index=self.index[:, :num_kept],
            logit=self.logit[:, :num_kept],
            rest=self.rest.plus(Mass.of(self.logit[:, num_kept:])),
        )


def run_race(
    logits_BM: Tensor,
    num_kept: int,
    noise: Noise,
    *,
    order: Order = "race",
    global_index: Tensor | None = None,
) -> Race:
    """Return the ``num_kept`` first arrivals of each row; ``order="logit"`` ranks by logit without noise.

    ``global_index`` (M,) or (B, M) names the positions; by default they are 0..M-1. Raises InputError for NaN
    or +inf logits and for a row with no drawable position.
    """
    shape = tuple(logits_BM.shape)
    if is_handled(logits_BM, num_kept):
        found = sample_race(
            logits_BM,
            num_kept,
            seed=noise.seed_on(logits_BM.device),
            stream_ids_B=noise.stream_ids,
            by_logit=order == "logit",
            global_index=global_index,
        )
        _check_largest(found.largest, shape)
        rest = Mass(peak=found.peak, levels=found.levels)
        return Race(key=found.key, index=found.index, logit=found.logit, rest=rest, logs=found.logs)
    _check_largest(logits_BM.amax(dim=1), shape)  # NaN wins over everything
    best: Race | None = None
    for logits_BP, index in blocks(logits_BM, global_index):
        race = _run_block(logits_BP.double(), index, num_kept, noise, order)
        best = race if best is None else merge_races([best, race], num_kept)
    assert best is not None
    return best


def _check_largest(largest_B: Tensor, shape: tuple[int, ...]) -> None:
    """Raise InputError for rows whose largest logit says that they cannot be drawn from."""
    largest = largest_B.tolist()  # on CUDA the one time that a draw waits
    for row, value in enumerate(largest):
        if not value < float("inf"):
            raise InputError(f"logits {shape}: row {row} contains {value}; finite or -inf expected")
    if float("-inf") in largest:
        row = largest.index(float("-inf"))
        raise InputError(f"logits {shape}: row {row} has no drawable position, all are -inf")


def merge_races(races: list[Race], num_kept: int) -> Race:
    """Return the first arrivals over disjoint sets of positions, given those of each."""
    if len(races) == 1:
        return races[0].keep(num_kept)
    key_BK = torch.cat([race.key for race in races], dim=1)
    index_BK = torch.cat([race.index for race in races], dim=1)
    logit_BK = torch.cat([race.logit for race in races], dim=1)
    order_BK = smallest_first(key_BK, index_BK)
    return Race(
        key=key_BK.gather(1, order_BK),
        index=index_BK.gather(1, order_BK),
        logit=logit_BK.gather(1, order_BK),
        rest=functools.reduce(Mass.plus, [race.rest for race in races]),
    ).keep(num_kept)


def smallest_first(key_BP: Tensor, index_BP: Tensor) -> Tensor:
    """Positions (B, P) that sort by key, equal keys by index."""
    by_index_BP = index_BP.argsort(dim=1, stable=True)
    by_key_BP = key_BP.gather(1, by_index_BP).argsort(dim=1, stable=True)
    return by_index_BP.gather(1, by_key_BP)


def exponentials(index: Tensor, noise: Noise, arrival: int | Tensor = 0) -> Tensor:
    """Unit exponentials E, float64: the wait for arrival number ``arrival`` at each ``index`` (B, P, ...)."""
    first = torch.as_tensor(2 * arrival, device=index.device)
    high_and_low = noise.words(index[..., None], torch.stack([first, first + 1], dim=-1))
    return minus_log1m(unit_from_words(*high_and_low.unbind(dim=-1)))


def blocks(logits_BM: Tensor, global_index: Tensor | None) -> Iterator[tuple[Tensor, Tensor | int]]:
    """Cut the map into blocks, packed where mostly empty; with each its index, or the first one of a run."""
    num_rows, num_positions = logits_BM.shape
    block = max(_BLOCK_VALUES // num_rows // 4 * 4, 4096)
    for start in range(0, num_positions, block):
        part_BP = logits_BM[:, start : start + block]
        if global_index is not None:
            yield part_BP, global_index[..., start : start + block]
            continue
        packed_BC, index_BC = pack_drawable(part_BP)
        if index_BC is None:
            yield part_BP, start
        elif start == 0 or index_BC.shape[1] > 0:
            yield packed_BC, index_BC + start


def _run_block(logits_BP: Tensor, index: Tensor | int, num_kept: int, noise: Noise, order: Order) -> Race:
    if isinstance(index, int):
        index_P = torch.arange(index, index + logits_BP.shape[1], device=logits_BP.device)
        index_BP = index_P.expand_as(logits_BP)
    else:
        index_BP = index.expand_as(logits_BP)
    race = _run_candidates(logits_BP, index_BP, index, num_kept, noise) if order == "race" else None
    if race is not None:
        return race
    key_BP = -logits_BP if order == "logit" else _keys(logits_BP, index_BP, noise)
    return _race_of(logits_BP, index_BP, key_BP, None, num_kept)


def _keys(logits_BP: Tensor, index_BP: Tensor, noise: Noise) -> Tensor:
    key_BP = log(exponentials(index_BP, noise)) - logits_BP
    return key_BP.masked_fill(logits_BP == float("-inf"), float("inf"))


def _run_candidates(
    logits_BP: Tensor, index_BP: Tensor, index: Tensor | int, num_kept: int, noise: Noise
) -> Race | None:
    """Run the race among few positions that surely hold the first arrivals; None if that is not sure.

    The candidates come from the high words alone: u >= high 2^-32, so log(-log(1 - high 2^-32)) - logit
    bounds the key from below. Once ``num_kept`` true keys lie under the largest bound of a candidate, nobody
    else can arrive earlier.
    """
    num_candidates = num_kept + _SPARE_CANDIDATES
    if logits_BP.shape[1] <= 4 * num_candidates:
        return None
    if isinstance(index, int):
        high_BP = noise.range_words(index, index + logits_BP.shape[1], 0)
    else:
        high_BP = noise.words(index, 0)
    bound_BP = (high_BP.double() * -(2.0**-32)).log1p_().neg_().log_().sub_(logits_BP)
    bound_BP.masked_fill_(logits_BP == float("-inf"), float("inf"))
    bound_BC, place_BC = bound_BP.topk(num_candidates, dim=1, largest=False)
    key_BC = _keys(logits_BP.gather(1, place_BC), index_BP.gather(1, place_BC), noise)
    last_kept_B = key_BC.kthvalue(num_kept, dim=1).values
    largest_bound_B = bound_BC.amax(dim=1)
    # a bound of +inf among the candidates says that they hold every drawable position
    margin_B = _BOUND_MARGIN * (1 + last_kept_B.abs())
    sure_B = (last_kept_B + margin_B < largest_bound_B) | (largest_bound_B == float("inf"))
    return _race_of(logits_BP, index_BP, key_BC, place_BC, num_kept) if bool(sure_B.all()) else None


def _race_of(
    logits_BP: Tensor, index_BP: Tensor, key_BC: Tensor, place_BC: Tensor | None, num_kept: int
) -> Race:
    """Keep the first arrivals among ``place_BC`` (None: among all positions), padded to ``num_kept``."""
    index_BC = index_BP if place_BC is None else index_BP.gather(1, place_BC)
    chosen_BK = smallest_first(key_BC, index_BC)[:, :num_kept]
    key_BK = key_BC.gather(1, chosen_BK)
    if place_BC is not None:
        chosen_BK = place_BC.gather(1, chosen_BK)
    logit_BK = logits_BP.gather(1, chosen_BK)
    index_BK = index_BP.gather(1, chosen_BK).masked_fill(logit_BK == float("-inf"), PADDING_INDEX)
    missing = max(num_kept - chosen_BK.shape[1], 0)
    return Race(
        key=pad(key_BK, (0, missing), value=float("inf")),
        index=pad(index_BK, (0, missing), value=PADDING_INDEX),
        logit=pad(logit_BK, (0, missing), value=float("-inf")),
        rest=Mass.of(logits_BP.scatter(1, chosen_BK, float("-inf"))),
    )
