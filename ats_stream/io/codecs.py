"""Decoding of one chunk for the codecs that every zarr v3 store may use; anything else goes through
zarr-python.
"""

from __future__ import annotations

import math
import struct
import threading
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import google_crc32c
import imagecodecs
import numpy as np
import numpy.typing as npt
import zstandard

from ats_stream.io.jpeg import NAMES as JPEG_NAMES
from ats_stream.io.jpeg import WRITTEN_NAME, JpegFormat, image_shape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# effort of blosc around lz4; more is slower and hardly smaller
BLOSC_LEVEL = 5
WRITTEN_CODECS = ("zstd", "lz4", "raw", "jpeg")
_DECODERS: dict[str, Any] = {
    "zstd": imagecodecs.zstd_decode,
    "gzip": imagecodecs.gzip_decode,
    "blosc": imagecodecs.blosc_decode,
    # zarr v2 alone; its lz4 begins with the size, which is not believed
    "zlib": imagecodecs.zlib_decode,
    "lz4": partial(imagecodecs.lz4_decode, header=True),
}
# names in zarr v3; those of numcodecs mean the formats of zarr v2
BYTE_CODECS = {name: name for name in ("zstd", "gzip", "blosc", "crc32c")} | {
    f"numcodecs.{name}": name for name in _DECODERS
}


def max_stored_bytes(nbytes: int) -> int:
    """Bytes that no codec needs for a chunk of ``nbytes``: noise grows by less than a hundredth."""
    return nbytes + nbytes // 8 + 4096


@dataclass(frozen=True, kw_only=True)
class ChunkCodec:
    """How the chunks of an array are written."""

    name: str
    """``zstd``, ``lz4``, ``raw`` or ``jpeg``."""
    level: int = 1
    """Effort of zstd, 1 to 22."""
    jpeg: JpegFormat | None = None
    """How chunks (S, ..., Y, X) are JPEG; samples are interleaved in the data."""

    def __post_init__(self) -> None:
        if self.name not in WRITTEN_CODECS or (self.jpeg is not None) != (self.name == "jpeg"):
            raise ValueError(
                f"codec {self.name!r} with {self.jpeg}, expected one of {', '.join(WRITTEN_CODECS)}"
            )

    def metadata(self, chunk_shape: Sequence[int], itemsize: int = 1) -> list[dict[str, Any]]:
        """The codecs of the ``zarr.json`` of an array whose numbers have ``itemsize`` bytes.

        >>> codec = ChunkCodec(name="jpeg", jpeg=JpegFormat(level=80))
        >>> [(c["name"], c["configuration"]) for c in codec.metadata((3, 64, 64))]
        [('transpose', {'order': [1, 2, 0]}), ('imagecodecs_jpeg', {'level': 80})]
        """
        if self.jpeg is not None:
            jpeg = {"name": WRITTEN_NAME, "configuration": self.jpeg.to_config()}
            order = _samples_last(chunk_shape)
            return (
                [jpeg] if order is None else [{"name": "transpose", "configuration": {"order": order}}, jpeg]
            )
        codecs: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
        if self.name == "zstd":
            codecs.append({"name": "zstd", "configuration": {"level": self.level, "checksum": False}})
        elif self.name == "lz4":
            # zarr v3 has no plain lz4 that others read; blosc has it
            blosc = {
                "cname": "lz4",
                "clevel": BLOSC_LEVEL,
                "shuffle": "shuffle" if itemsize > 1 else "noshuffle",
                "typesize": itemsize,
                "blocksize": 0,
            }
            codecs.append({"name": "blosc", "configuration": blosc})
        return codecs

    def encode(self, chunk: npt.NDArray[Any]) -> bytes:
        """Bytes of a whole chunk."""
        if self.jpeg is not None:
            order = _samples_last(chunk.shape)
            return self.jpeg.encode(chunk if order is None else chunk.transpose(order))
        little = np.ascontiguousarray(chunk, dtype=chunk.dtype.newbyteorder("<"))
        if self.name == "raw":
            return little.tobytes()
        # the flat view: the encoder takes any buffer, and releases the interpreter lock
        flat: Any = little.reshape(-1).view(np.uint8)
        if self.name == "lz4":
            itemsize = chunk.dtype.itemsize
            return bytes(
                imagecodecs.blosc_encode(
                    flat,
                    level=BLOSC_LEVEL,
                    compressor="lz4",
                    shuffle="shuffle" if itemsize > 1 else "noshuffle",
                    typesize=itemsize,
                    numthreads=1,
                )
            )
        return _kept.compressor(self.level).compress(flat)


def _samples_last(shape: Sequence[int]) -> list[int] | None:
    """Order of axes that interleaves the samples of a chunk (S, ..., Y, X), None for a single one."""
    return [*range(1, len(shape)), 0] if shape[0] > 1 else None


