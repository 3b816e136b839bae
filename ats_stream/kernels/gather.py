"""Gather: sampled crops of unsigned pixels become normalised network input, in one pass.

Shapes: N crops, C channels, S the space axes of a crop (one to three), as in ``crops_NCS``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ats_stream.errors import InputError
from ats_stream.kernels.launch import Launch, launch_on_current_stream
from ats_stream.kernels.rounding import fma_float32

if TYPE_CHECKING:
    from collections.abc import Sequence

_CPP_PIXELS = {torch.uint8: "unsigned char", torch.uint16: "unsigned short"}
_CPP_OUTPUTS = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}

SPECIALISATIONS: dict[tuple[torch.dtype, torch.dtype], str] = {
    (pixels, output): f"gather_crops<{cpp_pixels}, {cpp_output}>"
    for pixels, cpp_pixels in _CPP_PIXELS.items()
    for output, cpp_output in _CPP_OUTPUTS.items()
}
"""(dtype of the crops, dtype of the output) -> the instance of the kernel; all that exist."""

_MAX_SPACE_AXES = 3
_MAX_PLANES = 2**31 - 1  # blocks along x of a CUDA grid
_MAX_GRID_Y = 65535
_MAX_BLOCK = 256  # as __launch_bounds__ in gather.cu says
_WARP = 32
_RUN_BYTES = 16  # what one thread stores at once
_CPU_CHUNK = 1 << 17  # pixels that the CPU path converts at once: 1 MiB of float64


def normalisation(
    mean_C: Sequence[float] | torch.Tensor, std_C: Sequence[float] | torch.Tensor, *, max_value: float = 255
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn a mean and a standard deviation per channel into the scale and shift of :func:`gather_crops`.

    ``mean_C`` and ``std_C`` are those of pixels divided by ``max_value``, as torchvision states them;
    ``max_value`` is what counts as 1: 255 for uint8, 65535 for full-range uint16, 4095 for 12-bit pixels in
    uint16. Returns two float32 tensors (C,) on the CPU, rounded once from float64::

        scale = 1 / (max_value * std)        shift = -mean / std

    so that scale * x + shift = (x / max_value - mean) / std. Raises InputError for lengths that differ, a std
    or max_value that is not positive, and values that float32 cannot hold.

    >>> scale_C, shift_C = normalisation([0.5, 0.0], [0.25, 1.0])
    >>> shift_C.tolist(), bool(scale_C[1] == torch.tensor(1 / 255))
    ([-2.0, 0.0], True)
    """
    mean = _float64_vector("mean_C", mean_C)
    std = _float64_vector("std_C", std_C)
    if mean.shape != std.shape:
        raise InputError(f"mean_C has {mean.numel()} channels and std_C {std.numel()}; both need the same")
    if not bool((std > 0).all()):
        raise InputError(f"std_C={std.tolist()}: every channel needs a positive standard deviation")
    if not max_value > 0:
        raise InputError(f"max_value={max_value} is not positive")
    scale_C = (1 / (max_value * std)).to(torch.float32)
    shift_C = (0 - mean / std).to(torch.float32)
    if not bool(scale_C.isfinite().all() & shift_C.isfinite().all() & (scale_C > 0).all()):
        raise InputError(
            f"mean_C={mean.tolist()}, std_C={std.tolist()}, max_value={max_value}: "
            f"scale {scale_C.tolist()} and shift {shift_C.tolist()} do not fit float32"
        )
    return scale_C, shift_C


def _float64_vector(name: str, values: Sequence[float] | torch.Tensor) -> torch.Tensor:
    try:
        vector = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be numbers, one per channel: {error}") from error
    if vector.ndim != 1 or not vector.numel():
        raise InputError(f"{name} has shape {tuple(vector.shape)}, expected (C,), one value per channel")
    return vector


