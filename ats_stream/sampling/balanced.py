"""Balanced sampling: a systematic sample spread along a space-filling curve of the map.

Neighbouring patches look alike, so a sample whose members keep apart says more. Positions are laid out along
a Hilbert curve, each as an interval of length pi (its inclusion probability), and N equidistant points with
one uniform offset pick the intervals they fall into. No interval is longer than 1, so none is picked twice,
and each is picked with probability pi exactly.

Lengths are whole numbers of small units, so their sums are exact: the map is gone through in blocks, first
for the length of each piece of the curve, then for the positions of the few pieces that points fall into.
Beside the logits this keeps two bytes a position, and some for the positions of those pieces.

Shapes: B rows, M positions, P positions of one block, S pieces of the curve, C candidates, N draws, D axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ats_stream.sampling.geometry import unravel_index
from ats_stream.sampling.logarithm import exp
from ats_stream.sampling.philox import PURPOSE_CURVE, PURPOSE_OFFSET, Noise, unit_from_words
from ats_stream.sampling.race import Race, blocks, run_race

if TYPE_CHECKING:
    from collections.abc import Iterator

_NEGATIVE_INFINITY = float("-inf")
_LARGEST_PIECE = 32767  # pieces are numbered in int16
_PIECES_PER_DRAW = 64


@dataclass(frozen=True, kw_only=True)
class BalancedDraw:
    """What a balanced draw gives for each row. Padding has index 0, logit -inf, inclusion 1."""

    index: Tensor
    """(B, N) int64."""
    logit: Tensor
    """(B, N) float64."""
    inclusion: Tensor
    """(B, N) float64."""
    log_normaliser: Tensor
    """(B,) float64."""


@dataclass(frozen=True, kw_only=True)
class Inclusion:
    """The rule pi = min(1, c q), sum pi = N, in whole units of 2^-bits."""

    log_scale: Tensor
    """(B,) float64: pi = exp(logit + log_scale), unless certain."""
    cut_logit: Tensor
    """(B,) float64: what comes first by logit, up to the position of this logit ..."""
    cut_index: Tensor
    """(B,) int64: ... and this index, is certain; equal logits by index."""
    is_full: Tensor
    """(B,) bool: certain positions take all N places, nothing else may come in."""
    bits: int

    @staticmethod
    def of(top: Race, num_samples: int) -> Inclusion:
        """Find the rule from the N largest logits and the mass of all others."""
        # only the N largest can be capped: with t of them capped, c = (N - t) / (mass of the others)
        left_N = torch.arange(num_samples, 0, -1, device=top.logit.device)
        upwards_BK = torch.cat([top.logit, top.log_rest[:, None]], dim=1).flip(1)
        log_scale_BN = left_N.double().log() - upwards_BK.logcumsumexp(dim=1).flip(1)[:, :-1]
        # once nothing drawable is left the comparison is with NaN, and says capped
        is_capped_BN = (~(log_scale_BN + top.logit < 0)).long().cumprod(dim=1)
        num_capped_B1 = is_capped_BN.sum(dim=1, keepdim=True)
        last_B1 = (num_capped_B1 - 1).clamp(min=0)
        has_none_B1 = num_capped_B1 == 0
        return Inclusion(
            log_scale=log_scale_BN.gather(1, num_capped_B1.clamp(max=num_samples - 1)).squeeze(1),
            cut_logit=top.logit.gather(1, last_B1).masked_fill(has_none_B1, float("inf")).squeeze(1),
            cut_index=top.index.gather(1, last_B1).masked_fill(has_none_B1, -1).squeeze(1),
            is_full=(num_capped_B1 == num_samples).squeeze(1),
            bits=min(53, 62 - num_samples.bit_length()),
        )

    def units(self, logits: Tensor, index: Tensor, row: Tensor) -> Tensor:
        """Whole units, int64, of positions with float64 logits; ``row`` tells whose they are."""
        cut_logit = self.cut_logit[row]
        is_certain = (logits > cut_logit) | ((logits == cut_logit) & (index <= self.cut_index[row]))
        log_pi = (logits + self.log_scale[row]).nan_to_num(nan=_NEGATIVE_INFINITY).clamp(max=0.0)
        units = (exp(log_pi) * 2.0**self.bits).round().long()
        units = units.masked_fill(self.is_full[row], 0).masked_fill(is_certain, 1 << self.bits)
        return units.masked_fill(logits == _NEGATIVE_INFINITY, 0)


def balanced_draw(
    logits_BM: Tensor, num_samples: int, noise: Noise, map_shape: tuple[int, ...]
) -> BalancedDraw:
    """Draw ``num_samples`` positions of each row; all drawable ones where there are fewer."""
    device = logits_BM.device
    num_rows, num_positions = logits_BM.shape
    top = run_race(logits_BM, num_samples, noise, order="logit")
    rule = Inclusion.of(top, num_samples)
    row_B1 = torch.arange(num_rows, device=device)[:, None]

    # cut the curve at the places of some positions of the map
    num_pieces = min(num_positions, num_samples * _PIECES_PER_DRAW, _LARGEST_PIECE)
    sample_S = torch.arange(num_pieces - 1, device=device) * num_positions // num_pieces
    cuts_BS = curve_places(sample_S.expand(num_rows, -1), map_shape, noise).sort(dim=1).values
    length_BS, pieces = _lengths(logits_BM, cuts_BS, rule, map_shape, noise)

    high_and_low_B2 = noise.words(
        torch.zeros(2, dtype=torch.int64, device=device),
        torch.tensor([PURPOSE_OFFSET, PURPOSE_OFFSET + 1], device=device),
    )
    offset_B = unit_from_words(high_and_low_B2[:, 0], high_and_low_B2[:, 1])
    point_BN = equidistant_points(offset_B, num_samples, rule.bits)
    is_hit_BS = torch.zeros_like(length_BS, dtype=torch.bool)
    is_hit_BS.scatter_(1, intervals_of(length_BS, point_BN), True)
    skipped_BS = length_BS.masked_fill(is_hit_BS, 0).cumsum(dim=1)

    index_BC, logit_BC = _candidates(logits_BM, pieces, is_hit_BS)
    # padding comes last
    place_BC = curve_places(index_BC, map_shape, noise).masked_fill(
        logit_BC == _NEGATIVE_INFINITY, torch.iinfo(torch.int64).max
    )
    units_BC = rule.units(logit_BC, index_BC, row_B1)
    order_BC = place_BC.argsort(dim=1)
    units_BC = units_BC.gather(1, order_BC)
    piece_BC = torch.searchsorted(cuts_BS, place_BC.gather(1, order_BC), right=True)
    # where the pieces that no point falls into lie between, points have come this much further
    gap_BC = skipped_BS.gather(1, piece_BC)
    chosen_BN = order_BC.gather(1, intervals_of(units_BC, point_BN, gap_BC))

    num_drawn_B = (top.logit > _NEGATIVE_INFINITY).sum(dim=1)
    padding_BN = torch.arange(num_samples, device=device) >= num_drawn_B[:, None]
    chosen_logit_BN = logit_BC.gather(1, chosen_BN)
    chosen_index_BN = index_BC.gather(1, chosen_BN)
    inclusion_BN = rule.units(chosen_logit_BN, chosen_index_BN, row_B1).double() * 2.0**-rule.bits
    return BalancedDraw(
        index=chosen_index_BN.masked_fill(padding_BN, 0),
        logit=chosen_logit_BN.masked_fill(padding_BN, _NEGATIVE_INFINITY),
        inclusion=inclusion_BN.masked_fill(padding_BN, 1.0),
        log_normaliser=top.log_total,
    )


def _lengths(
    logits_BM: Tensor, cuts_BS: Tensor, rule: Inclusion, map_shape: tuple[int, ...], noise: Noise
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Length (B, S) of each piece between cuts of the curve; of each block, in which piece positions lie."""
    device = logits_BM.device
    num_rows, num_positions = logits_BM.shape
    row_B1 = torch.arange(num_rows, device=device)[:, None]
    length_BS = torch.zeros(num_rows, cuts_BS.shape[1] + 1, dtype=torch.int64, device=device)
    # one tensor for all: blocks of their own among freed ones would tear the heap apart
    piece_BM = torch.empty(num_rows, num_positions, dtype=torch.int16, device=device)
    widths: list[int] = []
    for part_BP, index_BP in _indexed_blocks(logits_BM):
        place_BP = curve_places(index_BP, map_shape, noise)
        piece_BP = torch.searchsorted(cuts_BS, place_BP, right=True)
        length_BS.scatter_add_(1, piece_BP, rule.units(part_BP.double(), index_BP, row_B1))
        piece_BM[:, sum(widths) : sum(widths) + piece_BP.shape[1]] = piece_BP
        widths.append(piece_BP.shape[1])
    return length_BS, torch.split(piece_BM[:, : sum(widths)], widths, dim=1)


