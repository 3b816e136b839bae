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

from ats_stream.sampling.philox import PURPOSE_CURVE, PURPOSE_OFFSET, Noise, unit_from_words


def balanced_draw(
    log_q_BM: Tensor, num_samples: int, noise: Noise, map_shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return index int64, inclusion float64 and drawn bool, all (B, N); padding is index 0, inclusion 1."""
    inclusion_BM = inclusion_probabilities(log_q_BM, num_samples)
    order_BM = curve_order(map_shape, noise)
    low_B1 = noise.words(torch.zeros(1, dtype=torch.int64, device=log_q_BM.device), PURPOSE_OFFSET + 1)
    high_B1 = noise.words(torch.zeros(1, dtype=torch.int64, device=log_q_BM.device), PURPOSE_OFFSET)
    offset_B = unit_from_words(high_B1, low_B1)[:, 0]
    index_BN = systematic_sample(inclusion_BM, order_BM, offset_B, num_samples)
    num_drawable_B1 = (log_q_BM > float("-inf")).sum(dim=1, keepdim=True)
    drawn_BN = torch.arange(num_samples, device=log_q_BM.device) < num_drawable_B1
    index_BN = index_BN.masked_fill(~drawn_BN, 0)
    inclusion_BN = inclusion_BM.gather(1, index_BN).masked_fill(~drawn_BN, 1.0)
    return index_BN, inclusion_BN, drawn_BN


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


def curve_order(map_shape: tuple[int, ...], noise: Noise) -> Tensor:
    """Row-major positions (B, M) along a Hilbert curve that is shifted and flipped anew for each stream."""
    device = noise.stream_ids.device
    num_axes = len(map_shape)
    num_bits = (2 * max(map_shape) - 1).bit_length()
    words_BD = noise.words(torch.arange(2 * num_axes, device=device), PURPOSE_CURVE)
    cell_MD = torch.cartesian_prod(*[torch.arange(size, device=device) for size in map_shape]).view(
        -1, num_axes
    )
    size_D = torch.tensor(map_shape, device=device)
    room_D = (1 << num_bits) - size_D + 1
    shift_BD = words_BD[:, :num_axes] % room_D
    flip_BD = words_BD[:, num_axes:] & 1
    cell_BMD = torch.where(flip_BD[:, None, :] == 1, size_D - 1 - cell_MD, cell_MD) + shift_BD[:, None, :]
    return hilbert_index(cell_BMD, num_bits).argsort(dim=1, stable=True)


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