@dataclass(frozen=True, kw_only=True)
class ChunkDecoder:
    """Turns the stored bytes of a chunk into an array of ``shape`` and native byte order."""

    shape: tuple[int, ...]
    stored_dtype: np.dtype[Any]
    order: tuple[int, ...] | None
    """Axes of the stored array in terms of the chunk's (codec ``transpose``)."""
    steps: tuple[str, ...]
    """Byte codecs in the order in which they were applied when writing."""
    jpeg: JpegFormat | None = None
    """How chunks are JPEG; None for plain numbers (codec ``bytes``)."""

    @cached_property
    def _stages(self) -> tuple[tuple[str, int], ...]:
        """Byte codecs in the order in which they are undone, each with the bytes that may come out."""
        limits = [self.max_stored_bytes] * len(self.steps)
        if limits and self.jpeg is None:
            limits[-1] = self.nbytes
        return tuple(zip(reversed(self.steps), limits, strict=True))

    @cached_property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the stored array."""
        return self.shape if self.order is None else tuple(self.shape[a] for a in self.order)

    @cached_property
    def _axes(self) -> tuple[int, ...] | None:
        """What turns the stored axes into the chunk's."""
        return None if self.order is None else tuple(np.argsort(self.order).tolist())

    @cached_property
    def nbytes(self) -> int:
        """Size of a decoded chunk in bytes."""
        return math.prod(self.shape) * self.stored_dtype.itemsize

    @property
    def max_stored_bytes(self) -> int:
        """Bytes that no codec needs for a chunk."""
        return max_stored_bytes(self.nbytes)

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of decoded chunks, in native byte order."""
        return self.stored_dtype.newbyteorder("=")

    def __call__(self, data: bytes) -> npt.NDArray[Any]:
        """Decode; ValueError says what is wrong with the bytes."""
        for step, max_bytes in self._stages:
            data = _decode_step(step, data, max_bytes)
        if self.jpeg is not None:
            stored: npt.NDArray[Any] = self.jpeg.decode(bytes(data), self.stored_shape)
        elif len(data) != self.nbytes:
            raise ValueError(f"{len(data)} bytes after decoding, expected {self.nbytes}")
        else:
            stored = np.frombuffer(data, self.stored_dtype).reshape(self.stored_shape)
        chunk = self.transposed(stored)
        return chunk if self.stored_dtype.isnative else chunk.astype(self.dtype)

    @property
    def is_zstd_alone(self) -> bool:
        """Whether a chunk is one zstd frame of its pixels in native byte order."""
        return self.steps == ("zstd",) and self.jpeg is None and self.stored_dtype.isnative

    def transposed(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The chunk as a view of the stored array."""
        return stored if self._axes is None else stored.transpose(self._axes)


class _PerThread(threading.local):
    """What is kept from chunk to chunk: making a zstd context costs as much as a small chunk."""

    def __init__(self) -> None:
        self.zstd = zstandard.ZstdDecompressor()
        self._compressors: dict[int, zstandard.ZstdCompressor] = {}

    def compressor(self, level: int) -> zstandard.ZstdCompressor:
        """Making one for each chunk would take as long as compressing it."""
        if level not in self._compressors:
            self._compressors[level] = zstandard.ZstdCompressor(level=level)
        return self._compressors[level]


_kept = _PerThread()


def _decode_zstd(data: bytes, nbytes: int) -> bytes | None:
    """The content of a single frame that says it has ``nbytes``; None for anything else, damage as well."""
    try:
        if zstandard.frame_content_size(data) != nbytes:
            return None
        # it allocates what the frame states, which is why that was looked at first
        return _kept.zstd.decompress(data, read_across_frames=False, allow_extra_data=False)
    except zstandard.ZstdError:
        return None


def _decode_step(step: str, data: bytes, max_bytes: int) -> Any:
    if step == "zstd" and (content := _decode_zstd(data, max_bytes)) is not None:
        return content
    try:
        if step in _DECODERS:
            # with a destination, hostile bytes cannot ask for more memory
            return _DECODERS[step](data, out=np.empty(max_bytes, np.uint8))
    except (RuntimeError, ValueError, SystemError) as error:  # what C code raises when sizes make no sense
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
    jpeg: JpegFormat | None = None
    has_bytes = False
    for codec in codecs:
        name, config = codec["name"], codec.get("configuration") or {}
        if name == "transpose" and order is None and not has_bytes:
            order = tuple(int(a) for a in config["order"])
            if sorted(order) != list(range(len(shape))):
                return None
        elif name == "bytes" and not has_bytes and config.get("endian", "little") in {"little", "big"}:
            has_bytes = True
            stored = dtype.newbyteorder(">" if config.get("endian") == "big" else "<")
        elif name in JPEG_NAMES and not has_bytes and dtype == np.uint8:
            has_bytes = True
            jpeg = JpegFormat.from_config(config)
            image_shape(shape if order is None else tuple(shape[a] for a in order))
        elif name in BYTE_CODECS and has_bytes:
            steps.append(BYTE_CODECS[name])
        else:
            return None
    if not has_bytes:
        return None
    return ChunkDecoder(shape=shape, stored_dtype=stored, order=order, steps=tuple(steps), jpeg=jpeg)
