"""Leaving impossible positions out of the work: masked maps of slides are mostly empty.

Shapes: B rows, M positions, C positions kept per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ats_stream.kernels.arithmetic import PADDING_INDEX

_COMPACT_SHARE = 0.25  # consecutive positions share a counter, so a gathered one costs four times as much


def pack_drawable(logits_BM: Tensor) -> tuple[Tensor, Tensor | None]:
    """Pack the drawable positions of each row to the left: logits (B, C) and index (B, C) int64.

    Short rows end in -inf and :data:`PADDING_INDEX`. Maps that are not mostly empty come back as they are,
    with index None.

    >>> logits, index = pack_drawable(torch.tensor([[float("-inf")] * 5 + [2.0]]))
    >>> logits.tolist(), index.tolist()
    ([[2.0]], [[5]])
    """
    drawable_BM = logits_BM > float("-inf")
    count_B = drawable_BM.sum(dim=1)
    num_packed = int(count_B.max())
    if num_packed > _COMPACT_SHARE * logits_BM.shape[1]:
        return logits_BM, None
    row, column = drawable_BM.nonzero(as_tuple=True)
    first_B = count_B.cumsum(0) - count_B
    place = torch.arange(len(row), device=row.device) - first_B[row]
    index_BC = torch.full((len(count_B), num_packed), PADDING_INDEX, dtype=torch.int64, device=row.device)
    index_BC[row, place] = column
    packed_BC = logits_BM.new_full(index_BC.shape, float("-inf"))
    packed_BC[row, place] = logits_BM[row, column]
    return packed_BC, index_BC
