"""The JPEG chunk codec for zarr-python, which finds it as an entry point of the group ``zarr.codecs``.

Written as ``imagecodecs_jpeg``; read under the name ``jpeg`` too.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from zarr.abc.codec import ArrayBytesCodec

from ats_stream.io.jpeg import NAMES, WRITTEN_NAME, JpegFormat

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer


@dataclass(frozen=True)
class JpegCodec(ArrayBytesCodec):
    """Chunks of bytes, (y, x) or interleaved (y, x, samples), as JPEG.

    An image (c, y, x) needs the codec ``transpose`` with order [1, 2, 0] before it.
    """

    format: JpegFormat = field(default_factory=JpegFormat)
    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build from the codec's metadata; ValueError when they are not of this codec."""
        if data.get("name") not in NAMES:
            raise ValueError(f"codec {data.get('name')!r} is none of {', '.join(sorted(NAMES))}")
        return cls(JpegFormat.from_config(data.get("configuration") or {}))

    def to_dict(self) -> dict[str, Any]:
        """The codec's metadata."""
        return {"name": WRITTEN_NAME, "configuration": self.format.to_config()}

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> Self:
        """Nothing depends on the array; ValueError when it is not one of bytes."""
        dtype = array_spec.dtype.to_native_dtype()
        if dtype != np.uint8:
            raise ValueError(f"JPEG takes uint8, got {dtype}")
        return self

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return await asyncio.to_thread(self._decode_sync, chunk_data, chunk_spec)

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        return await asyncio.to_thread(self._encode_sync, chunk_data, chunk_spec)

    def _decode_sync(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        pixels = self.format.decode(chunk_data.to_bytes(), chunk_spec.shape)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(pixels)

    def _encode_sync(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        return chunk_spec.prototype.buffer.from_bytes(self.format.encode(chunk_data.as_numpy_array()))

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Not known before encoding."""
        raise NotImplementedError
