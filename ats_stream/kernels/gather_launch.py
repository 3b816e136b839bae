"""Plan the launches of gather.cu; pure, for arguments that were found good."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ats_stream.kernels.launch import Launch
from ats_stream.kernels.table import ChunkTable, three

if TYPE_CHECKING:
    from ats_stream.kernels.gather_calls import CropsCall, PatchesCall

_CPP_PIXELS = {torch.uint8: "unsigned char", torch.uint16: "unsigned short", torch.float32: "float"}
_CPP_OUTPUTS = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}

_MAX_GRID_Y = 65535
_BLOCK = 256  # as __launch_bounds__ in gather.cu says
_WARP = 32
_RUN_BYTES = 16  # what one thread stores at once
_RGB = 3


def plan_crops(call: CropsCall, out_NCS: torch.Tensor) -> Launch:
    """Plan the launch that fills ``out_NCS``, which begins at a multiple of 16 bytes, as fresh tensors do."""
    num_channels = out_NCS.shape[1]
    is_in_order = num_channels == 1 or not (call.is_interleaved or call.channels_last)
    if call.is_plain and is_in_order:
        return _plan_plain(call, out_NCS)
    table = ChunkTable(
        pixels_L=call.crops_NCS,
        starts_T=_NONE,
        images_I7=_NONE,
        chunk_shape=call.patch,
        num_channels=num_channels,
        chunk_channels=num_channels,
        is_interleaved=call.is_interleaved,
    )
    return _plan(table, _NONE, _NONE, call, out_NCS, fill=0.0)


def plan_patches(call: PatchesCall, out_NCS: torch.Tensor) -> Launch:
    """Plan the launch that fills ``out_NCS``, which begins at a multiple of 16 bytes, as fresh tensors do."""
    return _plan(call.table, call.image_N, call.offsets_ND, call, out_NCS, fill=call.fill)


_NONE = torch.empty(0)


def _plan_plain(call: CropsCall, out_NCS: torch.Tensor) -> Launch:
    num_crops, num_channels = out_NCS.shape[:2]
    patch_size = out_NCS[0, 0].numel()
    run = _RUN_BYTES // out_NCS.element_size()
    num_runs = (patch_size + run - 2) // run + 1  # a plane that begins inside a run touches one more
    block, blocks = _blocks(num_runs)
    return Launch(
        source="gather.cu",
        expression=f"gather_crops<{_CPP_PIXELS[call.crops_NCS.dtype]}, {_CPP_OUTPUTS[out_NCS.dtype]}>",
        grid=(num_crops * num_channels, blocks),
        block=(block,),
        args=(
            *map(_address, (call.crops_NCS, call.scale_C, call.shift_C, out_NCS)),
            np.int64(num_channels),
            np.int64(patch_size),
        ),
    )


def _plan(
    table: ChunkTable,
    image_N: torch.Tensor,
    offsets_ND: torch.Tensor,
    call: CropsCall | PatchesCall,
    out_NCS: torch.Tensor,
    *,
    fill: float,
) -> Launch:
    num_patches, num_channels, *patch = out_NCS.shape
    is_rgb = (
        table.is_interleaved
        and num_channels == table.chunk_channels == _RGB
        and table.pixels_L.dtype == torch.uint8
    )
    store = "PLANAR"
    if call.channels_last and num_channels > 1:
        is_fast = num_channels == _RGB and table.pixels_L.dtype == torch.uint8
        store = "LAST_OF_3" if is_fast else "LAST"
    types = (_CPP_PIXELS[table.pixels_L.dtype], _CPP_OUTPUTS[out_NCS.dtype])
    expression = f"gather_patches<{', '.join(types)}, {str(is_rgb).lower()}, {store}>"
    num_runs = -(-out_NCS[0, 0].numel() // (_RUN_BYTES // out_NCS.element_size()))
    block, blocks = _blocks(num_runs)
    chunk = three(table.chunk_shape)
    next_channel, *next_zyx = table.next_element
    # the stride of an axis of size 1 is never used, but has to fit
    next_zyx = [step if side > 1 else 0 for step, side in zip(next_zyx, chunk, strict=True)]
    return Launch(
        source="gather.cu",
        expression=expression,
        grid=(num_patches, blocks),
        block=(block,),
        args=(
            _address(table.pixels_L),
            np.int64(table.pixels_L.numel()),
            _address(table.starts_T),
            _address(table.images_I7),
            np.int64(len(table.images_I7)),
            _address(image_N),
            _address(offsets_ND),
            np.int32(len(patch)),
            _address(call.orientation_N),
            _address(call.intensity_N2),
            _address(call.scale_C),
            _address(call.shift_C),
            _address(out_NCS),
            np.int32(num_channels),
            np.int32(table.chunk_channels),
            *map(np.int32, chunk),
            np.int64(next_channel),
            *map(np.int32, next_zyx),
            *map(np.int32, three(patch)),
            np.float32(fill),
            np.float32(table.absent),
        ),
    )


def _blocks(num_runs: int) -> tuple[int, int]:
    """Threads of a block, and blocks along y."""
    block = min(_BLOCK, -(-num_runs // _WARP) * _WARP)
    return block, min(_MAX_GRID_Y, -(-num_runs // block))


def _address(tensor: torch.Tensor | None) -> np.uint64:
    """Where a tensor begins; 0 for none."""
    return np.uint64(tensor.data_ptr() if tensor is not None and tensor.numel() else 0)
