"""Cutting patches out of tensors and out of sources that read them on demand.

Shapes: B rows, N draws, C channels, D axes of space, P pixels of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ats_stream.errors import InputError


class PatchLevel(Protocol):
    """One resolution of a source."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, *space)."""


class PatchSource(Protocol):
    """An image that is never loaded whole: anything that reads patches, such as an opened pyramid."""

    @property
    def levels(self) -> Sequence[PatchLevel]:
        """Resolutions, the finest first."""

    def read_patches(self, level: int, offsets: Any, size: Sequence[int], *, fill: Any = 0) -> Any:
        """Return an array (N, C, *size) for an int64 array of offsets (N, D), filled outside the image."""


HighResolution = Tensor | Sequence[PatchSource]


def image_shape(source: PatchSource) -> tuple[int, ...]:
    """Size of the full-resolution image in pixels, without its channels."""
    return tuple(source.levels[0].shape[1:])


def cut_patches(
    x_high: HighResolution, offsets_BND: Tensor, patch_size: Sequence[int], *, fill: float = 0.0
) -> Tensor:
    """Return the patches (B, N, C, *patch_size) that begin at ``offsets_BND`` (int64, pixels).

    ``x_high`` is a tensor (B, C, *space), through which gradients pass, or a list of B sources; the dtype
    stays. Pixels outside the image are ``fill``. Raises InputError if the shapes do not fit.

    >>> cut_patches(torch.arange(3.0).view(1, 1, 3), torch.tensor([[[-1], [1]]]), (2,), fill=9)
    tensor([[[[9., 0.]],
    <BLANKLINE>
             [[1., 2.]]]])
    """
    sizes = tuple(patch_size)
    num_rows, _, num_axes = offsets_BND.shape
    if len(sizes) != num_axes or len(x_high) != num_rows:
        given = f"patch size {sizes}, {len(x_high)} images"
        raise InputError(f"{given} and offsets {tuple(offsets_BND.shape)} (B, N, D) do not fit together")
    if isinstance(x_high, Tensor):
        if x_high.ndim != num_axes + 2:
            shape = tuple(x_high.shape)
            raise InputError(f"x_high must be (B, C, *space) with {num_axes} axes of space, got {shape}")
        return _gather_patches(x_high, offsets_BND, sizes, fill)
    offsets = offsets_BND.cpu().numpy()
    outside = int(fill) if float(fill).is_integer() else fill  # sources of integers expect an integer
    rows = [
        torch.as_tensor(source.read_patches(0, offsets[row], sizes, fill=outside))
        for row, source in enumerate(x_high)
    ]
    if len({(one.dtype, one.shape) for one in rows}) != 1:
        kinds = ", ".join(f"{one.dtype} {tuple(one.shape)}" for one in rows)
        raise InputError(f"the sources of one batch must agree in dtype and channels, got {kinds}")
    return torch.stack(rows).to(offsets_BND.device)


def _gather_patches(x_high: Tensor, offsets_BND: Tensor, sizes: tuple[int, ...], fill: float) -> Tensor:
    num_rows, num_channels = x_high.shape[:2]
    num_draws = offsets_BND.shape[1]
    space = tuple(x_high.shape[2:])
    flat_BNP = offsets_BND.new_zeros(num_rows, num_draws, 1)
    inside_BNP = torch.ones_like(flat_BNP, dtype=torch.bool)
    for axis, (length, size) in enumerate(zip(space, sizes, strict=True)):
        pixel_BNS = offsets_BND[:, :, axis, None] + torch.arange(size, device=offsets_BND.device)
        within_BNS = (pixel_BNS >= 0) & (pixel_BNS < length)
        step_BNS = pixel_BNS.clamp(0, length - 1)
        flat_BNP = (flat_BNP[..., :, None] * length + step_BNS[..., None, :]).flatten(2)
        inside_BNP = (inside_BNP[..., :, None] & within_BNS[..., None, :]).flatten(2)
    num_pixels = math.prod(sizes)
    place_BCQ = flat_BNP.reshape(num_rows, 1, -1).expand(-1, num_channels, -1)
    pixels_BCQ = x_high.flatten(2).gather(2, place_BCQ)
    pixels_BCQ = torch.where(inside_BNP.reshape(num_rows, 1, -1), pixels_BCQ, pixels_BCQ.new_full((), fill))
    return (
        pixels_BCQ.view(num_rows, num_channels, num_draws, num_pixels)
        .transpose(1, 2)
        .reshape(num_rows, num_draws, num_channels, *sizes)
    )
