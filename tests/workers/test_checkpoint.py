"""Checkpoints are whole or absent, refuse what is none, and never run what is in them."""

from __future__ import annotations

import os
import pickle
import resource
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ats_stream.errors import CheckpointError, StorageError
from ats_stream.workers.checkpoint import (
    FIELDS,
    FORMAT,
    NUM_KEPT,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path


def state(value: float = 0.0) -> dict[str, Any]:
    return {**{name: kind() for name, kind in FIELDS.items()}, "model": {"w": torch.full((300,), value)}}


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 7, state(1.5))
    assert path == find_checkpoint(tmp_path) == find_checkpoint(path) == latest_checkpoint(tmp_path)
    loaded = load_checkpoint(path)
    assert loaded["step"] == 7
    assert torch.equal(loaded.pop("model")["w"], torch.full((300,), 1.5))
    assert loaded == {**{k: v for k, v in state().items() if k != "model"}, "format": FORMAT, "step": 7}


def test_the_newest_few_are_kept_in_order_of_steps(tmp_path: Path) -> None:
    steps = [9, 10, 99_999_999, 100_000_000]  # the last one has a digit more
    for step in steps:
        save_checkpoint(tmp_path, step, state())
    assert names(tmp_path) == ["step-100000000.pt", "step-99999999.pt"]
    assert len(names(tmp_path)) == NUM_KEPT
    assert find_checkpoint(tmp_path).name == "step-100000000.pt"


def test_half_files_of_killed_processes_are_no_checkpoints_and_go_away(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, state())
    (tmp_path / "checkpoints" / ".step-00000002.pt.abc").write_bytes(b"half")
    (tmp_path / "checkpoints" / "notes.txt").write_bytes(b"mine")
    assert find_checkpoint(tmp_path).name == "step-00000001.pt"
    save_checkpoint(tmp_path, 3, state())
    assert names(tmp_path) == ["notes.txt", "step-00000001.pt", "step-00000003.pt"]


@pytest.fixture
def small_files() -> Iterator[AbstractContextManager[None]]:
    """While entered, the system refuses files of more than a few bytes, as a full disk would."""

    class Limit:
        def __enter__(self) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))

        def __exit__(self, *_: object) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield Limit()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_that_leaves_the_checkpoint_before(
    tmp_path: Path, small_files: AbstractContextManager[None]
) -> None:
    save_checkpoint(tmp_path, 1, state(1.0))
    with small_files, pytest.raises(StorageError, match=r"step-00000002\.pt: cannot be written"):
        save_checkpoint(tmp_path, 2, state(2.0))
    assert names(tmp_path) == ["step-00000001.pt"]
    assert torch.equal(load_checkpoint(find_checkpoint(tmp_path))["model"]["w"], torch.ones(300))
    save_checkpoint(tmp_path, 2, state(2.0))
    assert load_checkpoint(find_checkpoint(tmp_path))["step"] == 2


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_bytes(b"a file")
    with pytest.raises(StorageError, match=r"checkpoints/step-00000001\.pt: cannot be written"):
        save_checkpoint(tmp_path, 1, state())


def test_truncated_anywhere_is_refused_in_one_line(tmp_path: Path) -> None:
    whole = save_checkpoint(tmp_path, 1, state()).read_bytes()
    broken = tmp_path / "broken.pt"
    for size in range(0, len(whole) - 1, 97):
        broken.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"broken\.pt: not a checkpoint, or damaged: .") as caught:
            load_checkpoint(broken)
        assert "\n" not in str(caught.value)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, container: str) -> None:
    path, crater = tmp_path / "bomb.pt", tmp_path / "crater"
    content = {"format": FORMAT, "step": 1, **state(), "config": Bomb(crater)}
    if container == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"bomb\.pt: not a checkpoint, or damaged"):
        load_checkpoint(path)
    assert not crater.exists()
    torch.load(path, weights_only=False) if container == "torch" else pickle.loads(path.read_bytes())
    assert crater.exists()  # the bomb was live


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "checkpoint format 'list', expected 3"),
        ({"w": torch.ones(2)}, "checkpoint format None, expected 3"),
        ({"format": 1, "step": 0}, "checkpoint format 1, expected 3"),
        ({"format": FORMAT}, "not a whole checkpoint: no step in it"),
        (
            {"format": FORMAT, "step": 0, **state(), "versions": 3},
            "not a whole checkpoint: no versions in it",
        ),
    ],
)
def test_files_of_something_else_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "other.pt")


def test_absent_checkpoints_are_named(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*/checkpoints"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such checkpoint or run folder"):
        find_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
