"""Folders that are written to, and how much fits there."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from ats_stream.doctor.finding import Finding, State

_GIB = 1 << 30
MIN_FREE_BYTES = 5 * _GIB
"""Free bytes under which a run or a conversion soon has no place; a note, not an error."""
MIN_SHARED_BYTES = 2 * _GIB
"""Shared memory under which Ray keeps its objects on disk, many times slower."""


def caches(environ: dict[str, str], home: Path, package: Path, *, has_cupy: bool) -> list[Finding]:
    """Whether compiled code can be kept, by numba and by CuPy, in the folders that they would take."""
    numba = environ.get("NUMBA_CACHE_DIR")
    # numba writes beside the source, or, where it may not, under the user's cache
    places = [Path(numba)] if numba else [package / "__pycache__", home / ".cache" / "numba"]
    found = [_cache("cache of numba", places, "NUMBA_CACHE_DIR")]
    if has_cupy:
        cupy = Path(environ.get("CUPY_CACHE_DIR", home / ".cupy" / "kernel_cache"))
        found.append(_cache("cache of CuPy", [cupy], "CUPY_CACHE_DIR"))
    return found


def _cache(subject: str, places: list[Path], variable: str) -> Finding:
    for place in places:
        if is_writable(place):
            return Finding(State.OK, subject, f"{place} can be written")
    said = f"{places[-1]} cannot be written: code is compiled anew in every process"
    return Finding(State.NOTE, subject, said, f"export {variable}=a folder that can be written")


def is_writable(folder: Path) -> bool:
    """Whether a file can be made in a folder, or in the folder that it would be made in.

    >>> is_writable(Path(tempfile.gettempdir()) / "not" / "there" / "yet"), is_writable(Path("/proc/1/none"))
    (True, False)
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def space(folders: dict[str, Path]) -> list[Finding]:
    """How much is free where something will be written; ``folders`` by what they are for."""
    found = []
    for purpose, folder in folders.items():
        try:
            free = shutil.disk_usage(folder).free
        except OSError as error:
            found.append(Finding(State.NOTE, purpose, f"{folder}: {error.strerror}"))
            continue
        said = f"{free / _GIB:.1f} GiB free in {folder}"
        if not is_writable(folder):
            found.append(
                Finding(State.NOTE, purpose, f"{folder} cannot be written", "work in another folder")
            )
        elif free < MIN_FREE_BYTES:
            found.append(Finding(State.NOTE, purpose, said, "make room, or work on another disk"))
        else:
            found.append(Finding(State.OK, purpose, said))
    return found


def shared_memory(folder: Path = Path("/dev/shm")) -> list[Finding]:  # noqa: S108  Linux's place of it
    """Whether Ray's object store fits into shared memory; nothing where the system has none."""
    if not folder.is_dir():
        return []
    usage = shutil.disk_usage(folder)
    said = f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free in {folder}"
    if usage.free < MIN_SHARED_BYTES:
        advice = (
            "in a container: --shm-size=8g, or an emptyDir of medium Memory; else Ray keeps objects on disk"
        )
        return [Finding(State.NOTE, "shared memory", said, advice)]
    return [Finding(State.OK, "shared memory", said)]


def credentials(environ: dict[str, str]) -> list[str]:
    """Names, never values, of the variables by which object stores would be opened."""
    known = (
        "AWS_ACCESS_KEY_ID",
        "AWS_PROFILE",
        "AWS_ENDPOINT_URL",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "AZURE_STORAGE_ACCOUNT_NAME",
        "AZURE_STORAGE_ACCOUNT_KEY",
    )
    return [name for name in known if environ.get(name)]


def folders_of_work(environ: dict[str, str]) -> dict[str, Path]:
    """The folders whose space is looked at: where commands are run, and where Ray writes."""
    found = {"working folder": Path.cwd(), "temporary folder": Path(tempfile.gettempdir())}
    if environ.get("RAY_TMPDIR"):
        found["folder of Ray"] = Path(os.path.expanduser(environ["RAY_TMPDIR"]))  # noqa: PTH111  a variable
    return found
