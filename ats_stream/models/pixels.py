"""From pixels to what a network was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ats_stream.errors import InputError
from ats_stream.kernels import normalisation

if TYPE_CHECKING:
    from collections.abc import Sequence

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Standardize(nn.Module):
    """``(x / max_value - mean) / std`` per channel of floating-point pixels (N, C, *space).

    The constants are no part of the state dict, so that names of weights stay those of the network. Raises
    InputError as :func:`ats_stream.kernels.normalisation` does.

    >>> import torch
    >>> Standardize([0.5], [0.25], max_value=255)(torch.tensor([[[0.0, 255.0]]])).tolist()
    [[[-2.0, 2.0]]]
    """

    scale_C: Tensor
    shift_C: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, max_value: float) -> None:
        super().__init__()
        scale_C, shift_C = normalisation(mean, std, max_value=max_value)
        self.register_buffer("scale_C", scale_C, persistent=False)
        self.register_buffer("shift_C", shift_C, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape and dtype."""
        if x.ndim < 3 or x.shape[1] != len(self.scale_C) or not x.is_floating_point():
            expected = f"floating point (N, {len(self.scale_C)}, *space)"
            raise InputError(f"pixels must be {expected}, got {x.dtype} {tuple(x.shape)}")
        wide = (-1, *[1] * (x.ndim - 2))
        return x * self.scale_C.to(x.dtype).view(wide) + self.shift_C.to(x.dtype).view(wide)
