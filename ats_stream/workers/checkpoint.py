"""Checkpoints: one file each, whole or absent, loaded without running any code from it."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from ats_stream.errors import CheckpointError, StorageError

FORMAT = 1
FOLDER = "checkpoints"
NUM_KEPT = 2
_NAME = re.compile(r"step-(\d{8})\.pt")


def save_checkpoint(run_dir: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the state after ``step`` steps and forget all but the newest few.

    The file is written beside its place, synchronised and renamed: durable when this returns, and a killed
    process leaves no half file under the name. Raises StorageError if the system refuses.
    """
    folder = run_dir / FOLDER
    target = folder / f"step-{step:08d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".partial", delete=False) as file:
            try:
                torch.save({"format": FORMAT, "step": step, **state}, file)
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(target)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        for old in _whole(folder)[:-NUM_KEPT]:
            old.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch.save wraps a full disk into a RuntimeError
        raise StorageError(f"{target}: cannot write the checkpoint: {error}") from error
    return target


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run folder, None if there is none."""
    found = _whole(run_dir / FOLDER)
    return found[-1] if found else None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; CheckpointError if it is absent, damaged or of another format."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, down to those of zip and pickle
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a checkpoint, or damaged: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path}: checkpoint format {found!r}, expected {FORMAT}")
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
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
