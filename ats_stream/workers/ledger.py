"""The ledger of a run: one line of JSON for each visit that training has taken a step on (ledger.jsonl).

Lines stand in the plan's order. They are on disk before the checkpoint that counts their steps, and a run
that is taken up drops those of steps that it will do again; so after any accident the ledger tells whether
every visit of every epoch was done exactly once (:func:`check_ledger`).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ats_stream.errors import InputError, StorageError
from ats_stream.workers.ranks import collect_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Self

    from ats_stream.workers.plan import Plan
    from ats_stream.workers.protocol import Item
    from ats_stream.workers.ranks import Ranks

LEDGER_FILE = "ledger.jsonl"
TRAIN, VAL = "train", "val"
FLUSH_STEPS = 64
"""Steps after which lines are written even if no checkpoint is."""
KEY_DIGITS = 16
_BLOCK_BYTES = 1 << 20  # 1 MiB


@dataclass(frozen=True, kw_only=True)
class VisitRecord:
    """One visit, as it was done.

    >>> record = VisitRecord(
    ...     phase="train", step=5, epoch=2, rank=0, image=3, slide="a.svs", stream_id=4294967299, share=0.5,
    ...     version=4, attention_key="9f86d081884c7d65", num_drawn=10, seconds=0.25, stored_bytes=100,
    ...     decoded_bytes=300, item_bytes=200, bad=None)
    >>> VisitRecord.from_json(record.to_json()) == record
    True
    """

    phase: str
    """``train``; ``val`` for an image that a validation could not read: other validation is not recorded."""
    step: int
    """Global step that the visit belongs to, from 0; of a validation the last step before it."""
    epoch: int
    """Epoch of the step, from 1."""
    rank: int
    """Which rank trained on it."""
    image: int
    """Row of the archive table."""
    slide: str
    """Its path or URL, without credentials."""
    stream_id: int
    """Key of the draws: one for each visit of a run that counts."""
    share: float
    """Weight in the step's loss by the plan; 0 for a visit that only fills up the last batch of an epoch, and
    in a validation."""
    version: int
    """The attention that drew was that after so many steps,"""
    attention_key: str
    """and these are the first digits of the hash of its weights."""
    num_drawn: int
    """Positions drawn."""
    seconds: float
    """Time of the sampler."""
    stored_bytes: int
    """Bytes of full resolution fetched from storage."""
    decoded_bytes: int
    """Bytes that these decoded to."""
    item_bytes: int
    """Bytes that travelled from the sampler to the rank."""
    bad: str | None
    """Why the image could not be read; None if it was."""

    @classmethod
    def of(cls, item: Item, *, phase: str, step: int, epoch: int, rank: int, share: float) -> Self:
        """The record of an item."""
        return cls(
            phase=phase,
            step=step,
            epoch=epoch,
            rank=rank,
            image=item.visit.image,
            slide=item.slide,
            stream_id=item.visit.stream_id,
            share=share,
            version=item.visit.version,
            attention_key=item.attention_key[:KEY_DIGITS],
            num_drawn=item.num_drawn,
            seconds=round(item.seconds, 6),
            stored_bytes=item.stored_bytes,
            decoded_bytes=item.decoded_bytes,
            item_bytes=item.num_bytes,
            bad=item.bad,
        )

    def to_json(self) -> str:
        """One line, without its end."""
        return json.dumps(self.__dict__, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        """The reverse of ``to_json``; ValueError for anything else."""
        values = json.loads(line)
        if not isinstance(values, dict) or values.keys() != _TYPES.keys():
            raise ValueError(f"a visit has the fields {', '.join(_TYPES)}")
        for name, kind in _TYPES.items():
            if type(values[name]) not in kind:
                raise ValueError(f"{name} is {values[name]!r}")
        return cls(**values)


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "str | None": (str, type(None)),
}
_TYPES = {field.name: _KINDS[str(field.type)] for field in dataclasses.fields(VisitRecord)}


class Ledger:
    """What the ranks of a run write down together: each notes its own visits, the first writes for all."""

    def __init__(self, run_dir: Path, plan: Plan, ranks: Ranks) -> None:
        self.path = run_dir / LEDGER_FILE
        self._plan, self._ranks = plan, ranks
        self._noted: list[VisitRecord] = []

    def note(self, step: int, items: Sequence[Item]) -> None:
        """Note the visits of this rank's part of a step."""
        rank, world_size = self._ranks.rank, self._ranks.world_size
        epoch = step // self._plan.steps_per_epoch + 1
        visits = self._plan.visits_of_rank(step, rank, world_size)
        self._noted += [
            VisitRecord.of(item, phase=TRAIN, step=step, epoch=epoch, rank=rank, share=visit.share)
            for item, visit in zip(items, visits, strict=True)
        ]

    def note_bad(self, step: int, items: Sequence[Item]) -> None:
        """Note what this rank could not read of the validation after a step."""
        epoch = step // self._plan.steps_per_epoch + 1
        self._noted += [
            VisitRecord.of(item, phase=VAL, step=step, epoch=epoch, rank=self._ranks.rank, share=0.0)
            for item in items
        ]

    def flush(self) -> None:
        """Write what was noted since the last time; all ranks together. StorageError if the disk refuses."""
        lines = collect_lines(self._ranks, (record.to_json() for record in self._noted))
        self._noted = []
        if self._ranks.rank or not lines:
            return
        # each rank's lines rise with the steps, and the sort is stable: the plan's order
        in_order = sorted(lines, key=_place)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.writelines(in_order)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"{self.path}: cannot write: {error.strerror or error}") from error


