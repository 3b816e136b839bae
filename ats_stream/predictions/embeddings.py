"""The features of the drawn patches, for clustering or other models: a Parquet file a slide.

Shape letters: P patches, F features.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from ats_stream.files import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from ats_stream.predictions.record import SlideRecord


def write_embeddings(path: Path, record: SlideRecord, features_PF: npt.NDArray[Any]) -> Path:
    """Write a row a patch: slide, draw, y, x, attention, weight, and ``feature``, F numbers of 32 bits.

    ``y`` and ``x`` are the patch's first pixel at level 0. Many such files are one table for pyarrow, pandas,
    polars or DuckDB. Raises StorageError if the disk refuses.
    """
    import pyarrow as pa
    import pyarrow.parquet

    patches = record.patches
    num_features = features_PF.shape[1]
    flat = pa.array(features_PF.astype("float32").ravel(), pa.float32())
    columns = {
        "slide": pa.array([record.name] * len(patches), pa.string()).dictionary_encode(),
        "draw": pa.array(patches.draw, pa.int32()),
        "y": pa.array(patches.y, pa.int64()),
        "x": pa.array(patches.x, pa.int64()),
        "attention": pa.array(patches.attention, pa.float32()),
        "weight": pa.array(patches.weight, pa.float32()),
        "feature": pa.FixedSizeListArray.from_arrays(flat, num_features),
    }
    whole = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), whole, compression="zstd")
    return write_atomic(path, whole.getvalue())