def _candidates(logits_BM: Tensor, pieces: tuple[Tensor, ...], is_hit_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Index and logit (B, C) of the drawable positions in the pieces that were hit."""
    rows, indices, logits = [], [], []
    for (part_BP, index_BP), piece_BP in zip(_indexed_blocks(logits_BM), pieces, strict=True):
        is_candidate_BP = is_hit_BS.gather(1, piece_BP.long()) & (part_BP > _NEGATIVE_INFINITY)
        row, column = is_candidate_BP.nonzero(as_tuple=True)
        rows.append(row)
        indices.append(index_BP[row, column])
        logits.append(part_BP[row, column].double())
    return _by_row(torch.cat(rows), torch.cat(indices), torch.cat(logits), len(logits_BM))


def inclusion_units(logits_BM: Tensor, num_samples: int) -> tuple[Tensor, int]:
    """Inclusion probabilities (B, M) of all positions of small maps, in whole units of 2^-bits, and the bits.

    >>> units_BM, bits = inclusion_units(torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log(), 2)
    >>> units_BM * 2.0**-bits
    tensor([[1.0000, 0.6667, 0.3333]])
    """
    row_B = torch.arange(len(logits_BM), device=logits_BM.device)
    index_M = torch.arange(logits_BM.shape[1], device=logits_BM.device)
    top = run_race(logits_BM, num_samples, Noise(seed=0, stream_ids=row_B), order="logit")
    rule = Inclusion.of(top, num_samples)
    return rule.units(logits_BM.double(), index_M.expand_as(logits_BM), row_B[:, None]), rule.bits


def equidistant_points(offset_B: Tensor, num_samples: int, bits: int) -> Tensor:
    """Points offset + 0, 1, ..., N - 1 (B, N) in whole units of 2^-bits."""
    step_N = torch.arange(num_samples, device=offset_B.device) << bits
    return (offset_B[:, None] * 2.0**bits).floor().long() + step_N


def intervals_of(length_BC: Tensor, point_BN: Tensor, gap_BC: Tensor | None = None) -> Tensor:
    """Number (B, N) of the interval that holds each point, among intervals laid end to end.

    ``gap_BC``, not decreasing, is what is left out before each interval. Points beyond the last interval fall
    into the last one that is not empty.

    >>> intervals_of(torch.tensor([[4, 0, 3]]), torch.tensor([[0, 3, 4, 9]])).tolist()
    [[0, 0, 2, 2]]
    """
    end_BC = length_BC.cumsum(dim=1)
    if gap_BC is not None:
        end_BC = end_BC + gap_BC
    number_C = torch.arange(length_BC.shape[1], device=length_BC.device)
    last_B1 = torch.where(length_BC > 0, number_C, 0).amax(dim=1, keepdim=True)
    return torch.minimum(torch.searchsorted(end_BC, point_BN, right=True), last_B1)


def _indexed_blocks(logits_BM: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for part_BP, index in blocks(logits_BM, None):
        if isinstance(index, int):
            index_P = torch.arange(index, index + part_BP.shape[1], device=part_BP.device)
            yield part_BP, index_P.expand_as(part_BP)
        else:
            yield part_BP, index


def _by_row(row: Tensor, index: Tensor, logit: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Lists of all rows as matrices (B, C), padded with index 0 and logit -inf."""
    order = row.argsort(stable=True)
    row, index, logit = row[order], index[order], logit[order]
    count_B = torch.bincount(row, minlength=num_rows)
    column = torch.arange(len(row), device=row.device) - (count_B.cumsum(0) - count_B)[row]
    index_BC = torch.zeros(num_rows, int(count_B.max()), dtype=torch.int64, device=row.device)
    logit_BC = torch.full_like(index_BC, _NEGATIVE_INFINITY, dtype=torch.float64)
    index_BC[row, column] = index
    logit_BC[row, column] = logit
    return index_BC, logit_BC


def curve_places(index_BC: Tensor, map_shape: tuple[int, ...], noise: Noise) -> Tensor:
    """Places (B, C) of row-major positions on a Hilbert curve, shifted and flipped anew for each stream.

    The curve fills a cube of at least twice the map's longest side, so the map lies at a random spot of it.
    """
    device = index_BC.device
    num_axes = len(map_shape)
    num_bits = (2 * max(map_shape) - 1).bit_length()
    words_BD = noise.words(torch.arange(2 * num_axes, device=device), PURPOSE_CURVE)
    cells = []
    for axis, cell_BC in enumerate(unravel_index(index_BC, map_shape)):
        size = map_shape[axis]
        shift_B1 = words_BD[:, axis, None] % ((1 << num_bits) - size + 1)
        is_flipped_B1 = words_BD[:, num_axes + axis, None] & 1 == 1
        cells.append(torch.where(is_flipped_B1, size - 1 - cell_BC, cell_BC) + shift_B1)
    return hilbert_index(torch.stack(cells, dim=-1), num_bits)


def hilbert_index(cell: Tensor, num_bits: int) -> Tensor:
    """Place of integer cells (..., D) in [0, 2^num_bits) on the D-dimensional Hilbert curve, int64.

    Skilling's transform ("Programming the Hilbert curve", AIP Conf. Proc. 707, 2004). Consecutive places are
    neighbours.

    >>> hilbert_index(torch.tensor([[0, 0], [0, 1], [1, 1], [1, 0]]), 1)
    tensor([0, 1, 2, 3])
    """
    axes = list(cell.unbind(-1))
    bit = 1 << (num_bits - 1)
    while bit > 1:
        low_bits = bit - 1
        for axis in range(len(axes)):
            is_set = (axes[axis] & bit) != 0
            swap = (axes[0] ^ axes[axis]) & low_bits
            first = torch.where(is_set, axes[0] ^ low_bits, axes[0] ^ swap)
            if axis > 0:
                axes[axis] = torch.where(is_set, axes[axis], axes[axis] ^ swap)
            axes[0] = first
        bit >>= 1
    for axis in range(1, len(axes)):
        axes[axis] = axes[axis] ^ axes[axis - 1]
    gray = torch.zeros_like(axes[0])
    bit = 1 << (num_bits - 1)
    while bit > 1:
        gray = torch.where((axes[-1] & bit) != 0, gray ^ (bit - 1), gray)
        bit >>= 1
    index = torch.zeros_like(axes[0])
    for position in range(num_bits - 1, -1, -1):
        for coordinate in axes:
            index = (index << 1) | (((coordinate ^ gray) >> position) & 1)
    return index
