"""The ``.zarray`` of a zarr v2 array: parsing what the fast reader needs. Pure.

Zarr v2 specification: https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ats_stream.io.codecs import ChunkDecoder
from ats_stream.io.layout import DTYPES, ArrayLayout, check_bounds, fill_value, whole_numbers

if TYPE_CHECKING:
    from collections.abc import Mapping

COMPRESSORS = frozenset({"zlib", "gzip", "zstd", "blosc", "lz4"})


def parse_array_v2(meta: Mapping[str, Any]) -> ArrayLayout | None:
    """The layout of a zarr v2 array, ``None`` when it needs zarr-python; ValueError when the metadata are
    broken.

    >>> meta = {"zarr_format": 2, "shape": [9, 9], "chunks": [4, 4], "dtype": ">u2", "order": "F",
    ...         "compressor": {"id": "zlib"}, "filters": None, "fill_value": 7}
    >>> layout = parse_array_v2(meta)
    >>> layout.key((1, 2)), layout.decoder.order, layout.decoder.steps
    ('1.2', (1, 0), ('zlib',))
    """
    try:
        return _parse(meta)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"broken array metadata: {type(error).__name__}: {error}") from error


def _parse(meta: Mapping[str, Any]) -> ArrayLayout | None:
    shape, chunk_shape = whole_numbers(meta["shape"]), whole_numbers(meta["chunks"])
    if not isinstance(meta["dtype"], str) or meta.get("filters"):
        return None
    stored = np.dtype(meta["dtype"])
    compressor = meta["compressor"]
    if stored.name not in DTYPES or (compressor is not None and compressor["id"] not in COMPRESSORS):
        return None
    if len(shape) != len(chunk_shape) or min((*shape, *chunk_shape), default=0) < 1:
        raise ValueError(f"shape {shape}, chunks {chunk_shape}")
    dtype, order = stored.newbyteorder("="), meta["order"]
    separator = meta.get("dimension_separator", ".")
    if separator not in {"/", "."} or order not in {"C", "F"}:
        raise ValueError(f"chunk keys with separator {separator!r}, order {order!r}")
    check_bounds(shape, chunk_shape, chunk_shape, dtype)
    stated = meta.get("fill_value")
    decoder = ChunkDecoder(
        shape=chunk_shape,
        stored_dtype=stored,
        order=tuple(reversed(range(len(shape)))) if order == "F" else None,
        steps=() if compressor is None else (compressor["id"],),
    )
    return ArrayLayout(
        shape=shape,
        dtype=dtype,
        chunk_shape=chunk_shape,
        shard_shape=chunk_shape,
        is_sharded=False,
        index_has_crc=False,
        index_at_end=True,
        fill_value=fill_value(0 if stated is None else stated, dtype),
        decoder=decoder,
        key_prefix="",
        key_separator=separator,
    )
