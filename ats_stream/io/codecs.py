"""Decoding of one chunk for the codecs that every zarr v3 store may use; anything else goes through
zarr-python.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import google_crc32c
import imagecodecs
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BYTE_CODECS = frozenset({"zstd", "gzip", "blosc", "crc32c"})


def encode_chunk(chunk: npt.NDArray[Any], codec: str, level: int) -> bytes:
    """Bytes of a C-contiguous little-endian chunk; ``codec`` is ``zstd`` or ``raw``."""
    if codec == "raw":
        return chunk.tobytes()
    # the flat view: the encoder takes any buffer, and releases the interpreter lock
    flat: Any = chunk.reshape(-1).view(np.uint8)
    return bytes(imagecodecs.zstd_encode(flat, level))


@dataclass(frozen=True, kw_only=True)
class ChunkDecoder:
    """Turns the stored bytes of a chunk into an array of ``shape`` and native byte order."""

    shape: tuple[int, ...]
    stored_dtype: np.dtype[Any]
    order: tuple[int, ...] | None
    """Axes of the stored array in terms of the chunk's (codec ``transpose``)."""
    steps: tuple[str, ...]
    """Byte codecs in the order in which they were applied when writing."""

    @cached_property
    def nbytes(self) -> int:
        """Size of a decoded chunk in bytes."""
        return math.prod(self.shape) * self.stored_dtype.itemsize

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of decoded chunks, in native byte order."""
        return self.stored_dtype.newbyteorder("=")

    def __call__(self, data: bytes) -> npt.NDArray[Any]:
        """Decode; ValueError says what is wrong with the bytes."""
        for i, step in enumerate(reversed(self.steps)):
            data = _decode_step(step, data, self.nbytes, last=i == len(self.steps) - 1)
        if len(data) != self.nbytes:
            raise ValueError(f"{len(data)} bytes after decoding, expected {self.nbytes}")
        flat = np.frombuffer(data, dtype=self.stored_dtype)
        if self.order is not None:
            flat = flat.reshape([self.shape[a] for a in self.order]).transpose(np.argsort(self.order))
        return flat.astype(self.dtype, copy=False).reshape(self.shape)


def _decode_step(step: str, data: bytes, nbytes: int, *, last: bool) -> Any:
    try:
        if step == "zstd":
            # a destination of the right size also keeps a hostile frame from asking for more memory
            out: Any = np.empty(nbytes, np.uint8) if last else None
            return imagecodecs.zstd_decode(data, out=out)
        if step == "gzip":
            return imagecodecs.gzip_decode(data)
        if step == "blosc":
            return imagecodecs.blosc_decode(data)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{step} cannot decode {len(data)} bytes: {error}") from error
    payload, stored = data[:-4], struct.unpack("<I", data[-4:].ljust(4, b"\0"))[0]
    if len(data) < 4 or google_crc32c.value(bytes(payload)) != stored:
        raise ValueError("crc32c of a chunk does not match")
    return payload


def parse_codecs(
    codecs: Sequence[Mapping[str, Any]], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> ChunkDecoder | None:
    """A decoder for the zarr v3 codecs given, or ``None`` when one of them is not known here."""
    order: tuple[int, ...] | None = None
    stored = dtype
    steps: list[str] = []
    for codec in codecs:
        name, config = codec["name"], codec.get("configuration") or {}
        if name == "transpose" and order is None and not steps:
            order = tuple(int(a) for a in config["order"])
            if sorted(order) != list(range(len(shape))):
                return None
        elif name == "bytes":
            stored = dtype.newbyteorder(">" if config.get("endian") == "big" else "<")
        elif name in BYTE_CODECS:
            steps.append(name)
        else:
            return None
    return ChunkDecoder(shape=shape, stored_dtype=stored, order=order, steps=tuple(steps))
