"""C functions for compiled code, which cannot call Python: zstd, and reading of files.

No package offers those of zstd as such: they are taken from the library inside of ``zstandard``, else from
that of the system. Where there is none, chunks are encoded and decoded through ``zstandard`` itself.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from contextlib import suppress
from ctypes.util import find_library
from typing import TYPE_CHECKING, Any

import zstandard

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

_PROBE = b"zstd " * 9
# what takes many kinds of sequences to encode
_LONG_PROBE = bytes((i * i >> 9) + (i * i >> 5) & 255 for i in range(1 << 14))
_LEVEL_PARAMETER = 100


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


class ZstdEncoder:
    """``size_t compress(context, out, out_bytes, data, data_bytes)``: the size, more than any for an error.

    It writes ``out_bytes`` at most.
    """

    def __init__(self, path: str) -> None:
        """OSError or AttributeError when the file is no zstd library."""
        library = ctypes.CDLL(path)
        self.version = int(library.ZSTD_versionNumber())
        self._create, self._free = library.ZSTD_createCCtx, library.ZSTD_freeCCtx
        self._create.restype, self._create.argtypes = ctypes.c_void_p, ()
        self._free.restype, self._free.argtypes = ctypes.c_size_t, (ctypes.c_void_p,)
        self._set = library.ZSTD_CCtx_setParameter
        self._set.restype, self._set.argtypes = ctypes.c_size_t, (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
        self._bound = library.ZSTD_compressBound
        self._bound.restype, self._bound.argtypes = ctypes.c_size_t, (ctypes.c_size_t,)
        self.call = library.ZSTD_compress2
        self.call.restype = ctypes.c_size_t
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self.call.argtypes = (pointer, pointer, size, pointer, size)
        self.compress = ctypes.cast(self.call, ctypes.c_void_p).value or 0

    def new_context(self, level: int) -> ZstdEncoderContext:
        """What one thread needs at a time for frames of one level of effort."""
        return ZstdEncoderContext(self, level)

    def max_frame_bytes(self, nbytes: int) -> int:
        """What a frame of so many bytes takes at most."""
        return int(self._bound(nbytes))


class ZstdEncoderContext:
    """Working memory of the encoder, freed with the object."""

    def __init__(self, library: ZstdEncoder, level: int) -> None:
        self.library = library
        self.address = int(library._create() or 0)
        if not self.address:
            raise MemoryError("no memory for a zstd context")
        library._set(self.address, _LEVEL_PARAMETER, level)

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            self.library._free(self.address)


def address_of(array: npt.NDArray[Any]) -> int:
    """Where the first element of an array lies."""
    return int(array.__array_interface__["data"][0])


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


@functools.cache
def zstd_encoder() -> ZstdEncoder | None:
    """The library, None where there is none that gives the bytes of ``zstandard``."""
    for path in _candidates():
        with suppress(OSError, AttributeError, MemoryError):
            library = ZstdEncoder(path)
            if _encodes_the_same(library):
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


def _encodes_the_same(library: ZstdEncoder) -> bool:
    """Whether it is of the version whose frames everything else writes, too."""
    expected = zstandard.ZstdCompressor(level=1).compress(_LONG_PROBE)
    out = ctypes.create_string_buffer(library.max_frame_bytes(len(_LONG_PROBE)))
    context = library.new_context(1)
    found = library.call(context.address, out, len(out), _LONG_PROBE, len(_LONG_PROBE))
    major, minor, patch = zstandard.ZSTD_VERSION
    return library.version == 10000 * major + 100 * minor + patch and out.raw[:found] == expected
