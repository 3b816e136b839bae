"""Compile kernel sources for real devices without one: NVRTC through ctypes, and nvdisasm to read the result.

Both come from the wheels of compilers.txt, in a folder of the virtual environment; neither a GPU nor CuPy is
needed. Results are kept in the folder for temporary files, by the hash of all that goes in. Devices that left
with CUDA 13 have no disassembler there: of those the PTX is read, which does not show the last optimisations.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

COMPILERS = Path(sys.prefix) / "share" / "nvrtc" / "nvidia"
NEW, OLD = COMPILERS / "cu13/lib/libnvrtc.so.13", COMPILERS / "cuda_nvrtc/lib/libnvrtc.so.12"
DISASSEMBLER = COMPILERS / "cu13/bin/nvdisasm"
FIRST_OF_NEW = 75  # compute capability 7.0 left with CUDA 13
VERSION = 1  # of the reports that are kept


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the compiler made of one kernel for one architecture."""

    registers: int
    spilled_bytes: int
    """Stores and loads of registers that did not fit."""
    wide_stores: int
    """Stores of 16 bytes to global memory."""
    narrow_streaming_stores: int
    """Stores with the streaming hint that the compiler has split into less than 16 bytes."""


class CompileError(Exception):
    """The log of a compilation that failed."""


def is_installed() -> bool:
    return all(path.exists() for path in (NEW, OLD, DISASSEMBLER))


def compile_reports(
    source: str, expressions: Sequence[str], architecture: int, options: Sequence[str]
) -> dict[str, Report]:
    """Compile all ``expressions`` of the text ``source``; what came of each."""
    library_path = NEW if architecture >= FIRST_OF_NEW else OLD
    size = library_path.stat().st_size  # tells versions of the compiler apart
    key = [VERSION, source, list(expressions), architecture, list(options), str(library_path), size]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    kept = Path(tempfile.gettempdir()) / f"nvrtc_{os.getuid()}_{digest}.json"
    if kept.exists():
        return {name: Report(**fields) for name, fields in json.loads(kept.read_text()).items()}
    reports = _compile(_library(library_path), source, expressions, architecture, options)
    partial = kept.with_suffix(f".{os.getpid()}.{architecture}")
    partial.write_text(json.dumps({name: asdict(report) for name, report in reports.items()}))
    partial.replace(kept)  # atomic: another process may be writing the same
    return reports


@functools.cache
def _library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _compile(
    library: ctypes.CDLL, source: str, expressions: Sequence[str], architecture: int, options: Sequence[str]
) -> dict[str, Report]:
    def check(code: int) -> None:
        if code:
            raise CompileError(library.nvrtcGetErrorString(code).decode())

    program = ctypes.c_void_p()
    check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        for expression in expressions:
            check(library.nvrtcAddNameExpression(program, expression.encode()))
        flags = [*options, f"-arch=sm_{architecture}", "--ptxas-options=-v"]
        array = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        failed = library.nvrtcCompileProgram(program, len(flags), array)
        log = _text(library, "ProgramLog", program).decode()
        if failed:
            raise CompileError(log)
        names = {expression: _lowered(library, program, expression) for expression in expressions}
        ptx, cubin = (_text(library, what, program) for what in ("PTX", "CUBIN"))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    resources = _by_entry(r"Compiling entry function '(\w+)'", log)
    if architecture >= FIRST_OF_NEW:
        stores = _by_entry(r"\.section\s+\.text\.(\w+)", _disassemble(cubin))
        pattern, wide, streaming = r"\bSTG\.[\w.]*", ".128", ".EF"
    else:
        stores = _by_entry(r"\.entry (\w+)\(", ptx.decode())
        pattern, wide, streaming = r"\bst\.global\.[\w.]*", ".v4.", ".cs."
    return {
        expression: _report(resources[name], re.findall(pattern, stores[name]), wide, streaming)
        for expression, name in names.items()
    }


def _text(library: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    assert getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
    buffer = ctypes.create_string_buffer(size.value)
    assert getattr(library, f"nvrtcGet{what}")(program, buffer) == 0
    return buffer.raw


def _lowered(library: ctypes.CDLL, program: ctypes.c_void_p, expression: str) -> str:
    name = ctypes.c_char_p()
    assert library.nvrtcGetLoweredName(program, expression.encode(), ctypes.byref(name)) == 0
    assert name.value is not None
    return name.value.decode()


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(DISASSEMBLER), "-c", "-ndf", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _by_entry(heading: str, text: str) -> dict[str, str]:
    pieces = re.split(heading, text)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def _report(resources: str, stores: Sequence[str], wide: str, streaming: str) -> Report:
    num_wide = sum(wide in store for store in stores)
    return Report(
        registers=int(_only(r"Used (\d+) registers", resources)),
        spilled_bytes=sum(int(n) for n in re.findall(r"(\d+) bytes spill", resources)),
        wide_stores=num_wide,
        narrow_streaming_stores=sum(streaming in store and wide not in store for store in stores),
    )


def _only(pattern: str, text: str) -> Any:
    (found,) = re.findall(pattern, text)
    return found
