"""What the user names as input, image by image: files, folders, tables, prefixes of object stores."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ats_stream.errors import ArchiveError, InputError, StorageError
from ats_stream.io.archive import number_of
from ats_stream.io.conversion.manifest import SUFFIX as MANIFEST_SUFFIX
from ats_stream.io.formats.video import SUFFIXES as VIDEO_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

# endings of what is taken from folders and prefixes; a file that is named outright may be called anything
SLIDE_SUFFIXES = VIDEO_SUFFIXES | frozenset(
    {".svs", ".tif", ".tiff", ".ndpi", ".dcm", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".zvi"}
    | {".czi", ".qptiff", ".png", ".jpg", ".jpeg", ".jp2", ".bmp"}
)
STORE_SUFFIXES = frozenset({".zarr", ".zip"})
TABLE_SUFFIXES = frozenset({".csv"})
GROUP_FILES = ("zarr.json", ".zattrs", ".zgroup")


def expand_inputs(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    slide_column: str = "slide",
    storage_options: Mapping[str, Any] | None = None,
    out_dir: str | os.PathLike[str] | None = None,
) -> list[str]:
    """Paths and URLs of single images, in the order given, what is in a folder or prefix sorted by name.

    What an earlier run made in ``out_dir`` is left out where that lies in a folder that is given.
    Raises InputError for a folder or prefix without images, ArchiveError for a table that cannot be read.
    """
    found: list[str] = []
    for given in inputs:
        text = os.fspath(given)
        if "://" in text:
            found += _in_prefix(text, storage_options)
        elif Path(text).is_dir() and not _is_store(Path(text)):
            found += _in_folder(Path(text), None if out_dir is None else Path(out_dir))
        elif Path(text).suffix.lower() in TABLE_SUFFIXES:
            found += [_beside(text, row[slide_column]) for row in _rows(text, (slide_column,))]
        else:
            found.append(text)
    return list(dict.fromkeys(found))


def is_remote_file(source: str) -> bool:
    """Whether a source is a file behind a URL, which must be fetched to be read."""
    return "://" in source and Path(source.rstrip("/")).suffix.lower() in SLIDE_SUFFIXES


def _is_store(path: Path) -> bool:
    return any((path / name).exists() for name in GROUP_FILES)


def _in_folder(folder: Path, out_dir: Path | None) -> list[str]:
    found: list[str] = []
    for place, folders, files in os.walk(folder):
        here = Path(place)
        stores = [name for name in folders if _is_store(here / name)]
        if out_dir is not None and here.resolve() == out_dir.resolve():
            # pyramids lie there as they were made; slides may lie among them
            stores = [name for name in stores if not (here / (name + MANIFEST_SUFFIX)).exists()]
            folders[:] = [name for name in folders if name in stores or not _is_store(here / name)]
        # what is in a store is no image of its own; what is unfinished is none yet
        folders[:] = [n for n in folders if n not in stores and not n.endswith(".partial")]
        found += [str(here / name) for name in stores if not name.endswith((".partial", ".old"))]
        found += [str(here / n) for n in files if Path(n).suffix.lower() in SLIDE_SUFFIXES]
    if not found:
        raise InputError(f"{folder}: no slides in this folder")
    return sorted(found)


def _in_prefix(url: str, storage_options: Mapping[str, Any] | None) -> list[str]:
    suffix = Path(url.rstrip("/")).suffix.lower()
    if suffix in SLIDE_SUFFIXES | STORE_SUFFIXES or url.startswith(("http://", "https://")):
        return [url.rstrip("/")]
    names: set[str] = set()
    for key in _keys(url, storage_options):
        parts = Path(key).parts
        store = next((i for i, part in enumerate(parts[:-1]) if part.endswith(".zarr")), None)
        if store is not None:
            if parts[store + 1 :] in {(name,) for name in GROUP_FILES}:
                names.add("/".join(parts[: store + 1]))
        elif Path(key).suffix.lower() in SLIDE_SUFFIXES:
            names.add(key)
    if not names:
        raise InputError(f"{url}: no slides under this prefix")
    return [f"{url.rstrip('/')}/{name}" for name in sorted(names)]


def _keys(url: str, storage_options: Mapping[str, Any] | None) -> Iterator[str]:
    import obstore

    from ats_stream.io.storage.remote import ObjectStore
    from ats_stream.io.storage.retry import with_retries
    from ats_stream.io.storage.store_error import StoreError

    store = ObjectStore(url, storage_options)

    def keys() -> list[str]:
        return store.attempt(
            "the list of objects",
            lambda client: [str(item["path"]) for batch in obstore.list(client) for item in batch],
        )

    try:
        yield from with_retries(keys, store.policy)
    except StoreError as error:
        raise StorageError(f"{store.shown_url}: {error}") from error


def _rows(table: str, columns: Iterable[str]) -> list[dict[str, str]]:
    """Rows of a CSV table with a header; ArchiveError unless all of them have these columns."""
    try:
        with Path(table).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            for column in columns:
                if column not in (reader.fieldnames or ()):
                    header = ", ".join(reader.fieldnames or ()) or "nothing"
                    raise ArchiveError(f"{table}:1: no column {column!r}, the header has {header}")
            rows = []
            for row in reader:
                values = {column: (row[column] or "").strip() for column in columns}
                empty = next((column for column, value in values.items() if not value), None)
                if empty is not None:
                    raise ArchiveError(f"{table}:{reader.line_num}: column {empty!r} is empty")
                rows.append(values)
    except FileNotFoundError as error:
        raise ArchiveError(f"{table}: no such file") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ArchiveError(f"{table}: cannot read it: {error}") from error
    if not rows:
        raise ArchiveError(f"{table}: the table has no rows")
    return rows


def _beside(table: str, slide: str) -> str:
    return slide if "://" in slide else os.path.normpath(Path(table).parent / slide)


def pixel_sizes(table: str | os.PathLike[str], slides: Sequence[str]) -> dict[str, float]:
    """Pixel sizes in micrometres that a CSV table gives for slides: columns ``slide``, ``pixel_size_um``.

    A row names a slide by path, relative to the table or to the working directory, by file name, or by file
    name without ending. ArchiveError for a size that is none, or two sizes for one slide.
    """
    text = os.fspath(table)
    found: dict[str, float] = {}
    by_name: dict[str, list[str]] = {}
    for slide in slides:
        path = Path(slide)
        for name in {slide, os.path.normpath(slide), str(path.resolve()), path.name, path.stem}:
            by_name.setdefault(name, []).append(slide)
    for number, row in enumerate(_rows(text, ("slide", "pixel_size_um")), start=2):
        size = number_of(text, number, "pixel_size_um", row["pixel_size_um"])
        named = row["slide"]
        keys = (named, os.path.normpath(named), str((Path(text).parent / named).resolve()))
        for slide in next((by_name[key] for key in keys if key in by_name), []):
            if found.setdefault(slide, size) != size:
                raise ArchiveError(f"{text}:{number}: slide {slide} has two pixel sizes")
    return found
