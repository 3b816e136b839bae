"""The archive table, a CSV file: which slides there are, their labels, and the split each belongs to."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ats_stream.errors import ArchiveError, TargetExistsError
from ats_stream.files import write_atomic
from ats_stream.io.remote import has_login

COLUMNS = ("slide", "label", "split")


@dataclass(frozen=True, kw_only=True)
class ArchiveRow:
    """One slide of the table."""

    slide: str
    """Path of the pyramid; relative ones of the table are resolved against the table's folder."""
    label: str
    split: str
    line: int
    """Where it stands in the file, the header being line 1."""

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
    """Read a CSV table with a header and the columns slide, label and split.

    ``columns`` maps these names to those of the file, such as ``{"label": "diagnosis"}``; other columns are
    ignored. Rows keep their order. ``classes``, if given, are all labels allowed, in the order of their
    numbers; by default the labels of the table, sorted. Raises ArchiveError with file, line and reason; for a
    slide that does not exist only with ``check_slides``.
    """
    table = Path(path)
    names = _column_names(columns or {})
    rows: list[ArchiveRow] = []
    lines: dict[str, int] = {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [n for n in names.values() if n not in (reader.fieldnames or ())]
            if missing:
                found = ", ".join(reader.fieldnames or ()) or "nothing"
                raise ArchiveError(f"{table}:1: no column {missing[0]!r}, the header has {found}")
            for values in reader:
                row = _row(table, reader.line_num, values, names)
                _check_row(table, row, lines, classes, check_slides)
                rows.append(row)
    except FileNotFoundError as error:
        raise ArchiveError(f"{table}: no such file") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ArchiveError(f"{table}: cannot read it: {error}") from error
    if not rows:
        raise ArchiveError(f"{table}: the table has no rows")
    found_classes = tuple(classes) if classes is not None else tuple(sorted({row.label for row in rows}))
    return Archive(path=str(table), rows=tuple(rows), classes=found_classes)


def _column_names(columns: Mapping[str, str]) -> dict[str, str]:
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown:
        raise ArchiveError(
            f"columns maps the unknown name {unknown[0]!r}, expected some of {', '.join(COLUMNS)}"
        )
    return {name: columns.get(name, name) for name in COLUMNS}


def _row(table: Path, line: int, values: Mapping[str | None, object], names: Mapping[str, str]) -> ArchiveRow:
    if None in values:
        raise ArchiveError(f"{table}:{line}: more values than columns")
    found = {}
    for name, column in names.items():
        value = values[column]
        if not isinstance(value, str) or not value.strip():
            raise ArchiveError(f"{table}:{line}: column {column!r} is empty")
        found[name] = value.strip()
    slide = found["slide"]
    if has_login(slide):  # it would be written with every result
        raise ArchiveError(
            f"{table}:{line}: a user or password stands in the URL: give both as storage options"
        )
    if "://" not in slide:
        slide = os.path.normpath(table.parent / slide)
    return ArchiveRow(slide=slide, label=found["label"], split=found["split"], line=line)


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
