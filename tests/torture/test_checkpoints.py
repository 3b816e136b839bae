"""Damaged checkpoints are refused, or load as what was saved; none makes the process do anything.

A checkpoint is a zip file, whose members carry a CRC-32; only damage to the bytes between them goes unseen.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from ats_stream.errors import CheckpointError
from ats_stream.workers.checkpoint import FIELDS, load_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NUM_CASES = 50
NUM_TORTURE_CASES = 2000
CASE_S = 20.0
RESIDENT_BYTES = 48 << 20  # 48 MiB
# what code in a file would do: start programs, speak to others, change files, reach into the process
SUSPICIOUS = (
    "os.system", "os.exec", "os.fork", "os.spawn", "os.posix_spawn", "os.putenv", "os.remove", "os.rename",
    "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink", "os.truncate", "os.kill", "shutil.",
    "subprocess.", "socket.", "ctypes.", "urllib.", "code.__new__", "compile", "webbrowser.",
)  # fmt: skip


class Watch:
    """An audit hook, which cannot be taken away again: it listens only while ``events`` is a list."""

    def __init__(self) -> None:
        self.events: list[str] | None = None
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.events is None:
            return
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if writes or event.startswith(SUSPICIOUS):
            self.events.append(f"{event} {arguments}")

    @contextmanager
    def listen(self) -> Iterator[list[str]]:
        self.events = events = []
        try:
            yield events
        finally:
            self.events = None


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A checkpoint as training writes it, of a model of 8 numbers."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimiser.step()
    state = {
        **{name: kind() for name, kind in FIELDS.items()},
        "config": {"name": "x", "sizes": [1, 2.5, None, True]},
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "totals": {"count": 3, "loss": 0.5},
    }
    return save_checkpoint(tmp_path, 5, state)


def test_the_watch_hears_what_code_would_do(tmp_path: Path, watch: Watch) -> None:
    with watch.listen() as events:
        (tmp_path / "a").write_text("x")
        (tmp_path / "a").unlink()
        (tmp_path / "b").mkdir()
    assert [event.split()[0] for event in events] == ["open", "os.remove", "os.mkdir"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_cases", [NUM_CASES, pytest.param(NUM_TORTURE_CASES, marks=pytest.mark.torture)])
def test_damage_anywhere_is_an_error_or_without_effect(
    whole: Path, tmp_path: Path, watch: Watch, damaged: Any, cpu_limit: Any, watch_memory: Any, num_cases: int
) -> None:
    data, path = whole.read_bytes(), tmp_path / "damaged.pt"
    saved = str(load_checkpoint(whole))  # also loads and starts what is no case's doing
    memory = watch_memory()
    num_refused = 0
    for case in range(num_cases):
        kind, place, broken = damaged(data, np.random.default_rng(case))
        path.write_bytes(broken)
        loaded, message = None, ""
        try:
            with cpu_limit(CASE_S), watch.listen() as events:
                loaded = load_checkpoint(path)
        except CheckpointError as error:
            message = str(error)
        except BaseException as error:
            error.add_note(f"case {case}: {kind} at byte {place}")
            raise
        if loaded is None:
            num_refused += 1
            assert message.startswith(f"{path}: ")
            assert "\n" not in message
        else:
            assert str(loaded) == saved
        assert events == []
        assert memory.peak_bytes() < RESIDENT_BYTES
    assert 0 < num_refused < num_cases
