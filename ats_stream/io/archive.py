"""The archive table, CSV or Parquet: which slides there are, their labels, and the split each belongs to."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ats_stream.errors import ArchiveError, TargetExistsError
from ats_stream.files import write_atomic
from ats_stream.io.storage.remote import has_login

COLUMNS = ("slide", "label", "split")
HEADER_LINE = 1
# columns that a table may have: what must stay together, how much a slide counts, time until the event, and
# the pixel size of slides that state none or a wrong one
OPTIONAL_COLUMNS = ("group", "weight", "time", "pixel_size_um")
MAY_BE_EMPTY = frozenset({"pixel_size_um"})
LABEL_SEPARATOR = ";"
SMALLEST_POSITIVE = math.ulp(0.0)


@dataclass(frozen=True, kw_only=True)
class ArchiveRow:
    """One slide of the table."""

    slide: str
    """Path of the pyramid; relative ones of the table are resolved against the table's folder."""
    label: str
    split: str
    line: int
    """Where it stands in the file, the header being line 1."""
    group: str = ""
    """What must not span splits, such as the patient; empty when the table does not say."""
    weight: float = 1.0
    """How much the slide counts, positive."""
    time: float | None = None
    """Time until the event or the end of observation, not negative; None when the table does not say."""
    pixel_size_um: float | None = None
    """Pixel size of level 0 in micrometres, positive, in place of what the slide says; None for that."""

    @property
    def name(self) -> str:
        """The slide's name without folder and ending."""
        return Path(self.slide).name.removesuffix(".zarr").removesuffix(".ome")


