"""The records of a run: kept, followed, dropped when they will be made again, shown by TensorBoard."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from ats_stream.errors import StorageError
from ats_stream.workers.metrics import (
    METRICS_FILE,
    PROGRESS_FILE,
    TENSORBOARD_FOLDER,
    MetricsFollower,
    MetricsLog,
    read_metrics,
    read_progress,
)
from ats_stream.workers.progress import Progress

if TYPE_CHECKING:
    from pathlib import Path


def write(run_dir: Path, steps: list[int], *, resumed_step: int, loss: float = 1.0) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    log = MetricsLog(run_dir, resumed_step=resumed_step, on_record=seen.append)
    for step in steps:
        log.write("train", step, {"loss": loss + step, "accuracy": 0.5})
        log.write("val", step, {"loss": loss})
    log.close()
    return seen


def test_records_are_lines_of_json_and_reach_the_listener(tmp_path: Path) -> None:
    seen = write(tmp_path, [2, 4], resumed_step=0)
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == seen == read_metrics(tmp_path)
    assert seen[0] == {"phase": "train", "step": 2, "loss": 3.0, "accuracy": 0.5}
    assert [(r["phase"], r["step"]) for r in seen] == [("train", 2), ("val", 2), ("train", 4), ("val", 4)]


def test_records_that_a_resumed_run_makes_again_are_dropped(tmp_path: Path) -> None:
    write(tmp_path, [2, 4, 6], resumed_step=0)
    write(tmp_path, [4], resumed_step=3, loss=50.0)
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(2, 3), (2, 1), (4, 54), (4, 50)]


def test_a_half_line_or_a_broken_one_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, [2], resumed_step=0)
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(
            b'\xff\xfe\n[1]\n{"phase": "train"}\n{"step": "2"}\n{"phase": "val", "step": 9}\n{"phase": "tra'
        )
    assert [r["step"] for r in read_metrics(tmp_path)] == [2, 2, 9]
    write(tmp_path, [4], resumed_step=2)  # a run that goes on cleans up
    assert [r["step"] for r in read_metrics(tmp_path)] == [2, 2, 4, 4]
    assert all(json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines())


def test_no_file_holds_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    assert MetricsFollower(tmp_path).new_records() == []


def test_a_follower_gives_each_record_once_even_when_the_file_is_rewritten(tmp_path: Path) -> None:
    write(tmp_path, [2], resumed_step=0)
    follower = MetricsFollower(tmp_path)  # what is there belongs to the past
    assert follower.new_records() == []
    write(tmp_path, [4, 6], resumed_step=2)
    assert [(r["phase"], r["step"]) for r in follower.new_records()] == [
        ("train", 4), ("val", 4), ("train", 6), ("val", 6),
    ]  # fmt: skip
    # ranks died and went back: the file becomes shorter, then grows past where it was
    write(tmp_path, [4, 6, 8], resumed_step=2, loss=1e-9)
    assert [(r["phase"], r["step"]) for r in follower.new_records()] == [("train", 8), ("val", 8)]
    assert follower.new_records() == []


def test_a_follower_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    follower = MetricsFollower(tmp_path)
    with (tmp_path / METRICS_FILE).open("w") as file:
        for part, found in (('{"phase": "val", ', 0), ('"step": 3}', 0), ("\n", 1)):
            file.write(part)
            file.flush()
            assert len(follower.new_records()) == found


def test_tensorboard_shows_the_same_numbers_and_forgets_what_was_made_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, [2, 4, 6], resumed_step=0)
    write(tmp_path, [4], resumed_step=3, loss=50.0)
    board = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER)).Reload()
    assert set(board.Tags()["scalars"]) == {"train/loss", "train/accuracy", "val/loss"}
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(2, 3.0), (4, 54.0)]


@pytest.mark.parametrize("name", [METRICS_FILE, TENSORBOARD_FOLDER])
def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path, name: str) -> None:
    if name == METRICS_FILE:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(b"a file")
    with pytest.raises(StorageError, match=str(tmp_path)):
        MetricsLog(tmp_path, resumed_step=0)


def progress(step: int) -> Progress:
    return Progress(
        step=step,
        num_steps=9,
        images_per_s=2.5,
        wait_share=0.1,
        staleness=1.0,
        effective_share=0.9,
        eta_s=3.0,
    )


def test_progress_goes_to_the_listener_or_into_a_file_while_the_run_goes_on(tmp_path: Path) -> None:
    seen: list[Progress] = []
    log = MetricsLog(tmp_path, resumed_step=0, on_step=seen.append)
    log.progress(progress(1))
    log.progress(progress(2))
    assert (seen, read_progress(tmp_path)) == ([progress(1), progress(2)], None)
    log.close()
    log = MetricsLog(tmp_path, resumed_step=0)
    assert read_progress(tmp_path) is None
    log.progress(progress(3))
    assert read_progress(tmp_path) == progress(3)
    log.close()
    assert read_progress(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"[3, 9]", b'{"step": 3}', b"7"])
def test_progress_that_cannot_be_understood_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / PROGRESS_FILE).write_bytes(content)
    assert read_progress(tmp_path) is None