def _place(line: bytes) -> tuple[int, bool]:
    values = json.loads(line)
    return values["step"], values["phase"] == VAL


def keep_ledger(run_dir: Path, num_steps: int, *, epoch_is_open: bool = False) -> None:
    """Cut off all that belongs to steps after the first ``num_steps``, which will be done again.

    With ``epoch_is_open`` the validation after the last of them will be done again too. Only the end of the
    file is looked at. Raises StorageError if the disk refuses.
    """
    path = run_dir / LEDGER_FILE

    def stays(line: bytes) -> bool:
        try:
            record = VisitRecord.from_json(line)
        except ValueError:
            return False
        return record.step < num_steps - (epoch_is_open and record.phase == VAL)

    try:
        with path.open("r+b") as file:
            file.truncate(_end_of_kept(file, stays))
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"{path}: cannot write: {error.strerror or error}") from error


def _end_of_kept(file: Any, stays: Any) -> int:
    """Where the last line ends that stays; lines are looked at from the end of the file on."""
    end = file.seek(0, os.SEEK_END)
    tail = b""
    while end:
        begin = max(0, end - _BLOCK_BYTES)
        file.seek(begin)
        tail = file.read(end - begin) + tail
        lines = tail.splitlines(keepends=True)
        # the first line of a block may have begun before it
        first = lines.pop(0) if begin else b""
        at = begin + len(tail)
        for line in reversed(lines):
            if line.endswith(b"\n") and stays(line):
                return int(at)
            at -= len(line)
        end, tail = begin, first
    return 0


def read_ledger(run_dir: str | os.PathLike[str]) -> Iterator[VisitRecord]:
    """The records of a run folder, in the plan's order; a last line that is not whole is left out.

    Raises StorageError if the file cannot be read, InputError, with the line's number, for a damaged line.
    """
    path = Path(run_dir) / LEDGER_FILE
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield VisitRecord.from_json(line)
                except ValueError as error:
                    raise InputError(f"{path}:{number}: not the record of a visit: {error}") from error
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"{path}: cannot read: {error.strerror or error}") from error


def check_ledger(
    plan: Plan, records: Iterable[VisitRecord], *, num_steps: int | None = None
) -> tuple[str, ...]:
    """What is wrong with the ledger of a run, one line each; nothing if every visit was done exactly once.

    The training visits of the first ``num_steps`` steps (default: of all) must be there, each once, in the
    order of the steps, with the image, draws, version and share that the plan says; and a version must have
    had the same weights wherever it drew.
    """
    problems: list[str] = []
    keys: dict[int, str] = {}
    wanted = 0
    num_steps = plan.num_steps if num_steps is None else num_steps
    for step, group in groupby((r for r in records if r.phase == TRAIN), key=lambda record: record.step):
        if step < wanted:
            problems.append(f"step {step} comes again after step {wanted - 1}")
            continue
        if step >= num_steps:
            problems.append(f"step {step} is there, of a run of {num_steps} steps")
            continue
        problems += _absent(plan, wanted, step)
        wanted = step + 1
        done = list(group)
        problems += _differences(plan, step, done)
        for record in done:
            if keys.setdefault(record.version, record.attention_key) != record.attention_key:
                problems.append(f"step {step}: other weights of version {record.version} drew than before")
    return (*problems, *_absent(plan, wanted, num_steps))


def _absent(plan: Plan, begin: int, end: int) -> list[str]:
    return [f"step {step}: none of its {plan.batch_size} visits is there" for step in range(begin, end)]


def _differences(plan: Plan, step: int, done: Sequence[VisitRecord]) -> list[str]:
    planned = Counter((v.image, v.stream_id, v.version, v.share) for v in plan.visits(step))
    found = Counter((r.image, r.stream_id, r.version, r.share) for r in done)
    name = {r.image: f" ({r.slide})" for r in done}
    return [
        f"step {step}: the visit of image {facts[0]}{name.get(facts[0], '')} "
        f"(draws {facts[1]}, version {facts[2]}, share {facts[3]:g}) "
        f"was done {found[facts]} times instead of {planned[facts]}"
        for facts in planned | found
        if planned[facts] != found[facts]
    ]