@dataclass(frozen=True, kw_only=True)
class Archive(Sequence[ArchiveRow]):
    """The rows of a table, and the classes that the labels stand for."""

    path: str
    rows: tuple[ArchiveRow, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ArchiveRow]:
        return iter(self.rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # the two overloads of Sequence add nothing here
        return self.rows[index]

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in order of appearance."""
        return tuple(dict.fromkeys(row.split for row in self.rows))

    def split(self, name: str) -> Archive:
        """The rows of one split, with the classes of the whole table; ArchiveError when it has none."""
        rows = tuple(row for row in self.rows if row.split == name)
        if not rows:
            raise ArchiveError(f"{self.path}: no rows of split {name!r}, there are {', '.join(self.splits)}")
        return Archive(path=self.path, rows=rows, classes=self.classes)

    @property
    def has_groups(self) -> bool:
        """Whether the table says what must stay together."""
        return any(row.group for row in self.rows)

    def class_index(self, row: ArchiveRow) -> int:
        """Number of the row's label among the classes."""
        return self.classes.index(row.label)


def read_archive(
    path: str | os.PathLike[str],
    *,
    columns: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    check_slides: bool = True,
) -> Archive:
    """Read a table, CSV with a header or Parquet, with the columns slide, label and split.

    Columns that it may have: ``group`` (a patient, say: must not span splits), ``weight`` (how much a slide
    counts), ``time`` (until the event, for survival) and ``pixel_size_um`` (of level 0, in place of what the
    slide says; the only one that may be empty). ``columns`` maps these names to those of the file, such as
    ``{"label": "diagnosis"}``; other columns are ignored. Rows keep their order. ``classes``, if given, are
    all labels allowed, in the order of their numbers; by default the labels of the table, sorted. Raises
    ArchiveError with file, line and reason; for a slide that does not exist only with ``check_slides``.
    """
    table = Path(path)
    names = _column_names(columns or {})
    rows: list[ArchiveRow] = []
    lines: dict[str, int] = {}
    table_lines = _parquet_lines(table) if is_parquet(table) else _csv_lines(table)
    _, header = next(table_lines)
    used = _used_columns(table, names, columns or {}, header)
    for line, values in table_lines:
        row = _row(table, line, values, used)
        _check_row(table, row, lines, classes, check_slides)
        rows.append(row)
    if not rows:
        raise ArchiveError(f"{table}: the table has no rows")
    check_groups(str(table), rows)
    found_classes = tuple(classes) if classes is not None else tuple(sorted({row.label for row in rows}))
    return Archive(path=str(table), rows=tuple(rows), classes=found_classes)


def label_names(label: str) -> tuple[str, ...]:
    """The classes of an image that may have several: what stands between ``;``.

    >>> label_names("x; y"), label_names("")
    (('x', 'y'), ())
    """
    return tuple(name.strip() for name in label.split(LABEL_SEPARATOR) if name.strip())


def is_table(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of an archive table, by its name.

    >>> is_table("slides.CSV"), is_table("slides.pq"), is_table("slide.ome.zarr")
    (True, True, False)
    """
    return is_parquet(path) or Path(path).suffix.lower() == ".csv"


def is_parquet(path: str | os.PathLike[str]) -> bool:
    """Whether a table is read as Parquet, by its name.

    >>> is_parquet("slides.parquet"), is_parquet("slides.csv")
    (True, False)
    """
    return Path(path).suffix.lower() in {".parquet", ".pq"}


def _csv_lines(table: Path) -> Iterator[tuple[int, dict[str | None, object]]]:
    """Line number and values by column: of the header, each column under its own name, then of each row."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            yield HEADER_LINE, {name: name for name in reader.fieldnames or ()}
            for values in reader:
                yield reader.line_num, values
    except FileNotFoundError as error:
        raise ArchiveError(f"{table}: no such file") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ArchiveError(f"{table}: cannot read it: {error}") from error


def _parquet_lines(table: Path) -> Iterator[tuple[int, dict[str | None, object]]]:
    """The same for Parquet, whose first row counts as line 2; missing values are empty."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(table) as file:
            yield HEADER_LINE, {name: name for name in file.schema_arrow.names}
            line = HEADER_LINE
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    line += 1
                    yield line, {name: "" if value is None else str(value) for name, value in values.items()}
    except FileNotFoundError as error:
        raise ArchiveError(f"{table}: no such file") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise ArchiveError(f"{table}: cannot read it: {' '.join(str(error).split())}") from error


def _column_names(columns: Mapping[str, str]) -> dict[str, str]:
    known = COLUMNS + OPTIONAL_COLUMNS
    unknown = [name for name in columns if name not in known]
    if unknown:
        raise ArchiveError(
            f"columns maps the unknown name {unknown[0]!r}, expected some of {', '.join(known)}"
        )
    return {name: columns.get(name, name) for name in known}


def _used_columns(
    table: Path, names: Mapping[str, str], given: Mapping[str, str], header: Mapping[str | None, object]
) -> dict[str, str]:
    """The columns to read: those that must be there, those that were named, and optional ones that are."""
    missing = [names[n] for n in names if names[n] not in header and (n in COLUMNS or n in given)]
    if missing:
        found = ", ".join(str(name) for name in header) or "nothing"
        raise ArchiveError(f"{table}:1: no column {missing[0]!r}, the header has {found}")
    return {name: column for name, column in names.items() if column in header}


def _row(table: Path, line: int, values: Mapping[str | None, object], names: Mapping[str, str]) -> ArchiveRow:
    if None in values:
        raise ArchiveError(f"{table}:{line}: more values than columns")
    found = {}
    for name, column in names.items():
        value = values[column]
        if isinstance(value, str) and value.strip():
            found[name] = value.strip()
        elif name not in MAY_BE_EMPTY:
            raise ArchiveError(f"{table}:{line}: column {column!r} is empty")
    slide = found["slide"]
    if has_login(slide):  # it would be written with every result
        raise ArchiveError(
            f"{table}:{line}: a user or password stands in the URL: give both as storage options"
        )
    if "://" not in slide:
        slide = os.path.normpath(table.parent / slide)
    return ArchiveRow(
        slide=slide,
        label=found["label"],
        split=found["split"],
        line=line,
        group=found.get("group", ""),
        weight=number_of(table, line, "weight", found.get("weight", "1")),
        time=number_of(table, line, "time", found["time"], smallest=0.0) if "time" in found else None,
        pixel_size_um=number_of(table, line, "pixel_size_um", found["pixel_size_um"])
        if "pixel_size_um" in found
        else None,
    )


def number_of(
    table: str | os.PathLike[str], line: int, name: str, text: str, *, smallest: float = SMALLEST_POSITIVE
) -> float:
    """What a cell of a table says, finite and not below ``smallest``; ArchiveError, with the line, if not."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not smallest <= value < math.inf:
        bound = "positive" if smallest > 0 else "not negative"
        raise ArchiveError(f"{table}:{line}: {name} must be a number that is {bound}, got {text!r}")
    return value


def check_groups(table: str, rows: Sequence[ArchiveRow]) -> None:
    """ArchiveError for a group in two splits: what is learnt of a patient would be tested on the same one."""
    first: dict[str, ArchiveRow] = {}
    for row in rows:
        before = first.setdefault(row.group, row) if row.group else row
        if before.split != row.split:
            raise ArchiveError(
                f"{table}:{row.line}: group {row.group!r} is in split {row.split!r} here and in "
                f"{before.split!r} in line {before.line}; a group must not span splits"
            )


def _check_row(
    table: Path, row: ArchiveRow, lines: dict[str, int], classes: Sequence[str] | None, check_slides: bool
) -> None:
    if row.slide in lines:
        raise ArchiveError(f"{table}:{row.line}: slide {row.slide} stands in line {lines[row.slide]} already")
    lines[row.slide] = row.line
    if classes is not None and row.label not in classes:
        raise ArchiveError(f"{table}:{row.line}: label {row.label!r} is none of {', '.join(classes)}")
    if check_slides and "://" not in row.slide and not Path(row.slide).exists():
        raise ArchiveError(f"{table}:{row.line}: slide {row.slide} does not exist")


def write_archive(
    path: str | os.PathLike[str],
    rows: Sequence[tuple[str | os.PathLike[str], str, str]],
    *,
    overwrite: bool = False,
) -> None:
    """Write (slide, label, split) rows; slides under the table's folder are written relative to it.

    Raises TargetExistsError for a table that exists, unless ``overwrite``, StorageError if the disk refuses.
    """
    table = Path(path)
    if table.exists() and not overwrite:
        raise TargetExistsError(f"{table}: exists already")
    folder = table.parent.resolve()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for slide, label, split in rows:
        place = os.fspath(slide)
        if "://" not in place:
            full = Path(place).resolve()
            place = (full.relative_to(folder) if full.is_relative_to(folder) else full).as_posix()
        writer.writerow((place, label, split))
    write_atomic(table, text.getvalue().encode())
