"""Metrics of a run: one JSON object a line in metrics.jsonl, and the same numbers for TensorBoard."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ats_stream.errors import StorageError
from ats_stream.files import write_atomic
from ats_stream.workers.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ats_stream.workers.quarantine import BadImage

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
PROGRESS_FILE = "progress.json"
PROGRESS_INTERVAL_S = 1.0
SKIPPED = "skipped"
"""Phase of the record of an image that could not be read and is left out: its row, slide and reason."""

Record = dict[str, Any]


class MetricsLog:
    """Writes the records of a run. After a resume, records of steps that will be done again are dropped.

    A record has ``step``, ``phase`` (``train`` or ``val``) and numbers; or the phase ``skipped``, and names
    an image that could not be read.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        resumed_step: int,
        on_record: Callable[[Record], None] | None = None,
        on_step: Callable[[Progress], None] | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run_dir / METRICS_FILE
        self._run_dir = run_dir
        self._on_record, self._on_step = on_record, on_step
        self._progress_s = 0.0
        keep_metrics(run_dir, resumed_step)
        try:
            # the folder is made here, where its failure leaves nothing open
            (run_dir / TENSORBOARD_FOLDER).mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            # its thread may sleep this long after Ctrl-C has cut a write short; the default is two minutes
            self._board = SummaryWriter(
                str(run_dir / TENSORBOARD_FOLDER), purge_step=resumed_step + 1, flush_secs=1
            )
        except OSError as error:
            raise StorageError(f"{run_dir}: cannot write metrics: {error.strerror or error}") from error

    def write(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        """Add one record; StorageError if the disk refuses."""
        record: Record = {"phase": phase, "step": step, **numbers}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            for name, value in numbers.items():
                self._board.add_scalar(f"{phase}/{name}", value, step)
            self._board.flush()
        except OSError as error:
            raise StorageError(f"{self.path}: cannot write metrics: {error.strerror or error}") from error
        if self._on_record is not None:
            self._on_record(record)

    def skipped(self, step: int, epoch: int, image: BadImage) -> None:
        """Add the record of an image that is left out; StorageError if the disk refuses."""
        record = {"phase": SKIPPED, "step": step, "epoch": epoch, **dataclasses.asdict(image)}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise StorageError(f"{self.path}: cannot write metrics: {error.strerror or error}") from error
        if self._on_record is not None:
            self._on_record(record)

    def progress(self, progress: Progress) -> None:
        """Tell how far the run is: to ``on_step``, else in a file that other processes may look at."""
        if self._on_step is not None:
            self._on_step(progress)
        elif time.monotonic() - self._progress_s >= PROGRESS_INTERVAL_S:
            self._progress_s = time.monotonic()
            write_atomic(self._run_dir / PROGRESS_FILE, progress.to_json())

    def close(self) -> None:
        """Close the files; of a run that goes on nowhere there is no progress to look at."""
        self._file.close()
        self._board.close()
        (self._run_dir / PROGRESS_FILE).unlink(missing_ok=True)


class MetricsFollower:
    """Gives each record that another process adds to a run once, be the file rewritten by a resume or not."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._seen: set[tuple[Any, ...]] = set()
        self.new_records()

    def new_records(self) -> list[Record]:
        """Records of a phase and step, or of a bad image, that were not there before."""
        fresh = {(r.get("phase"), r["step"], r.get("image")): r for r in read_metrics(self.run_dir)}
        found = [record for key, record in fresh.items() if key not in self._seen]
        self._seen |= fresh.keys()
        return found


def read_progress(run_dir: Path) -> Progress | None:
    """How far a run on Ray is; None if it has not said yet."""
    try:
        return Progress.from_json((run_dir / PROGRESS_FILE).read_bytes())
    except (OSError, ValueError, TypeError):
        return None


def keep_metrics(run_dir: Path, resumed_step: int) -> None:
    """Drop the records of steps after ``resumed_step``; StorageError if the disk refuses."""
    kept = [record for record in read_metrics(run_dir) if record["step"] <= resumed_step]
    lines = "".join(json.dumps(record) + "\n" for record in kept)
    write_atomic(run_dir / METRICS_FILE, lines.encode())
    (run_dir / PROGRESS_FILE).unlink(missing_ok=True)


def read_metrics(run_dir: Path) -> list[Record]:
    """All whole records of a run, in the order written; an unfinished last line is left out.

    Raises StorageError if there is a file that cannot be read.
    """
    path = Path(run_dir) / METRICS_FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{path}: cannot read metrics: {error.strerror or error}") from error
    return list(_parse(data[: data.rfind(b"\n") + 1]))


def _parse(lines: bytes) -> Iterator[Record]:
    for line in lines.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record
