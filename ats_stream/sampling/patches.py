"""Cutting patches out of tensors and out of sources that read them on demand.

Shapes: B rows, N draws, C channels, D axes of space, P pixels of a patch, Q = N P.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ats_stream.errors import InputError
from ats_stream.kernels import ChunkTable, gather_patches
from ats_stream.kernels.gather import is_worth_it
from ats_stream.kernels.gather_calls import OUTPUT_TYPES
from ats_stream.kernels.table import PIXEL_TYPES


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

_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def image_shape(source: PatchSource) -> tuple[int, ...]:
    """Size of the full-resolution image in pixels, without its channels."""
    return tuple(source.levels[0].shape[1:])


def check_view(x_low: Tensor) -> int:
    """Number of axes of space of a low-resolution view (B, C, *view); InputError unless 1 to 3."""
    if not isinstance(x_low, Tensor) or not 3 <= x_low.ndim <= 5 or 0 in x_low.shape:
        got = tuple(x_low.shape) if isinstance(x_low, Tensor) else type(x_low).__name__
        raise InputError(f"x_low must be a tensor (B, C, *view) with 1 to 3 axes of space, got {got}")
    return x_low.ndim - 2


def check_high_resolution(x_high: HighResolution, num_rows: int, num_axes: int) -> None:
    """Raise InputError unless ``x_high`` is (B, C, *space) or B sources, with ``num_axes`` axes of space."""
    expected = f"x_high must be a tensor (B, C, *space) or a list of B sources, with {num_axes} axes of space"
    if isinstance(x_high, Tensor):
        if x_high.ndim != num_axes + 2 or 0 in x_high.shape[1:]:
            raise InputError(f"{expected}, got {tuple(x_high.shape)}")
    elif not isinstance(x_high, Sequence) or not all(hasattr(one, "read_patches") for one in x_high):
        got = (
            [type(one).__name__ for one in x_high] if isinstance(x_high, Sequence) else type(x_high).__name__
        )
        raise InputError(f"{expected}, got {got}")
    else:
        for row, source in enumerate(x_high):
            if len(image_shape(source)) != num_axes:
                raise InputError(f"{expected}, got {tuple(source.levels[0].shape)} (C, *space) in row {row}")
    if len(x_high) != num_rows:
        raise InputError(f"x_high has {len(x_high)} rows, but {num_rows} are expected")


def cut_patches(
    x_high: HighResolution,
    offsets_BND: Tensor,
    patch_size: Sequence[int],
    *,
    fill: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the patches (B, N, C, *patch_size) that begin at ``offsets_BND`` (int64, pixels).

    ``x_high`` is a tensor (B, C, *space), through which gradients pass, or a list of B sources; the dtype
    stays, unless pixels are integers and a ``dtype`` is given, which they are then converted to, unscaled.
    Pixels outside the image are ``fill``. A tensor of uint8, uint16 or float32 pixels is cut by one kernel
    (:mod:`ats_stream.kernels.gather`) where that can run. Raises InputError if the shapes do not fit, and for
    a patch that is larger than its image on any axis.

    >>> cut_patches(torch.arange(3.0).view(1, 1, 3), torch.tensor([[[-1], [1]]]), (2,), fill=9)
    tensor([[[[9., 0.]],
    <BLANKLINE>
             [[1., 2.]]]])
    """
    sizes = tuple(patch_size)
    num_rows, _, num_axes = offsets_BND.shape
    if len(sizes) != num_axes:
        given = f"patch size {sizes} and offsets {tuple(offsets_BND.shape)} (B, N, D)"
        raise InputError(f"{given} do not fit together")
    check_high_resolution(x_high, num_rows, num_axes)
    if isinstance(x_high, Tensor):
        _check_patch_size(sizes, tuple(x_high.shape[2:]))
        return _cut_tensor(x_high, offsets_BND, sizes, fill, dtype)
    for source in x_high:
        _check_patch_size(sizes, image_shape(source))
    offsets = offsets_BND.cpu().numpy()
    rows = [
        torch.as_tensor(source.read_patches(0, offsets[row], sizes, fill=as_integer(fill)))
        for row, source in enumerate(x_high)
    ]
    if len({(one.dtype, one.shape) for one in rows}) != 1:
        kinds = ", ".join(f"{one.dtype} {tuple(one.shape)}" for one in rows)
        raise InputError(f"the sources of one batch must agree in dtype and channels, got {kinds}")
    return _converted(torch.stack(rows).to(offsets_BND.device), dtype)


def as_integer(fill: float) -> float:
    """Spell a whole number as an int, as sources of integer pixels expect."""
    return int(fill) if float(fill).is_integer() else fill


