"""The gather on the CPU: compiled by numba, shared among torch's threads, or torch where numba is missing."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from ats_stream.compiled import compiled_module
from ats_stream.kernels import gather_torch
from ats_stream.kernels.orientation import NUM_AXES, SOURCES
from ats_stream.kernels.table import three

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from ats_stream.kernels.gather_calls import CropsCall, PatchesCall
    from ats_stream.kernels.table import ChunkTable

_MIN_VALUES = 1 << 14  # below, torch is as fast, and numba need not be imported
_MIN_VALUES_PER_TASK = 1 << 16
_choice: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """A gather whose input was found good; three axes of space, missing ones of size 1, and flat output."""

    pixels_L: torch.Tensor
    starts_T: torch.Tensor
    images_I7: torch.Tensor
    image_N: torch.Tensor
    offsets_N3: torch.Tensor
    orientation_N: torch.Tensor | None
    intensity_N2: torch.Tensor | None
    scale_C: torch.Tensor
    shift_C: torch.Tensor
    chunk: tuple[int, int, int]
    chunk_channels: int
    next_element: tuple[int, int, int, int]
    """Elements of a chunk from one channel, z, y, x to the next."""
    size: tuple[int, int, int]
    """Pixels of a patch."""
    fill: float
    absent: float

    @classmethod
    def of(
        cls,
        table: ChunkTable,
        image_N: torch.Tensor,
        offsets_ND: torch.Tensor,
        patch: tuple[int, ...],
        call: CropsCall | PatchesCall,
        *,
        fill: float = 0.0,
    ) -> Request:
        """Put in the axes that are missing."""
        return cls(
            pixels_L=table.pixels_L,
            starts_T=table.starts_T,
            images_I7=table.images_I7,
            image_N=image_N,
            offsets_N3=F.pad(offsets_ND, (NUM_AXES - len(patch), 0)),
            orientation_N=call.orientation_N,
            intensity_N2=call.intensity_N2,
            scale_C=call.scale_C,
            shift_C=call.shift_C,
            chunk=three(table.chunk_shape),
            chunk_channels=table.chunk_channels,
            next_element=table.next_element,
            size=three(patch),
            fill=fill,
            absent=table.absent,
        )

    @property
    def top(self) -> int:
        """The largest value of integer pixels; 0 for float32."""
        return {torch.uint8: 255, torch.uint16: 65535}.get(self.pixels_L.dtype, 0)


@contextmanager
def compiled_path(is_used: bool) -> Iterator[None]:
    """Force compiled code, or torch: for tests and benchmarks, not for several threads."""
    global _choice
    before, _choice = _choice, is_used
    try:
        yield
    finally:
        _choice = before


def is_compiled(num_values: int) -> bool:
    """Whether a gather of so many values runs in compiled code."""
    if _choice is False or (_choice is None and num_values < _MIN_VALUES):
        return False
    return _numba_code() is not None


def gather(request: Request, out: torch.Tensor, *, channels_last: bool) -> None:
    """Fill the contiguous memory ``out``: (N, C, P), or (N, P, C) with ``channels_last``."""
    code = _numba_code() if is_compiled(out.numel()) else None
    if code is None:
        gather_torch.gather(request, out.transpose(1, 2) if channels_last else out)
    else:
        _gather_compiled(code, request, out, channels_last)


def _gather_compiled(code: ModuleType, request: Request, out: torch.Tensor, channels_last: bool) -> None:
    num_patches, num_channels = len(request.image_N), len(request.scale_C)
    num_pixels = out[0].numel() // num_channels
    flat = out.view(-1)
    elements = flat.numpy() if out.dtype == torch.float32 else flat.view(torch.int16).numpy()
    if out.dtype == torch.bfloat16:  # unknown to numpy; the type of the elements says what they are
        elements = elements.view(np.uint16)
    sources, flips = np.empty((0, 3), np.int64), np.empty((0, 3), np.bool_)
    if request.orientation_N is not None:
        codes = request.orientation_N.numpy()
        sources = np.array(SOURCES)[codes // 8]
        flips = (codes[:, None] & np.array([4, 2, 1], np.uint8)) > 0
    intensity = np.empty((0, 2), np.float32) if request.intensity_N2 is None else request.intensity_N2.numpy()

    def run(part: range) -> None:
        code.run(
            request.pixels_L.numpy(),
            request.starts_T.numpy(),
            request.images_I7.numpy(),
            request.image_N.numpy(),
            request.offsets_N3.numpy(),
            sources,
            flips,
            intensity,
            request.scale_C.numpy(),
            request.shift_C.numpy(),
            elements,
            part.start,
            part.stop,
            request.chunk_channels,
            np.array(request.chunk),
            np.array(request.next_element),
            np.array(request.size),
            num_channels if channels_last else 1,
            1 if channels_last else num_pixels,
            np.float32(request.fill),
            np.float32(request.absent),
            np.float32(request.top),
        )

    num_tasks = min(torch.get_num_threads(), max(out.numel() // _MIN_VALUES_PER_TASK, 1), num_patches)
    bounds = [num_patches * task // num_tasks for task in range(num_tasks + 1)]
    parts = [range(start, stop) for start, stop in itertools.pairwise(bounds)]
    if num_tasks == 1:
        run(parts[0])
    else:
        with ThreadPoolExecutor(num_tasks) as pool:
            list(pool.map(run, parts))


def _numba_code() -> ModuleType | None:
    return compiled_module("ats_stream.kernels.gather_numba")
