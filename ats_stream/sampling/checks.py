"""Checks of values, which a compiled graph cannot act on."""

from __future__ import annotations

import torch
from torch import Tensor


def holds(condition: Tensor) -> bool:
    """Whether all values are true; inside torch.compile always True, because a graph cannot stop to look.

    What passes there unseen ends in NaN, which :func:`ats_stream.sampling.draw` refuses, compiled or not.

    >>> holds(torch.tensor([True, False]))
    False
    """
    return torch.compiler.is_compiling() or bool(condition.all())