def on_bits(move: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``move(x)`` for an operation that only moves pixels; torch lacks most of them for uint16 to uint64.

    >>> on_bits(lambda x: x.flip(0), torch.tensor([1, 65535], dtype=torch.uint16))
    tensor([65535,     1], dtype=torch.uint16)
    """
    if x.dtype not in _SIGNED:
        return move(x)
    return move(x.view(_SIGNED[x.dtype])).view(x.dtype)


def inside_image(offsets_ND: Tensor, sizes: Sequence[int], space: Sequence[int]) -> Tensor:
    """Which pixels of the patches lie in the image: bool (N, *sizes).

    >>> inside_image(torch.tensor([[-1], [1]]), (2,), (3,)).tolist()
    [[False, True], [True, True]]
    """
    inside = torch.ones(len(offsets_ND), *sizes, dtype=torch.bool, device=offsets_ND.device)
    for axis, (length, size) in enumerate(zip(space, sizes, strict=True)):
        pixel_NS = offsets_ND[:, axis, None] + torch.arange(size, device=offsets_ND.device)
        within_NS = (pixel_NS >= 0) & (pixel_NS < length)
        inside &= within_NS.view(-1, *[1] * axis, size, *[1] * (len(sizes) - axis - 1))
    return inside


def _check_patch_size(sizes: tuple[int, ...], space: tuple[int, ...]) -> None:
    if any(size > length for size, length in zip(sizes, space, strict=True)):
        raise InputError(f"a patch of {sizes} pixels is larger than the image, {space}")


def _converted(patches: Tensor, dtype: torch.dtype | None) -> Tensor:
    return patches if dtype is None or patches.is_floating_point() else patches.to(dtype)


def _cut_tensor(
    x_high: Tensor, offsets_BND: Tensor, sizes: tuple[int, ...], fill: float, dtype: torch.dtype | None
) -> Tensor:
    output = x_high.dtype if dtype is None or x_high.is_floating_point() else dtype
    if not _has_kernel(x_high, output, sizes):
        return _converted(_gather_patches(x_high, offsets_BND, sizes, fill), dtype)
    num_rows, num_channels = x_high.shape[:2]
    num_draws = offsets_BND.shape[1]
    row_B = torch.arange(num_rows, device=x_high.device)
    one_C = torch.ones(num_channels, device=x_high.device)
    patches = gather_patches(
        ChunkTable.of_images(x_high.detach()),
        row_B.repeat_interleave(num_draws),
        offsets_BND.to(x_high.device).flatten(0, 1).contiguous(),
        sizes,
        one_C,
        -0.0 * one_C,  # 1 * x + -0 is x, of -0 too
        output,
        fill=fill,
    )
    return patches.view(num_rows, num_draws, *patches.shape[1:])


def _has_kernel(x_high: Tensor, output: torch.dtype, sizes: tuple[int, ...]) -> bool:
    """Whether the kernel can cut the patches, and faster than torch; the bits are the same."""
    if x_high.dtype not in PIXEL_TYPES or output not in OUTPUT_TYPES or not x_high.is_contiguous():
        return False
    if (x_high.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return False  # torch differentiates and fuses its own operations
    return is_worth_it(x_high.device, len(x_high) * x_high.shape[1] * math.prod(sizes))


def _gather_patches(x_high: Tensor, offsets_BND: Tensor, sizes: tuple[int, ...], fill: float) -> Tensor:
    num_rows, num_channels = x_high.shape[:2]
    num_draws = offsets_BND.shape[1]
    space = tuple(x_high.shape[2:])
    flat_BNP = offsets_BND.new_zeros(num_rows, num_draws, 1)
    inside_BQ = inside_image(offsets_BND.flatten(0, 1), sizes, space).view(num_rows, -1)
    for axis, (length, size) in enumerate(zip(space, sizes, strict=True)):
        pixel_BNS = offsets_BND[:, :, axis, None] + torch.arange(size, device=offsets_BND.device)
        step_BNS = pixel_BNS.clamp(0, length - 1)
        flat_BNP = (flat_BNP[..., :, None] * length + step_BNS[..., None, :]).flatten(2)
    num_pixels = math.prod(sizes)
    place_BCQ = flat_BNP.reshape(num_rows, 1, -1).expand(-1, num_channels, -1)
    pixels_BCQ = on_bits(lambda bits: bits.gather(2, place_BCQ), x_high.flatten(2))
    pixels_BCQ = torch.where(inside_BQ[:, None], pixels_BCQ, pixels_BCQ.new_full((), fill))
    return (
        pixels_BCQ.view(num_rows, num_channels, num_draws, num_pixels)
        .transpose(1, 2)
        .reshape(num_rows, num_draws, num_channels, *sizes)
    )
