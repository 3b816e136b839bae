"""Balanced sampling: a systematic sample spread along a space-filling curve of the map.

Neighbouring patches look alike, so a sample whose members keep apart says more. Positions are laid out along
a Hilbert curve, each as an interval of length pi (its inclusion probability), and N equidistant points with
one uniform offset pick the intervals they fall into. No interval is longer than 1, so none is picked twice,
and each is picked with probability pi exactly.

Shapes: B rows, M positions, N draws, D axes of the map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ats_stream.sampling.geometry import unravel_index
from ats_stream.sampling.packing import pack_drawable
from ats_stream.sampling.philox import PURPOSE_CURVE, PURPOSE_OFFSET, Noise, unit_from_words


def balanced_draw(
    log_q_BM: Tensor, num_samples: int, noise: Noise, map_shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return index (B, N) int64, inclusion (B, N) float64, and how many (B,) were drawn.

    Rows with fewer drawable positions than N are padded with index 0, inclusion 1.
    """
    log_q_BC, index_BC = pack_drawable(log_q_BM)
    if index_BC is None:
        index_BC = torch.arange(log_q_BM.shape[1], device=log_q_BM.device).expand_as(log_q_BM)
    inclusion_BC = inclusion_probabilities(log_q_BC, num_samples)
    place_BC = curve_places(index_BC, map_shape, noise)
    order_BC = place_BC.argsort(dim=1, stable=True)
    purposes = torch.tensor([PURPOSE_OFFSET, PURPOSE_OFFSET + 1], device=log_q_BM.device)
    high_and_low_B2 = noise.words(torch.zeros_like(purposes), purposes)
    offset_B = unit_from_words(high_and_low_B2[:, 0], high_and_low_B2[:, 1])
    chosen_BN = systematic_sample(inclusion_BC, order_BC, offset_B, num_samples)
    num_drawn_B = (log_q_BC > float("-inf")).sum(dim=1).clamp(max=num_samples)
    padding_BN = torch.arange(num_samples, device=log_q_BM.device) >= num_drawn_B[:, None]
    index_BN = index_BC.gather(1, chosen_BN).masked_fill(padding_BN, 0)
    inclusion_BN = inclusion_BC.gather(1, chosen_BN).masked_fill(padding_BN, 1.0)
    return index_BN, inclusion_BN, num_drawn_B


def inclusion_probabilities(log_q_BM: Tensor, num_samples: int) -> Tensor:
    """pi = min(1, c q) (B, M) float64 with sum pi = num_samples; all ones where fewer positions are drawable.

    >>> inclusion_probabilities(torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log(), 2)
    tensor([[1.0000, 0.6667, 0.3333]], dtype=torch.float64)
    """
    num_positions = log_q_BM.shape[1]
    num_top = min(num_samples, num_positions)
    # only the N most probable can be capped: with the t largest capped, c = (N - t) / (mass of the others)
    top_BT, place_BT = log_q_BM.topk(num_top, dim=1)
    others_B = log_q_BM.scatter(1, place_BT, float("-inf")).logsumexp(dim=1)
    mass_BT = torch.cat([top_BT, others_B[:, None]], dim=1).flip(1).logcumsumexp(dim=1).flip(1)[:, :-1]
    left_T = num_samples - torch.arange(num_top, device=log_q_BM.device)
    log_scale_BT = left_T.double().log() - mass_BT
    # once nothing drawable is left the comparison is with NaN, and says capped
    capped_BT = (~(log_scale_BT + top_BT < 0)).long().cumprod(dim=1)
    num_capped_B1 = capped_BT.sum(dim=1, keepdim=True)
    log_scale_B1 = torch.where(
        num_capped_B1 < num_top, log_scale_BT.gather(1, num_capped_B1.clamp(max=num_top - 1)), 0.0
    )
    pi_BM = (log_q_BM + log_scale_B1).exp().clamp(max=1.0)
    some_BT = pi_BM.gather(1, place_BT)
    pi_BM = pi_BM.scatter(1, place_BT, torch.where(capped_BT.bool(), torch.ones_like(some_BT), some_BT))
    # all N places are taken by certain positions: nothing else may come in
    full_B1 = num_capped_B1 == num_top
    only_top_BM = torch.zeros_like(pi_BM).scatter(1, place_BT, (top_BT > float("-inf")).double())
    return torch.where(full_B1, only_top_BM, pi_BM)


def systematic_sample(inclusion_BM: Tensor, order_BM: Tensor, offset_B: Tensor, num_samples: int) -> Tensor:
    """Positions (B, N) whose intervals, laid out in ``order_BM``, hold the points offset + 0, 1, ..., N - 1.

    Rows whose inclusions sum to less than N repeat their last position at the end.
    """
    end_BM = inclusion_BM.gather(1, order_BM).cumsum(dim=1)
    point_BN = offset_B[:, None] + torch.arange(num_samples, device=offset_B.device)
    place_BN = torch.searchsorted(end_BM, point_BN, right=True)
    # the last end may fall short of N by rounding
    num_positions = inclusion_BM.shape[1]
    step_M = torch.arange(num_positions, device=offset_B.device)
    last_B1 = torch.where(inclusion_BM.gather(1, order_BM) > 0, step_M, 0).amax(dim=1, keepdim=True)
    return order_BM.gather(1, torch.minimum(place_BN, last_B1))


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
