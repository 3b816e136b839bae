"""C functions for compiled code, which cannot call Python: zstd, and reading of files.

No package offers those of zstd as such: they are taken from the library inside of ``zstandard``, else from
that of the system. Where there is none, chunks are decoded through ``zstandard`` itself.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from contextlib import suppress
from ctypes.util import find_library
from typing import TYPE_CHECKING

import zstandard

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROBE = b"zstd " * 9


class ZstdLibrary:
    """``size_t decompress(context, out, out_bytes, data, data_bytes)``: the size, more than any for an error.

    It writes ``out_bytes`` at most, whatever the data claim, and allocates nothing.
    """

    def __init__(self, path: str) -> None:
        """OSError or AttributeError when the file is no zstd library."""
        library = ctypes.CDLL(path)
        self._create, self._free = library.ZSTD_createDCtx, library.ZSTD_freeDCtx
        self._create.restype, self._create.argtypes = ctypes.c_void_p, ()
        self._free.restype, self._free.argtypes = ctypes.c_size_t, (ctypes.c_void_p,)
        self.call = library.ZSTD_decompressDCtx
        self.call.restype = ctypes.c_size_t
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self.call.argtypes = (pointer, pointer, size, pointer, size)
        self.decompress = ctypes.cast(self.call, ctypes.c_void_p).value or 0

    def new_context(self) -> ZstdContext:
        """What one thread needs at a time."""
        return ZstdContext(self)


class ZstdContext:
    """Working memory of the decoder, freed with the object."""

    def __init__(self, library: ZstdLibrary) -> None:
        self.library = library
        self.address = int(library._create() or 0)
        if not self.address:
            raise MemoryError("no memory for a zstd context")

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            self.library._free(self.address)


@functools.cache
def pread_address() -> int | None:
    """``ssize_t pread(file, out, out_bytes, begin)`` with 64 bits for ``begin``, None where there is none."""
    try:
        library = ctypes.CDLL(None)
        function = getattr(library, "pread64", None) or library.pread
    except (OSError, AttributeError, TypeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


@functools.cache
def zstd_library() -> ZstdLibrary | None:
    """The library, None where there is none that decodes."""
    for path in _candidates():
        with suppress(OSError, AttributeError, MemoryError):
            library = ZstdLibrary(path)
            if _decodes(library):
                return library
    return None


def _candidates() -> Iterator[str]:
    spec = importlib.util.find_spec("zstandard._cffi")
    if spec is not None and spec.origin is not None:
        yield spec.origin
    system = find_library("zstd")
    if system is not None:
        yield system


def _decodes(library: ZstdLibrary) -> bool:
    frame = zstandard.ZstdCompressor().compress(_PROBE)
    out = ctypes.create_string_buffer(len(_PROBE))
    context = library.new_context()
    found = library.call(context.address, out, len(_PROBE), frame, len(frame))
    return bool(found == len(_PROBE)) and out.raw == _PROBE
