"""Gather: sampled pixels become normalised network input, in one pass.

Crops that were cut already, or patches of images that lie in memory as decoded chunks; the same arithmetic::

    x   = the pixel, or ``fill`` outside the image
    x   = clamp(round(gain * x + offset))    inside, where an intensity is given; float32 is not rounded
    out = fma(x, scale[c], shift[c])         one rounding to float32, one more to the output's dtype

Shapes: N patches, C channels, S the space axes of a patch (D of them, one to three), as in ``crops_NCS``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ats_stream.errors import InputError
from ats_stream.kernels import gather_cpu, gather_torch
from ats_stream.kernels.gather_calls import CropsCall, PatchesCall, beside, check_kinds
from ats_stream.kernels.gather_cpu import Request
from ats_stream.kernels.gather_launch import plan_crops, plan_patches
from ats_stream.kernels.launch import has_cupy, launch_on_current_stream
from ats_stream.kernels.memory import ask_for_huge_pages
from ats_stream.kernels.table import ChunkTable

if TYPE_CHECKING:
    from collections.abc import Sequence


def gather_crops(
    crops_NCS: torch.Tensor,
    scale_C: torch.Tensor,
    shift_C: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    is_interleaved: bool = False,
    channels_last: bool = False,
    orientation_N: torch.Tensor | None = None,
    intensity_N2: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``fma(crops, scale, shift)`` per channel, a float32 that is then rounded to ``dtype``.

    ``crops_NCS`` is uint8, uint16 or float32 (N, C, S) with one to three space axes S, contiguous, or (N, S,
    C) with ``is_interleaved``; ``scale_C`` and ``shift_C`` are float32 (C,) constants on the same device, see
    :func:`~ats_stream.kernels.normalise.normalisation`. ``orientation_N`` (uint8) moves the pixels of each
    crop, see :mod:`~ats_stream.kernels.orientation`; exchanged axes must be of one size. ``intensity_N2``
    (float32) is gain and offset of each crop. The result is a new tensor (N, C, S) in ``dtype``, float32,
    bfloat16 or float16; its memory is contiguous, or, with ``channels_last``, in the order (N, S, C). fma
    multiplies and adds with a single rounding, so CPU and CUDA give the same bits (except which NaN a NaN
    is). Overflow gives infinity, as any conversion does.

    A CUDA tensor is handled by one CuPy kernel on torch's current stream; the call does not wait for it.
    Pinned crops in host memory are read by that kernel as they are, if the constants are on a device. The
    operator behind is ``torch.ops.ats_stream.gather_crops`` and goes through torch.compile.

    Raises InputError for a dtype, shape, device or memory layout other than these, for an empty crop, for
    constants that want a gradient, and for a CUDA tensor where CuPy is not installed. Orientations and
    intensities are checked where they lie on the CPU; elsewhere an impossible orientation is none.

    >>> crops_NCS = torch.tensor([[[0, 255], [51, 102]]], dtype=torch.uint8)  # N = 1, C = 2, 1-D crops of 2
    >>> scale_C, shift_C = torch.tensor([2 / 255, 1 / 255]), torch.tensor([-1.0, 0.0])
    >>> gather_crops(crops_NCS, scale_C, shift_C)
    tensor([[[-1.0000,  1.0000],
             [ 0.2000,  0.4000]]])
    """
    constants = {"scale_C": scale_C, "shift_C": shift_C}
    check_kinds(dtype, orientation_N, intensity_N2, crops_NCS=crops_NCS, **constants)
    moves = beside(scale_C, orientation_N, intensity_N2)
    call = CropsCall(crops_NCS, scale_C, shift_C, dtype, is_interleaved, channels_last, *moves)
    call.check()
    out_NCS: torch.Tensor = _gather_crops(*call)
    return out_NCS


def gather_patches(
    table: ChunkTable,
    image_N: torch.Tensor,
    offsets_ND: torch.Tensor,
    patch_size: Sequence[int],
    scale_C: torch.Tensor,
    shift_C: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = False,
    orientation_N: torch.Tensor | None = None,
    intensity_N2: torch.Tensor | None = None,
    fill: float = 0.0,
) -> torch.Tensor:
    """Return patches (N, C, *patch_size) of the images of ``table``, normalised as by :func:`gather_crops`.

    Patch n shows image ``image_N[n]`` (int64) from pixel ``offsets_ND[n]`` (int64) on, which may lie outside;
    pixels there are ``fill``, which no intensity changes. With ``orientation_N`` it shows the moved pixels of
    the stretch of :func:`~ats_stream.kernels.orientation.source_size` that begins there. All other arguments,
    the memory of the result and its bits are as for :func:`gather_crops`; the pixels of the table may be
    pinned host memory. The operator behind is ``torch.ops.ats_stream.gather_patches``.

    Raises InputError as :func:`gather_crops` does, and on the CPU for an image that is not in the table. On a
    device, where no value is looked at, such a patch is ``fill``.

    >>> table = ChunkTable.of_images(torch.tensor([[[10.0, 20.0, 30.0]]]))  # I = 1, C = 1, 1-D
    >>> one, none = torch.ones(1), torch.zeros(1)
    >>> gather_patches(table, torch.tensor([0, 0]), torch.tensor([[-1], [1]]), (2,), one, none, fill=7)
    tensor([[[ 7., 10.]],
    <BLANKLINE>
            [[20., 30.]]])
    """
    tensors = {"image_N": image_N, "offsets_ND": offsets_ND, "scale_C": scale_C, "shift_C": shift_C}
    tables = {name: getattr(table, name) for name in ("pixels_L", "starts_T", "images_I7")}
    check_kinds(dtype, orientation_N, intensity_N2, **tables, **tensors)
    call = PatchesCall(
        table.pixels_L,
        table.starts_T,
        table.images_I7,
        image_N,
        offsets_ND,
        scale_C,
        shift_C,
        list(table.chunk_shape),
        table.chunk_channels,
        table.is_interleaved,
        list(patch_size),
        dtype,
        channels_last,
        *beside(scale_C, orientation_N, intensity_N2),
        float(fill),
        float(table.absent),
    )
    if table.num_channels != len(scale_C):
        raise InputError(f"scale_C has {len(scale_C)} channels, the images have {table.num_channels}")
    call.check()
    out_NCS: torch.Tensor = _gather_patches(*call)
    return out_NCS


