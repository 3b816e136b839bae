"""The records of a run, sent to other services beside its own files. None of them can stop a training.

Each logger has a thread of the process that was started by the user (not of a rank: it alone has the user's
credentials and packages). What was sent last is noted in the run folder, so that a run that goes on continues
the same run over there, each record once, and what could not be sent is sent by the next command.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import re
import sys
import threading
from typing import TYPE_CHECKING, Any

from ats_stream.errors import InputError
from ats_stream.files import write_atomic
from ats_stream.workers.logger_clients import LOGGERS, RunLogger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from ats_stream.workers.metrics import Record

NOTES_FOLDER = "loggers"
CLOSE_TIMEOUT_S = 60.0
CANCEL_TIMEOUT_S = 5.0
_SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")

_PHASES = ("train", "val")

Key = tuple[int, str]


def make_loggers(names: Sequence[str]) -> dict[str, RunLogger]:
    """Loggers by name; InputError, before anything starts, for a missing package or address."""
    return {name: _make(name) for name in names}


def _make(name: str) -> RunLogger:
    make: Any = LOGGERS[name]
    if importlib.util.find_spec(make.module) is None:
        raise InputError(f"--logger {name} needs the package {make.module}: pip install 'ats-stream[{name}]'")
    logger: RunLogger = make()
    return logger


class Loggers:
    """Sends each record to all loggers while the ``with`` block lasts; ``earlier`` were written before."""

    def __init__(
        self,
        loggers: Mapping[str, RunLogger],
        run_dir: Path,
        config: Mapping[str, Any],
        earlier: Iterable[Record],
        *,
        on_problem: Callable[[str], None] | None = None,
    ) -> None:
        tell = on_problem or _tell
        self._senders = [_Sender(name, one, run_dir, config, tell) for name, one in loggers.items()]
        self._earlier = list(earlier)

    def __enter__(self) -> Self:
        for sender in self._senders:
            sender.start()
        for record in self._earlier:
            self.on_record(record)
        return self

    def on_record(self, record: Record) -> None:
        """Queue one record of numbers; others stay in the run folder."""
        if record["phase"] in _PHASES:
            for sender in self._senders:
                sender.records.put(record)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sender in self._senders:
            sender.records.put(kind is None)
        timeout_s = CLOSE_TIMEOUT_S if kind is None or issubclass(kind, Exception) else CANCEL_TIMEOUT_S
        for sender in self._senders:
            sender.finish(timeout_s)


class _Sender(threading.Thread):
    """The thread of one logger. The first failure is told; from then on nothing is sent."""

    def __init__(
        self,
        name: str,
        logger: RunLogger,
        run_dir: Path,
        config: Mapping[str, Any],
        tell: Callable[[str], None],
    ) -> None:
        super().__init__(name=f"ats-logger-{name}", daemon=True)
        self.records: queue.SimpleQueue[Record | bool] = queue.SimpleQueue()
        """Records, then whether the run succeeded."""
        self._name, self._logger, self._run_dir, self._config, self._tell = (
            name,
            logger,
            run_dir,
            config,
            tell,
        )
        self._note_path = run_dir / NOTES_FOLDER / f"{name}.json"

    def run(self) -> None:
        """Open, send, close."""
        try:
            self._send()
        except Exception as error:  # whatever a package raises
            self._tell(
                f"{self._name}: logging stopped ({_harmless(error)}); training goes on, and the same command "
                "sends later what is missing"
            )

    def _send(self) -> None:
        run_id, last = self._noted()
        is_open = run_id is None
        if run_id is None:
            # at once, so that what is wrong shows before the first epoch is over
            run_id = self._open(None, last)
        while not isinstance(entry := self.records.get(), bool):
            key = (int(entry["step"]), str(entry["phase"]))
            # a run that went back to a checkpoint makes the same records again
            if key <= last:
                continue
            if not is_open:
                run_id, is_open = self._open(run_id, last), True
            self._logger.log(entry)
            last = key
            self._note(run_id, last)
        if is_open:
            self._logger.close(succeeded=entry)

    def _open(self, run_id: str | None, last: Key) -> str:
        run_id = self._logger.open(self._run_dir, self._config, run_id)
        self._note(run_id, last)
        return run_id

    def finish(self, timeout_s: float) -> None:
        """Wait for the end, but not for ever."""
        self.join(timeout_s)
        if self.is_alive():
            self._tell(f"{self._name}: did not end within {timeout_s:g} s; some numbers may be missing there")

    def _noted(self) -> tuple[str | None, Key]:
        try:
            note = json.loads(self._note_path.read_bytes())
            return str(note["id"]), (int(note["step"]), str(note["phase"]))
        except FileNotFoundError:
            return None, (0, "")

    def _note(self, run_id: str, last: Key) -> None:
        note = {"id": run_id, "step": last[0], "phase": last[1]}
        write_atomic(self._note_path, json.dumps(note).encode())


def _tell(line: str) -> None:
    print(f"ats-stream: {line}", file=sys.stderr, flush=True)


def _harmless(error: Exception) -> str:
    """An error in one line, without passwords and keys.

    >>> _harmless(ValueError("cannot reach http://me:secret@host/api"))
    'ValueError: cannot reach http://host/api'
    """
    text = re.sub(r"(\w+://)[^/\s@]*@", r"\1", " ".join(str(error).split()))
    for name in _SECRETS:
        if os.environ.get(name):
            text = text.replace(os.environ[name], "...")
    return f"{type(error).__name__}: {text[:300]}"