def gather_crops(
    crops_NCS: torch.Tensor,
    scale_C: torch.Tensor,
    shift_C: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return ``fma(crops, scale, shift)`` per channel, a float32 that is then rounded to ``dtype``.

    ``crops_NCS`` is uint8 or uint16 (N, C, S) with one to three space axes S, contiguous; ``scale_C`` and
    ``shift_C`` are float32 (C,) constants on the same device, see :func:`normalisation`. The result is a new
    contiguous tensor of the same shape in ``dtype``: float32, bfloat16 or float16. fma multiplies and adds
    with a single rounding, so CPU and CUDA give the same bits (except which NaN a NaN is). Overflow gives
    infinity, as any conversion does.

    A CUDA tensor is handled by one CuPy kernel on torch's current stream; the call does not wait for it. The
    operator behind is ``torch.ops.ats_stream.gather_crops`` and goes through torch.compile.

    Raises InputError for a dtype, shape, device or memory layout other than these, for an empty crop, for
    constants that want a gradient, and for a CUDA tensor where CuPy is not installed.

    >>> crops_NCS = torch.tensor([[[0, 255], [51, 102]]], dtype=torch.uint8)  # N = 1, C = 2, 1-D crops of 2
    >>> scale_C, shift_C = normalisation([0.5, 0.0], [0.5, 1.0])
    >>> gather_crops(crops_NCS, scale_C, shift_C)
    tensor([[[-1.0000,  1.0000],
             [ 0.2000,  0.4000]]])
    """
    for name, value in (("crops_NCS", crops_NCS), ("scale_C", scale_C), ("shift_C", shift_C)):
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{name} is a {type(value).__name__}, expected a torch.Tensor")
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype is {dtype!r}, expected one of {_listed(_CPP_OUTPUTS)}")
    if crops_NCS.device.type not in ("cpu", "cuda", "meta"):
        raise InputError(f"crops_NCS is on {crops_NCS.device}, expected cpu or cuda")
    if torch.is_grad_enabled() and (scale_C.requires_grad or shift_C.requires_grad):
        raise InputError("scale_C or shift_C requires a gradient, expected constants: the operator has none")
    _check(crops_NCS, scale_C, shift_C, dtype)
    out_NCS: torch.Tensor = _gather_crops(crops_NCS, scale_C, shift_C, dtype)
    return out_NCS


def _listed(dtypes: dict[torch.dtype, str]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)


def _check(crops_NCS: torch.Tensor, scale_C: torch.Tensor, shift_C: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise InputError unless the kernel may be given these; reads no element, so that no device waits."""
    if crops_NCS.dtype not in _CPP_PIXELS:
        raise InputError(f"crops_NCS is {crops_NCS.dtype}, expected one of {_listed(_CPP_PIXELS)}")
    if dtype not in _CPP_OUTPUTS:
        raise InputError(f"dtype is {dtype}, expected one of {_listed(_CPP_OUTPUTS)}")
    shape = tuple(crops_NCS.shape)
    if not 1 <= len(shape) - 2 <= _MAX_SPACE_AXES:
        raise InputError(
            f"crops_NCS has shape {shape}, expected (N, C, *patch) with 1 to {_MAX_SPACE_AXES} space axes"
        )
    if 0 in shape:
        raise InputError(f"crops_NCS has shape {shape}, expected every size to be at least 1")
    if shape[0] * shape[1] > _MAX_PLANES:
        raise InputError(
            f"crops_NCS has {shape[0]} x {shape[1]} planes (N x C), at most {_MAX_PLANES} are possible"
        )
    for name, value in (("scale_C", scale_C), ("shift_C", shift_C)):
        if value.dtype != torch.float32:
            raise InputError(f"{name} is {value.dtype}, expected torch.float32")
        if tuple(value.shape) != (shape[1],):
            raise InputError(
                f"{name} has shape {tuple(value.shape)}, expected ({shape[1]},), the channels of {shape}"
            )
        if value.device != crops_NCS.device:
            raise InputError(f"{name} is on {value.device}, expected {crops_NCS.device}, where crops_NCS is")
    for name, value in (("crops_NCS", crops_NCS), ("scale_C", scale_C), ("shift_C", shift_C)):
        if value.layout != torch.strided:
            raise InputError(f"{name} has layout {value.layout}, expected torch.strided")
        if not value.is_contiguous():
            raise InputError(f"{name} has strides {tuple(value.stride())}, expected a contiguous tensor")


@torch.library.custom_op(
    "ats_stream::gather_crops",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor crops_NCS, Tensor scale_C, Tensor shift_C, ScalarType dtype) -> Tensor",
)
def _gather_crops(
    crops_NCS: torch.Tensor, scale_C: torch.Tensor, shift_C: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    _check(crops_NCS, scale_C, shift_C, dtype)
    crops_NCP = crops_NCS.flatten(2)  # P pixels of a plane
    out_NCP = torch.empty(crops_NCP.shape, dtype=dtype)
    if crops_NCS.dtype == torch.uint8:
        _look_up(crops_NCP, scale_C, shift_C, out_NCP)
    else:
        _compute(crops_NCP, scale_C, shift_C, out_NCP)
    return out_NCP.view(crops_NCS.shape)


def _compute(
    crops_NCP: torch.Tensor, scale_C: torch.Tensor, shift_C: torch.Tensor, out_NCP: torch.Tensor
) -> None:
    step = max(1, _CPU_CHUNK // crops_NCP[0].numel())
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


@_gather_crops.register_fake
def _gather_crops_fake(
    crops_NCS: torch.Tensor, scale_C: torch.Tensor, shift_C: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    _check(crops_NCS, scale_C, shift_C, dtype)
    return torch.empty(crops_NCS.shape, dtype=dtype, device=crops_NCS.device)


@_gather_crops.register_kernel("cuda")
def _gather_crops_cuda(
    crops_NCS: torch.Tensor, scale_C: torch.Tensor, shift_C: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    _check(crops_NCS, scale_C, shift_C, dtype)
    out_NCS = torch.empty(crops_NCS.shape, dtype=dtype, device=crops_NCS.device)
    launch_on_current_stream(plan_launch(crops_NCS, scale_C, shift_C, out_NCS), crops_NCS.device)
    return out_NCS


def plan_launch(
    crops_NCS: torch.Tensor, scale_C: torch.Tensor, shift_C: torch.Tensor, out_NCS: torch.Tensor
) -> Launch:
    """Plan the launch of gather.cu that fills ``out_NCS``; pure, for tensors that the operator has accepted.

    ``out_NCS`` begins at a multiple of 16 bytes, as every fresh tensor does.
    """
    num_crops, num_channels = crops_NCS.shape[:2]
    patch_size = crops_NCS[0, 0].numel()
    run = _RUN_BYTES // out_NCS.element_size()
    num_runs = (patch_size + run - 2) // run + 1  # a plane that begins inside a run touches one more
    block = min(_MAX_BLOCK, -(-num_runs // _WARP) * _WARP)
    return Launch(
        source="gather.cu",
        expression=SPECIALISATIONS[crops_NCS.dtype, out_NCS.dtype],
        grid=(num_crops * num_channels, min(_MAX_GRID_Y, -(-num_runs // block))),
        block=(block,),
        args=(
            *(np.uint64(tensor.data_ptr()) for tensor in (crops_NCS, scale_C, shift_C, out_NCS)),
            np.int64(num_channels),
            np.int64(patch_size),
        ),
    )
