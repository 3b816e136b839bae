"""Checkpoints: one file each, whole or absent, loaded without running any code from it."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ats_stream.errors import CheckpointError, StorageError
from ats_stream.files import write_atomic
from ats_stream.models.weights import read_torch_file

if TYPE_CHECKING:
    import os

FORMAT = 3
FOLDER = "checkpoints"
NUM_KEPT = 2
FIELDS: dict[str, type] = {
    "config": dict,
    "archive": str,
    "model": dict,
    "average": dict,
    "optimiser": dict,
    "best": dict,
    "bad_images": list,
    "versions": dict,
    "totals": dict,
}
"""What a checkpoint holds besides its format and step."""
BEST = "best.pt"
_NAME = re.compile(r"step-(\d{8,})\.pt")


def save_checkpoint(run_dir: Path, step: int, state: dict[str, Any], *, is_best: bool = False) -> Path:
    """Write the state (FIELDS) after ``step`` steps and forget all but the newest few.

    The best so far is written once more, as ``best.pt``, which stays until a better one comes.

    A killed process leaves no half file under the name. Raises StorageError if the system refuses.
    """
    folder = run_dir / FOLDER
    # made whole in memory: torch.save hides what the system says of a full disk
    whole = io.BytesIO()
    torch.save({"format": FORMAT, "step": step, **state}, whole)
    # the best first: a kill between the two leaves a run that will validate this step again
    if is_best:
        write_atomic(folder / BEST, whole.getvalue())
    target = write_atomic(folder / f"step-{step:08d}.pt", whole.getvalue())
    try:
        leftovers = folder.glob(
            ".step-*"
        )  # of processes killed while they wrote; one process writes at a time
        for old in [*leftovers, *_whole(folder)[:-NUM_KEPT]]:
            old.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot remove old checkpoints: {error}") from error
    return target


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run folder, None if there is none."""
    found = _whole(run_dir / FOLDER)
    return found[-1] if found else None


def latest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    newest = latest_checkpoint(run_dir)
    return 0 if newest is None else _step_of(newest)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; CheckpointError if it is absent, damaged or of another format."""
    state = read_torch_file(path, legacy=False)
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if not isinstance(state, dict) or type(found) is not int or found != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {found!r}, expected {FORMAT}")
    for name, kind in {"step": int, **FIELDS}.items():
        if not isinstance(state.get(name), kind):
            raise CheckpointError(f"{path}: not a whole checkpoint: no {name} in it")
    return state


def find_checkpoint(place: str | os.PathLike[str]) -> Path:
    """A checkpoint given as a file or as a run folder (then its newest); CheckpointError if there is none."""
    path = Path(place)
    if path.is_dir():
        newest = latest_checkpoint(path)
        if newest is None:
            raise CheckpointError(f"{path}: no checkpoint in {path / FOLDER}")
        return newest
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint or run folder")
    return path


def _whole(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = {path: _NAME.fullmatch(path.name) for path in folder.iterdir()}
    return sorted((path for path, name in found.items() if name), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
