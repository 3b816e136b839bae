"""What a benchmark ran on, for its stored result, and what a process has used."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def peak_bytes(pid: int | None = None) -> int:
    """Largest resident memory of a process, by default this one; unlike ru_maxrss never that of its parent.

    0 for a process that is gone.
    """
    try:
        lines = Path(f"/proc/{pid or 'self'}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


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


def print_contestants(
    contestants: Sequence[dict[str, Any]], heads: dict[str, str], *, name_width: int, width: int
) -> None:
    """A line for each engine of a case; ``heads`` maps the numbers that are shown to their headings."""
    print(f"{'':{name_width}}" + "".join(f"{head:>{width}}" for head in heads.values()))
    for one in contestants:
        if "not_available" in one:
            print(f"{one['name']:{name_width}}  not available: {one['not_available'][:160]}")
        else:
            numbers = "".join(f"{one.get(head, '-'):>{width}}" for head in heads)
            print(f"{one['name']:{name_width}}" + numbers, flush=True)


def store_result(result: dict[str, Any], out: Path) -> int:
    """Write a result as JSON; the exit code, which is 1 when engines gave different pixels."""
    out.write_text(json.dumps(result, indent=1) + "\n")
    if result["pixels_differ"]:
        print(f"pixels differ: {', '.join(result['pixels_differ'])}", file=sys.stderr)
        return 1
    return 0


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
