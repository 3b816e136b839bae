"""The gather in torch alone, for the CPU without numba: plain, slow, and the same bits.

Shapes: N patches, C channels, Z Y X the patch (missing axes count 1), P pixels of a patch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ats_stream.kernels.orientation import NUM_AXES, SOURCES
from ats_stream.kernels.rounding import fma_float32

if TYPE_CHECKING:
    from ats_stream.kernels.gather_cpu import Request

_PIXELS_AT_ONCE = 1 << 18
_VALUES_AT_ONCE = 1 << 17  # 1 MiB of float64


def convert(
    crops_NCP: torch.Tensor, scale_C: torch.Tensor, shift_C: torch.Tensor, out_NCP: torch.Tensor
) -> None:
    """Fill ``out_NCP`` with crops as they are; ``out_NCP`` may have any strides."""
    if crops_NCP.dtype == torch.uint8:
        _look_up(crops_NCP, scale_C, shift_C, out_NCP)
    else:
        _compute(crops_NCP, scale_C, shift_C, out_NCP)


def _compute(
    crops_NCP: torch.Tensor, scale_C: torch.Tensor, shift_C: torch.Tensor, out_NCP: torch.Tensor
) -> None:
    step = max(1, _VALUES_AT_ONCE // crops_NCP[0].numel())
    for start in range(0, len(crops_NCP), step):
        chunk = slice(start, start + step)
        out_NCP[chunk] = fma_float32(crops_NCP[chunk], scale_C[:, None], shift_C[:, None])


def _look_up(
    crops_NCP: torch.Tensor, scale_C: torch.Tensor, shift_C: torch.Tensor, out_NCP: torch.Tensor
) -> None:
    """A byte has 256 values: compute each once for a channel, then only copy. Five times faster."""
    bytes_1CV = torch.arange(256, dtype=torch.uint8).expand(1, len(scale_C), 256)
    table_1CV = torch.empty(bytes_1CV.shape, dtype=out_NCP.dtype)
    _compute(bytes_1CV, scale_C, shift_C, table_1CV)
    # numpy has no bfloat16; a copy needs the width alone
    width = torch.int32 if out_NCP.element_size() == 4 else torch.int16
    table, crops, out = table_1CV[0].view(width).numpy(), crops_NCP.numpy(), out_NCP.view(width).numpy()
    for channel in range(len(table)):
        # no byte is out of range; "clip" spares numpy a buffered copy that its check would need
        np.take(table[channel], crops[:, channel], out=out[:, channel], mode="clip")


def gather(request: Request, out_NCP: torch.Tensor) -> None:
    """Fill ``out_NCP``, which may have any strides."""
    num_patches, num_channels, num_pixels = out_NCP.shape
    step = max(1, _PIXELS_AT_ONCE // (num_channels * num_pixels))
    for first in range(0, num_patches, step):
        rows = slice(first, min(first + step, num_patches))
        x_NCP, inside_N1P = _pixels(request, rows)
        if request.intensity_N2 is not None:
            gain_N11, offset_N11 = request.intensity_N2[rows, :, None, None].unbind(1)
            changed_NCP = x_NCP * gain_N11 + offset_N11
            if request.top:
                changed_NCP = (changed_NCP.round() + 0.0).clamp(0, request.top)  # an integer knows no -0
            x_NCP = changed_NCP
        x_NCP = torch.where(inside_N1P, x_NCP, torch.tensor(request.fill, dtype=torch.float32))
        out_NCP[rows] = fma_float32(x_NCP, request.scale_C[:, None], request.shift_C[:, None])


def _pixels(request: Request, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixels as float32 (N, C, P), and which of them lie in the image (N, 1, P)."""
    row_N7 = request.images_I7[request.image_N[rows]]
    offset_N3 = request.offsets_N3[rows]
    num_rows = len(row_N7)
    source_N3, flip_N3 = _moves(request, rows, num_rows)
    output_P3 = torch.cartesian_prod(*(torch.arange(side) for side in request.size)).view(-1, NUM_AXES)
    size_3 = torch.tensor(request.size)
    along_NP3 = torch.where(flip_N3[:, None], size_3 - 1 - output_P3, output_P3)
    # position on each axis of the image: that of the axis of the patch which runs along it
    place_NP3 = torch.empty_like(along_NP3)
    place_NP3.scatter_(2, source_N3[:, None].expand_as(along_NP3), along_NP3)
    size_N3 = torch.empty_like(source_N3).scatter_(1, source_N3, size_3.expand(num_rows, -1))
    space_N3, grid_N3 = row_N7[:, 1:4], row_N7[:, 4:7]
    # far outside, where sums of positions could overflow
    near_N = ((offset_N3 > -size_N3) & (offset_N3 < space_N3)).all(dim=1)
    position_NP3 = place_NP3 + torch.where(near_N[:, None], offset_N3, torch.zeros_like(offset_N3))[:, None]
    inside_NP = ((position_NP3 >= 0) & (position_NP3 < space_N3[:, None])).all(dim=2) & near_N[:, None]
    position_NP3 = torch.where(inside_NP[..., None], position_NP3, torch.zeros_like(position_NP3))
    chunk_3 = torch.tensor(request.chunk)
    cell_NP3 = position_NP3 // chunk_3
    rest_NP = ((position_NP3 - cell_NP3 * chunk_3) * torch.tensor(request.next_element[1:])).sum(dim=2)
    entry_NP = row_N7[:, :1] + (cell_NP3[..., 0] * grid_N3[:, 1:2] + cell_NP3[..., 1]) * grid_N3[:, 2:3]
    entry_NP = entry_NP + cell_NP3[..., 2]
    channel_C = torch.arange(len(request.scale_C))
    part_C = channel_C // request.chunk_channels
    entry_NCP = entry_NP[:, None] + (part_C * grid_N3.prod(dim=1, keepdim=True))[..., None]
    start_NCP = request.starts_T[entry_NCP]
    in_chunk_C1 = ((channel_C - part_C * request.chunk_channels) * request.next_element[0])[:, None]
    element_NCP = (start_NCP + in_chunk_C1 + rest_NP[:, None]).clamp(min=0)
    present_NCP = (start_NCP >= 0) & inside_NP[:, None]
    element_NCP = torch.where(present_NCP, element_NCP, torch.zeros_like(element_NCP))
    if not len(request.pixels_L):
        x_NCP = torch.zeros(element_NCP.shape)
    elif request.pixels_L.dtype == torch.uint16:  # torch cannot index it
        x_NCP = (request.pixels_L.view(torch.int16)[element_NCP].int() & 0xFFFF).float()
    else:
        x_NCP = request.pixels_L[element_NCP].float()
    absent = torch.tensor(request.absent, dtype=torch.float32)
    return torch.where(present_NCP, x_NCP, absent), inside_NP[:, None]


def _moves(request: Request, rows: slice, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    if request.orientation_N is None:
        return torch.arange(NUM_AXES).expand(num_rows, -1), torch.zeros(num_rows, NUM_AXES, dtype=torch.bool)
    code_N = request.orientation_N[rows].long()
    flips_N3 = (code_N[:, None] & torch.tensor([4, 2, 1])) > 0
    return torch.tensor(SOURCES)[code_N // 8], flips_N3
