"""Build a kernel source with g++ and launch it on host memory, in the manner of cupy.RawModule.

Needs the standard library and numpy alone, so that a process under AddressSanitizer stays small.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
# for kernels whose threads wait for each other
FIBERS_HEADER = Path(__file__).with_name("cuda_on_cpu_fibers.h")
BASE_FLAGS = (
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
)
FAST_FLAGS = ("-O2",)
# -O1 keeps every access of the source; with no recovery the first finding ends the process
SANITIZER_FLAGS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD_SANITIZER_FLAGS = ("-O1", "-g", "-fsanitize=thread")


def has_compiler() -> bool:
    return shutil.which("g++") is not None


def asan_runtime() -> str:
    """The library to preload where the program itself, Python, was built without AddressSanitizer."""
    return _runtime("libasan.so")


def tsan_runtime() -> str:
    """The same for ThreadSanitizer."""
    return _runtime("libtsan.so")


def _runtime(name: str) -> str:
    asked = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return asked.stdout.strip()


def numbered_barriers(source: str) -> tuple[str, int]:
    """The source with numbers for its barriers, and how many there are."""
    parts = re.split(r"\b__syncthreads(_or)?\(", source)
    text = parts[0]
    for number, (kind, behind) in enumerate(zip(parts[1::2], parts[2::2], strict=True)):
        comma = ", " if kind else ""
        text += f"__syncthreads{kind or ''}_at({number}{comma}{behind}"
    return text, len(parts) // 2


def build(name: str, source: str, expressions: Sequence[str], flags: Sequence[str] = FAST_FLAGS) -> Path:
    """Compile a source that messages call ``name``; one entry ``launch_<i>`` per kernel, once per content."""
    source, num_barriers = numbered_barriers(source)
    header = FIBERS_HEADER if num_barriers else HEADER
    launch = "launch_fibers" if num_barriers else "launch"
    entries = [
        f'extern "C" void launch_{i}(unsigned grid_x, unsigned grid_y, unsigned block_x, void** args) '
        f"{{ cuda_on_cpu::{launch}(&{expression}, grid_x, grid_y, block_x, args); }}"
        for i, expression in enumerate(expressions)
    ]
    if num_barriers:
        entries.append(
            'extern "C" void configure(int thread_order, int skipped_barrier) '
            "{ cuda_on_cpu::thread_order = thread_order; cuda_on_cpu::skipped_barrier = skipped_barrier; }"
        )
    text = "\n".join([f'#include "{header}"', f'#line 1 "{name}"', source, *entries])
    headers = HEADER.read_text() + FIBERS_HEADER.read_text()
    key = hashlib.sha256("\0".join([text, headers, *BASE_FLAGS, *flags]).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"cuda_on_cpu_{os.getuid()}_{key}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        command = ["g++", *BASE_FLAGS, *flags, "-x", "c++", "-", "-o", str(partial)]
        made = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
        partial.replace(library)  # atomic: another process may be building the same
    return library


class CpuModule:
    """The kernels of one library that :func:`build` made."""

    def __init__(self, library: Path, expressions: Sequence[str]) -> None:
        self._library = ctypes.CDLL(str(library))
        self._number = {expression: i for i, expression in enumerate(expressions)}

    def launch(
        self, expression: str, grid: tuple[int, int], block: tuple[int], args: Sequence[np.generic]
    ) -> None:
        """Run one grid to its end; ``args`` are numpy scalars of exact width, addresses among them."""
        boxes = [ctypes.create_string_buffer(value.tobytes(), value.itemsize) for value in args]
        pointers = (ctypes.c_void_p * len(boxes))(*(ctypes.addressof(box) for box in boxes))
        getattr(self._library, f"launch_{self._number[expression]}")(*grid, *block, pointers)

    def configure(self, *, thread_order: int = 0, skipped_barrier: int = -1) -> None:
        """For kernels with barriers: the order in which threads get their turn, and a barrier to skip."""
        self._library.configure(thread_order, skipped_barrier)
