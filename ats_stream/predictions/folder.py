"""The folder of a prediction: what is done stays done, whenever the run is cut off.

predict.json              what is predicted, with which model; a run with another is refused
slides/NAME.json          the record of a slide, written last: with it the slide is done
attention/NAME.ome.zarr   patches/NAME.geojson   embeddings/NAME.parquet   pictures/NAME.png
predictions.parquet       all records, once every slide is done
predictions.csv  report.html
"""

from __future__ import annotations

import fcntl
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ats_stream.errors import InputError, StorageError, TargetExistsError
from ats_stream.files import write_atomic
from ats_stream.predictions.record import PredictionInfo, SlideRecord
from ats_stream.predictions.table import CSV_NAME, PARQUET_NAME, read_parquet, write_csv, write_parquet

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

INFO_NAME = "predict.json"
LOCK_NAME = ".lock"
SLIDES_FOLDER = "slides"
PICTURES_FOLDER = "pictures"
ATTENTION_FOLDER = "attention"
PATCHES_FOLDER = "patches"
EMBEDDINGS_FOLDER = "embeddings"
_MEANING = {
    "model": "another model",
    "images": "other images, labels or pixel sizes",
    "num_images": "another number of images",
}


def attention_path(folder: Path, name: str) -> Path:
    """Where the attention image of a slide lies."""
    return folder / ATTENTION_FOLDER / f"{name}.ome.zarr"


def patches_path(folder: Path, name: str) -> Path:
    """Where the boxes of a slide's patches lie."""
    return folder / PATCHES_FOLDER / f"{name}.geojson"


def embeddings_path(folder: Path, name: str) -> Path:
    """Where the features of a slide's patches lie."""
    return folder / EMBEDDINGS_FOLDER / f"{name}.parquet"


def picture_path(folder: Path, name: str) -> Path:
    """Where the picture of a slide lies."""
    return folder / PICTURES_FOLDER / f"{name}.png"


class PredictionFolder:
    """A folder that this process alone writes predictions into; made by :func:`taken`."""

    def __init__(self, path: Path, info: PredictionInfo, names: Sequence[str]) -> None:
        self.path, self.info, self.names = path, info, tuple(names)

    def undone(self) -> list[int]:
        """Numbers of the slides without a prediction: those to come, and those that could not be read."""
        return [i for i, name in enumerate(self.names) if (r := self._record(name)) is None or r.is_bad]

    def commit(self, record: SlideRecord) -> None:
        """Note a slide as done; whatever else belongs to it must have been written."""
        write_atomic(self._place(record.name), record.to_json())

    def records(self) -> Iterator[SlideRecord]:
        """The records there are, in the order of the slides."""
        return (record for name in self.names if (record := self._record(name)) is not None)

    def finish(self) -> None:
        """Write the tables; the same records give the same bytes."""
        write_parquet(self.path / PARQUET_NAME, self.info, self.records())
        write_csv(self.path / CSV_NAME, self.info, self.records())

    def _place(self, name: str) -> Path:
        return self.path / SLIDES_FOLDER / f"{name}.json"

    def _record(self, name: str) -> SlideRecord | None:
        return _read_record(self._place(name))


@contextmanager
def taken(path: Path, info: PredictionInfo, names: Sequence[str]) -> Iterator[PredictionFolder]:
    """Make the folder of a prediction, or take up one that was begun with the same model and images.

    Raises TargetExistsError for a folder of something else, or one that another process writes to, and
    StorageError if the disk refuses.
    """
    _check(path, info)
    lock_path = path / LOCK_NAME
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = lock_path.open("ab")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TargetExistsError(f"{path}: another run is predicting into it") from None
        write_atomic(path / INFO_NAME, json.dumps(info.to_dict(), indent=1).encode())
        yield PredictionFolder(path, info, names)
        lock_path.unlink(missing_ok=True)


def read_folder(path: Path) -> tuple[PredictionInfo, list[SlideRecord], bool]:
    """What a folder of predictions holds, without lists of patches, and whether it is whole.

    Of a run that was cut off these are the slides that it had done, by name. InputError for no such folder.
    """
    table = path / PARQUET_NAME
    if table.exists():
        info, records = read_parquet(table, patches=False)
        return info, records, True
    begun = _read_info(path)
    if begun is None:
        raise InputError(f"{path}: no predictions in it (neither {PARQUET_NAME} nor {INFO_NAME})")
    places = sorted((path / SLIDES_FOLDER).glob("*.json"))
    return begun, [record for place in places if (record := _read_record(place)) is not None], False


def read_record(path: Path, name: str) -> SlideRecord | None:
    """The record of one slide with its patches; None if it is not there or not whole."""
    return _read_record(path / SLIDES_FOLDER / f"{name}.json")


def is_prediction(path: Path) -> bool:
    """Whether a folder holds predictions, or the beginning of some."""
    return (path / INFO_NAME).is_file() or (path / PARQUET_NAME).is_file()


def _check(path: Path, info: PredictionInfo) -> None:
    if path.exists() and not path.is_dir():
        raise TargetExistsError(f"{path}: exists already and is not a folder")
    before = _read_info(path)
    if before is None:
        if path.is_dir() and any(entry.name != LOCK_NAME for entry in path.iterdir()):
            raise TargetExistsError(f"{path}: exists already and is not empty")
        return
    now = info.to_dict()
    for name, old in before.to_dict().items():
        if old != now[name]:
            what = _MEANING.get(name, f"{name} {old!r}, not {now[name]!r}")
            raise TargetExistsError(f"{path}: holds predictions with {what}; use another folder")


def _read_info(path: Path) -> PredictionInfo | None:
    try:
        return PredictionInfo.from_dict(json.loads((path / INFO_NAME).read_bytes()))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path / INFO_NAME}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / INFO_NAME}: is not what predict writes: {error}") from error


def _read_record(place: Path) -> SlideRecord | None:
    try:
        return SlideRecord.from_json(place.read_bytes())
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # of an unfinished or foreign file the slide is simply done again
