"""What a folder of predictions holds for an image: its attention map, its patches, and what was predicted."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ats_stream.errors import InputError, MissingFileError
from ats_stream.predictions.folder import (
    ATTENTION_FOLDER,
    PATCHES_FOLDER,
    attention_path,
    is_prediction,
    patches_path,
    read_folder,
)
from ats_stream.predictions.table import CSV_NAME

if TYPE_CHECKING:
    from collections.abc import Mapping

SUFFIXES = (".ome.zarr", ".zarr", ".ome.zarr.zip", ".zarr.zip", ".ome.tiff", ".ome.tif")
FOLDERS = (ATTENTION_FOLDER, PATCHES_FOLDER)
MAX_TABLE_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Files and facts about one image; what there is none of is None or empty."""

    attention: Path | None = None
    patches: Path | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    """``predicted``, ``label`` and the columns ``p_CLASS`` of the table, as they stand there."""


class Predictions:
    """A folder that ``ats-stream predict`` wrote, whole or under way."""

    def __init__(self, folder: Path) -> None:
        """Raises MissingFileError when there is no such folder, InputError when no predictions are in it."""
        if not folder.is_dir():
            raise MissingFileError(f"{folder}: no such folder of predictions")
        self.folder = folder
        self._rows = _rows_of(folder / CSV_NAME) or _rows_under_way(folder)
        self._by_place = {_absolute(row["slide"]): row for row in reversed(self._rows)}
        self._by_stem: dict[str, list[dict[str, str]]] = {}
        for row in self._rows:
            self._by_stem.setdefault(stem(row["slide"]), []).append(row)
        if not self._rows and not any((folder / name).is_dir() for name in FOLDERS):
            raise InputError(f"{folder}: no predictions in it ({CSV_NAME}, {'/ or '.join(FOLDERS)}/)")

    @property
    def slides(self) -> tuple[str, ...]:
        """The images of the table, in its order."""
        return tuple(row["slide"] for row in self._rows)

    def of(self, place: str) -> Prediction:
        """What there is of an image: of the row of its path, else of the only one of its name.

        Of several rows with its name and none with its path there is nothing.
        """
        named = self._by_stem.get(stem(place), [])
        row = self._by_place.get(_absolute(place)) or (named[0] if len(named) == 1 else None)
        if row is None and named:
            return Prediction()
        # without a table, as while it is being made, files are known by the name of the image alone
        stated = (row or {}).get("name")
        names = [stated] if stated else [stem(place), PurePosixPath(_as_shown(place)).name]
        names = [name for name in names if name and PurePosixPath(name).name == name]
        maps = [path for name in names if (path := attention_path(self.folder, name)).is_dir()]
        boxes = [path for name in names if (path := patches_path(self.folder, name)).is_file()]
        told = (row or {}).items()
        return Prediction(
            attention=maps[0] if maps else None,
            patches=boxes[0] if boxes else None,
            facts={k: v for k, v in told if v and (k in {"predicted", "label"} or k.startswith("p_"))},
        )


def stem(place: str) -> str:
    """The name of an image without folders and endings.

    >>> stem("runs/a.b.ome.zarr/"), stem("https://host/c.zarr?sig=abc"), stem("d")
    ('a.b', 'c', 'd')
    """
    name = PurePosixPath(_as_shown(place)).name
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return PurePosixPath(name).stem


def _as_shown(place: str) -> str:
    """Without login and query, as tables have URLs."""
    if "://" not in place:
        return place.rstrip("/")
    from ats_stream.io.storage.remote import shown

    return shown(place).rstrip("/")


def _absolute(place: str) -> str:
    return _as_shown(place) if "://" in place else str(Path(place).resolve())


def _rows_of(table: Path) -> list[dict[str, str]]:
    """The rows of a table; none if there is no table yet."""
    try:
        if table.stat().st_size > MAX_TABLE_BYTES:
            raise InputError(f"{table}: larger than {MAX_TABLE_BYTES} bytes, is no table of predictions")
        with table.open(encoding="utf-8", newline="") as stream:
            rows = [{str(k): v or "" for k, v in row.items()} for row in csv.DictReader(stream)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read: {' '.join(str(error).split())}") from error
    if any(not row.get("slide") or "\0" in row["slide"] for row in rows):
        raise InputError(f"{table}: is no table of predictions, it names no slide in some row")
    return rows


def _rows_under_way(folder: Path) -> list[dict[str, str]]:
    """The same of a run that has not written its table yet: the images that it has done."""
    if not is_prediction(folder):
        return []
    info, records, _ = read_folder(folder)
    return [
        {"slide": one.slide, "name": one.name, "label": one.label, "predicted": one.predicted}
        | {name: f"{value:.6f}" for name, value in zip(info.value_columns(), one.value_K, strict=False)}
        for one in records
    ]
