"""Predictions as tables: Parquet with all that is known, CSV with one line a slide for people."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any

from ats_stream.errors import InputError
from ats_stream.files import open_atomic, write_atomic
from ats_stream.predictions.record import Patches, PredictionInfo, SlideRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

PARQUET_NAME = "predictions.parquet"
CSV_NAME = "predictions.csv"
INFO_KEY = b"ats_stream"
ROWS_PER_GROUP = 1024
_PATCH_FIELDS = ("draw", "y", "x", "attention", "weight")
_PLAIN_FIELDS = (
    "slide", "name", "split", "label", "group", "time", "predicted", "right", "height", "width",
    "pixel_size_um", "patch_px", "stored_bytes", "decoded_bytes", "full_bytes", "seconds", "error",
)  # fmt: skip


def write_parquet(path: Path, info: PredictionInfo, records: Iterable[SlideRecord]) -> Path:
    """Write one row a slide, some rows at a time; equal records give equal bytes.

    Lists of a row (``patch_y`` and so on) have one entry a drawn patch. The file's metadata hold the
    :class:`PredictionInfo`. Raises StorageError if the disk refuses.
    """
    import pyarrow
    import pyarrow.parquet

    schema = _schema(info)
    with (
        open_atomic(path) as file,
        pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        for batch in _batches(records):
            rows = [_row(info, record) for record in batch]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
    return path


def write_csv(path: Path, info: PredictionInfo, records: Iterable[SlideRecord]) -> Path:
    """Write one line a slide: what was predicted, how much was read, and why a slide has no prediction."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    errors = info.error_columns() if info.num_draws > 1 else ()
    read = ("num_patches", "stored_bytes", "decoded_bytes", "full_bytes", "seconds", "error")
    writer.writerow(("slide", "name", "split", "label", "predicted", *info.value_columns(), *errors, *read))
    for one in records:
        nothing = [""] * (len(info.outputs) + len(errors))
        values = [f"{v:.6f}" for v in (*one.value_K, *one.standard_error_K)] or nothing
        counts = (len(one.patches), one.stored_bytes, one.decoded_bytes, one.full_bytes, f"{one.seconds:.4f}")
        writer.writerow(
            (one.slide, one.name, one.split, one.label, one.predicted, *values, *counts, one.error)
        )
    return write_atomic(path, text.getvalue().encode())


def read_parquet(path: Path, *, patches: bool = True) -> tuple[PredictionInfo, list[SlideRecord]]:
    """Read what :func:`write_parquet` wrote; without ``patches`` the lists stay empty and unread.

    Raises InputError for a file that is absent or is none of these.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            metadata = (file.schema_arrow.metadata or {}).get(INFO_KEY)
            if metadata is None:
                raise InputError(f"{path}: no table of predictions")
            info = PredictionInfo.from_dict(json.loads(metadata))
            wanted = [
                n for n in file.schema_arrow.names if patches or not n.startswith("patch_") or n == "patch_px"
            ]
            records = [
                _record(info, row) for batch in file.iter_batches(columns=wanted) for row in batch.to_pylist()
            ]
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot read it: {' '.join(str(error).split())}") from error
    return info, records


def _batches(records: Iterable[SlideRecord]) -> Iterator[list[SlideRecord]]:
    batch: list[SlideRecord] = []
    for record in records:
        batch.append(record)
        if len(batch) == ROWS_PER_GROUP:
            yield batch
            batch = []
    if batch:
        yield batch


def _schema(info: PredictionInfo) -> Any:
    import pyarrow as pa

    integers = dict.fromkeys(
        ("height", "width", "patch_px", "stored_bytes", "decoded_bytes", "full_bytes"), pa.int64()
    )
    kinds = {
        **integers,
        "right": pa.bool_(),
        **dict.fromkeys(("time", "pixel_size_um", "seconds"), pa.float64()),
    }
    fields = [pa.field(name, kinds.get(name, pa.string())) for name in _PLAIN_FIELDS]
    fields += [pa.field(name, pa.float64()) for name in (*info.value_columns(), *info.error_columns())]
    kinds = {"draw": pa.int32(), "attention": pa.float32(), "weight": pa.float32()}
    fields += [pa.field(f"patch_{name}", pa.list_(kinds.get(name, pa.int64()))) for name in _PATCH_FIELDS]
    return pa.schema(fields, metadata={INFO_KEY: json.dumps(info.to_dict()).encode()})


def _row(info: PredictionInfo, record: SlideRecord) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(record, name) for name in _PLAIN_FIELDS}
    row |= dict(zip(info.value_columns(), record.value_K or [None] * len(info.outputs), strict=True))
    row |= dict(zip(info.error_columns(), record.standard_error_K or [None] * len(info.outputs), strict=True))
    return row | {f"patch_{name}": list(getattr(record.patches, name)) for name in _PATCH_FIELDS}


def _record(info: PredictionInfo, row: dict[str, Any]) -> SlideRecord:
    def present(names: tuple[str, ...]) -> tuple[float, ...]:
        return tuple(row[name] for name in names) if row[names[0]] is not None else ()

    return SlideRecord(
        **{name: row[name] for name in _PLAIN_FIELDS},
        value_K=present(info.value_columns()),
        standard_error_K=present(info.error_columns()),
        patches=Patches(**{name: tuple(row.get(f"patch_{name}") or ()) for name in _PATCH_FIELDS}),
    )
