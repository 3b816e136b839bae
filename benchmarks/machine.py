"""What a benchmark ran on, for its stored result, and what a process has used."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES = ("ats-stream", "numpy", "ray", "torch", "zarr")


def describe_machine() -> dict[str, object]:
    """Processor, cores, memory, system, versions, date."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def describe_device(kind: str) -> dict[str, object]:
    """Processor and cores, and, for "cuda", the device; needs torch alone."""
    found: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }
    if kind == "cuda":
        import torch

        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Versions of packages, None for those that are not installed."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def peak_bytes() -> int:
    """Largest resident memory of this process; unlike ru_maxrss never that of the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def mib(num_bytes: float) -> float:
    return round(num_bytes / 2**20, 1)


def files_of(place: Path) -> list[Path]:
    """All files of a folder, or the file itself."""
    return [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]


def warm(place: Path) -> None:
    """Read files into the page cache."""
    for file in files_of(place):
        with file.open("rb") as opened:
            while opened.read(16 << 20):
                pass


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