def is_worth_it(device: torch.device, num_values: int) -> bool:
    """Whether operations of torch for the same should be left for the kernel: CuPy is there, or numba."""
    if device.type == "cuda":
        return has_cupy()
    return device.type == "cpu" and gather_cpu.is_compiled(num_values)


# ---- the operators: each is called with the fields of its call ----


def _memory_of(out_NCS: torch.Tensor, *, channels_last: bool) -> torch.Tensor:
    """The contiguous memory of an output: (N, C, P), or (N, P, C)."""
    return out_NCS.movedim(1, -1).flatten(1, -2) if channels_last else out_NCS.flatten(2)


def _new_output(call: CropsCall | PatchesCall) -> torch.Tensor:
    """The memory of a result on the CPU."""
    out_NCS = call.output()
    ask_for_huge_pages(out_NCS)
    return out_NCS


@torch.library.custom_op(
    "ats_stream::gather_crops",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor crops_NCS, Tensor scale_C, Tensor shift_C, ScalarType dtype, bool is_interleaved=False,"
    " bool channels_last=False, Tensor? orientation_N=None, Tensor? intensity_N2=None) -> Tensor",
)
def _gather_crops(*args: Any) -> torch.Tensor:
    call = CropsCall(*args)
    call.check()
    call.check_values()
    out_NCS = _new_output(call)
    memory = _memory_of(out_NCS, channels_last=call.channels_last)
    if call.is_plain and not call.is_interleaved and not gather_cpu.is_compiled(out_NCS.numel()):
        out_NCP = memory.transpose(1, 2) if call.channels_last else memory
        gather_torch.convert(call.crops_NCS.flatten(2), call.scale_C, call.shift_C, out_NCP)
        return out_NCS
    # pixels that stay in order are one line
    patch = (math.prod(call.patch),) if call.is_plain else call.patch
    num_crops, num_channels = out_NCS.shape[:2]
    shape = (*patch, num_channels) if call.is_interleaved else (num_channels, *patch)
    request = Request.of(
        ChunkTable.of_images(call.crops_NCS.view(num_crops, *shape), is_interleaved=call.is_interleaved),
        torch.arange(num_crops),
        torch.zeros(num_crops, len(patch), dtype=torch.int64),
        patch,
        call,
    )
    gather_cpu.gather(request, memory, channels_last=call.channels_last)
    return out_NCS


@_gather_crops.register_fake
def _gather_crops_fake(*args: Any) -> torch.Tensor:
    call = CropsCall(*args)
    call.check()
    return call.output()


@_gather_crops.register_kernel("cuda")
def _gather_crops_cuda(*args: Any) -> torch.Tensor:
    call = CropsCall(*args)
    call.check()
    out_NCS = call.output()
    launch_on_current_stream(plan_crops(call, out_NCS), out_NCS.device)
    return out_NCS


@torch.library.custom_op(
    "ats_stream::gather_patches",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor pixels_L, Tensor starts_T, Tensor images_I7, Tensor image_N, Tensor offsets_ND,"
    " Tensor scale_C, Tensor shift_C, int[] chunk_shape, int chunk_channels, bool is_interleaved,"
    " int[] patch_size, ScalarType dtype, bool channels_last=False, Tensor? orientation_N=None,"
    " Tensor? intensity_N2=None, float fill=0., float absent=0.) -> Tensor",
)
def _gather_patches(*args: Any) -> torch.Tensor:
    call = PatchesCall(*args)
    call.check()
    call.check_values()
    out_NCS = _new_output(call)
    request = Request.of(
        call.table, call.image_N, call.offsets_ND, tuple(call.patch_size), call, fill=call.fill
    )
    memory = _memory_of(out_NCS, channels_last=call.channels_last)
    gather_cpu.gather(request, memory, channels_last=call.channels_last)
    return out_NCS


@_gather_patches.register_fake
def _gather_patches_fake(*args: Any) -> torch.Tensor:
    call = PatchesCall(*args)
    call.check()
    return call.output()


@_gather_patches.register_kernel("cuda")
def _gather_patches_cuda(*args: Any) -> torch.Tensor:
    call = PatchesCall(*args)
    call.check()
    out_NCS = call.output()
    launch_on_current_stream(plan_patches(call, out_NCS), out_NCS.device)
    return out_NCS
