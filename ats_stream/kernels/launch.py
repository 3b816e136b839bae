"""Launching a raw kernel on torch's stream through CuPy; the only module that touches CuPy."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ats_stream.errors import InputError

if TYPE_CHECKING:
    import numpy as np

COMPILE_OPTIONS = ("-std=c++17",)
"""What NVRTC is given beside the architecture of the device."""

_MIN_CUPY = (14, 2)  # earlier ones misbehave beside torch


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel launch as data: whoever keeps the tensors alive may act on it, on a GPU or in a test."""

    source: str
    """File name of the kernel source in this folder."""
    expression: str
    """The kernel or the instance of its template, as C++ spells it."""
    grid: tuple[int, int]
    """Blocks along x and y."""
    block: tuple[int]
    """Threads of a block."""
    args: tuple[np.generic, ...]
    """Arguments in order, each of exactly the width that the kernel declares; addresses as uint64."""


@functools.cache
def source_text(source: str) -> str:
    """Return the text of a kernel source of this folder, such as ``"gather.cu"``."""
    return (Path(__file__).parent / source).read_text(encoding="ascii")


def require_cupy(device: torch.device) -> Any:
    """Import CuPy for a tensor on ``device``; InputError names the extras where it is absent or too old."""
    advice = 'pip install "ats-stream[cuda12]" or "ats-stream[cuda13]", as the CUDA version of torch is'
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise InputError(
            f"a tensor on {device} needs CuPy, which cannot be imported ({error}): {advice}"
        ) from error
    version = tuple(int(part) for part in cupy.__version__.split(".")[:2])
    if version < _MIN_CUPY:
        raise InputError(f"CuPy {cupy.__version__} was found, 14.2 or later is needed: {advice}")
    return cupy


@functools.cache
def has_cupy() -> bool:
    """Whether CuPy is installed, found without importing it."""
    return importlib.util.find_spec("cupy") is not None


class _StreamHandle:
    """Torch's current stream of a device in the CUDA stream protocol, which older torch does not speak."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream.cuda_stream


@functools.cache
def _kernel(device_index: int, source: str, expression: str) -> Any:
    # compiled for the device that is current, which is the one of device_index
    cupy = require_cupy(torch.device("cuda", device_index))
    module = cupy.RawModule(code=source_text(source), options=COMPILE_OPTIONS, name_expressions=(expression,))
    return module.get_function(expression)


def launch_on_current_stream(launch: Launch, device: torch.device) -> None:
    """Start ``launch`` on torch's current stream of ``device``; compiles on the first use, returns at once.

    Nothing is allocated here: outputs belong to torch, whose allocator knows this stream. The stream is
    looked up at every call, since it changes under ``torch.cuda.stream`` and while a CUDA graph is captured.
    """
    cupy = require_cupy(device)
    with cupy.cuda.Device(device.index):
        kernel = _kernel(device.index, launch.source, launch.expression)
        with cupy.cuda.Stream.from_external(_StreamHandle(device)):
            kernel(launch.grid, launch.block, launch.args)
