"""Metrics of a run: one JSON object a line in metrics.jsonl, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ats_stream.errors import StorageError
from ats_stream.files import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

Record = dict[str, Any]


class MetricsLog:
    """Writes the records of a run. After a resume, records of steps that will be done again are dropped.

    A record has ``step``, ``phase`` (``train`` or ``val``) and numbers.
    """

    def __init__(
        self, run_dir: Path, *, resumed_step: int, on_record: Callable[[Record], None] | None = None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run_dir / METRICS_FILE
        self._on_record = on_record
        kept = [record for record in read_metrics(run_dir) if record["step"] <= resumed_step]
        write_atomic(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / TENSORBOARD_FOLDER), purge_step=resumed_step + 1)

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

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._board.close()


def read_metrics(run_dir: Path) -> list[Record]:
    """All whole records of a run, in the order written; an unfinished last line is left out."""
    return list(follow_metrics(run_dir, 0)[0])


def follow_metrics(run_dir: Path, start: int) -> tuple[list[Record], int]:
    """Records from byte ``start`` on, and the byte to go on from next time."""
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        return [], start
    with path.open("rb") as file:
        file.seek(start)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    return list(_parse(whole)), start + len(whole)


def _parse(lines: bytes) -> Iterator[Record]:
    for line in lines.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record
