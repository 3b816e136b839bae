"""The ledger: what is written is what was done, cut at a checkpoint, and checked against the plan."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_job, run_config

from ats_stream.errors import InputError, StorageError
from ats_stream.workers import ledger as ledger_module
from ats_stream.workers.ledger import (
    LEDGER_FILE,
    VisitRecord,
    check_ledger,
    keep_ledger,
    read_ledger,
)
from ats_stream.workers.plan import Plan
from ats_stream.workers.ranks import Alone
from ats_stream.workers.trainer import train_rank

if TYPE_CHECKING:
    from pathlib import Path

    from ats_stream.io import Archive

PLAN = Plan(images=tuple(range(7)), batch_size=4, num_epochs=3, seed=1, lag=1)


def records_of(plan: Plan, world_size: int = 1) -> list[VisitRecord]:
    """What a run without accidents writes."""
    return [
        VisitRecord(
            phase="train",
            step=step,
            epoch=step // plan.steps_per_epoch + 1,
            rank=rank,
            image=visit.image,
            slide=f"{visit.image}.svs",
            stream_id=visit.stream_id,
            share=visit.share,
            version=visit.version,
            attention_key=f"{visit.version:016x}",
            num_drawn=4,
            seconds=0.5,
            stored_bytes=1,
            decoded_bytes=2,
            item_bytes=3,
            bad=None,
        )
        for step in range(plan.num_steps)
        for rank in range(world_size)
        for visit in plan.visits_of_rank(step, rank, world_size)
    ]


def write(run_dir: Path, records: list[VisitRecord]) -> None:
    (run_dir / LEDGER_FILE).write_text("".join(record.to_json() + "\n" for record in records))


# --- the pure check


@given(st.integers(1, 9), st.sampled_from([2, 4]), st.integers(0, 3), st.sampled_from([1, 2]))
def test_a_run_without_accidents_has_nothing_wrong(n: int, batch: int, lag: int, world_size: int) -> None:
    plan = Plan(images=tuple(range(n)), batch_size=batch, num_epochs=2, seed=0, lag=lag)
    assert check_ledger(plan, records_of(plan, world_size)) == ()


@given(st.data())
def test_any_change_is_found(data: st.DataObject) -> None:
    records = records_of(PLAN)
    at = data.draw(st.integers(0, len(records) - 1))
    kind = data.draw(st.sampled_from(["lost", "twice", "image", "version", "share", "key"]))
    record = records[at]
    if kind == "lost":
        del records[at]
    elif kind == "twice":
        records.insert(at, record)
    elif kind == "key":
        if sum(r.version == record.version for r in records) == 1:
            return
        records[at] = dataclasses.replace(record, attention_key="f" * 16)
    else:
        changed: Any = {kind: getattr(record, kind) + 1}
        records[at] = dataclasses.replace(record, **changed)
    found = check_ledger(PLAN, records)
    assert found
    # a key may come first with the wrong weights, and all others of its version then differ from it
    assert f"step {record.step}" in found[0] or kind == "key"


def test_each_kind_of_fault_is_told_in_a_line() -> None:
    records = records_of(PLAN)
    first = PLAN.visits(0)[0]
    told = (
        f"step 0: the visit of image {first.image} (draws {first.stream_id}, version 0, share 0.25) "
        "was done 0 times instead of 1"
    )
    assert check_ledger(PLAN, records[1:]) == (told,)
    assert check_ledger(PLAN, records[:-4]) == ("step 5: none of its 4 visits is there",)
    assert check_ledger(PLAN, records[:-4], num_steps=5) == ()
    assert check_ledger(PLAN, records, num_steps=5) == ("step 5 is there, of a run of 5 steps",)
    assert check_ledger(PLAN, records + records[:4]) == ("step 0 comes again after step 5",)
    assert len(check_ledger(PLAN, [])) == 6
    val = dataclasses.replace(records[0], phase="val", bad="torn")
    assert check_ledger(PLAN, [*records[:8], val, *records[8:]]) == ()


# --- the file


def test_records_survive_the_file(tmp_path: Path) -> None:
    records = [
        dataclasses.replace(r, bad='a "torn"\nline' if r.step == 2 else None) for r in records_of(PLAN)
    ]
    write(tmp_path, records)
    assert list(read_ledger(tmp_path)) == records
    with (tmp_path / LEDGER_FILE).open("a") as file:
        file.write(records[0].to_json()[:40])
    assert list(read_ledger(tmp_path)) == records
    assert list(read_ledger(tmp_path / "nothing")) == []


@pytest.mark.parametrize(
    "line",
    ["[]", "{", '{"step": 1}', "\u00e9", json.dumps({**records_of(PLAN)[0].__dict__, "step": True})],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / LEDGER_FILE).write_text(
        records_of(PLAN)[0].to_json() + "\n" + line + "\n", encoding="latin-1"
    )
    with pytest.raises(InputError, match=r"ledger\.jsonl:2: not the record of a visit"):
        list(read_ledger(tmp_path))


@given(st.integers(0, 7), st.integers(1, 2000), st.booleans(), st.binary(max_size=9))
def test_a_ledger_is_cut_where_a_checkpoint_stands(
    tmp_path_factory: pytest.TempPathFactory, num_steps: int, block: int, is_open: bool, torn: bytes
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    records = records_of(PLAN)
    val = [dataclasses.replace(r, phase="val", bad="torn") for r in records if r.step == 1]
    records = [r for r in records if r.step < 2] + val + [r for r in records if r.step >= 2]
    write(folder, records)
    with (folder / LEDGER_FILE).open("ab") as file:
        file.write(torn.replace(b"\n", b""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_module, "_BLOCK_BYTES", block)
        keep_ledger(folder, num_steps, epoch_is_open=is_open)
    assert list(read_ledger(folder)) == [
        r for r in records if r.step < num_steps - (is_open and r.phase == "val")
    ]


def test_a_folder_in_its_place_is_named(tmp_path: Path) -> None:
    (tmp_path / LEDGER_FILE).mkdir()
    with pytest.raises(StorageError, match=r"ledger\.jsonl: cannot write"):
        keep_ledger(tmp_path, 0)
    with pytest.raises(StorageError, match=r"ledger\.jsonl: cannot read"):
        list(read_ledger(tmp_path))


# --- as training writes it


class Copier(Alone):
    """Keeps a copy of the run folder as each checkpoint leaves it."""

    def __init__(self, run_dir: Path, copies: Path) -> None:
        super().__init__()
        self.run_dir, self.copies = run_dir, copies

    def report(self, numbers: dict[str, float]) -> None:
        shutil.copytree(self.run_dir, self.copies / str(int(numbers["step"])))


def test_training_writes_each_visit_before_the_checkpoint_that_counts_it(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ats_stream.workers.trainer.FLUSH_STEPS", 1)
    config = run_config(num_epochs=3, checkpoint_interval=4, lag=1)
    job = make_job(archive, tmp_path / "run", config)
    train_rank(job, Copier(tmp_path / "run", tmp_path / "copies"))
    whole = list(read_ledger(tmp_path / "run"))
    assert check_ledger(job.plan, whole) == ()
    assert [r.epoch for r in whole] == [1] * 8 + [2] * 8 + [3] * 8
    assert {r.slide for r in whole} <= set(job.slides)
    assert all(min(r.item_bytes, r.stored_bytes, r.decoded_bytes) > 0 for r in whole)
    assert all(r.seconds > 0 and r.num_drawn == 4 for r in whole)
    for copy in sorted((tmp_path / "copies").iterdir()):
        assert check_ledger(job.plan, read_ledger(copy), num_steps=int(copy.name)) == ()

    # taken up from a checkpoint after a kill: what came after it is cut off, and done again
    copy = tmp_path / "copies" / "4"
    shutil.copy(tmp_path / "run" / LEDGER_FILE, copy)
    train_rank(dataclasses.replace(job, run_dir=str(copy)), Alone())
    again = list(read_ledger(copy))
    assert [dataclasses.replace(r, seconds=0) for r in again] == [
        dataclasses.replace(r, seconds=0) for r in whole
    ]
