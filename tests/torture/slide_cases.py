"""Damaged slides, TIFF files, pictures and videos, read in a process of its own, which a crash ends alone.

Run as a script with the folder of whole files, the first case and the last one; each case is announced before
it is run, so that the one that hangs or crashes is known. A case must end in pixels of the stated shape or
in one line that names the file.
"""

from __future__ import annotations

import faulthandler
import math
import resource
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

CASE_S = 60
# a level larger than this is read in patches alone
WHOLE_BYTES = 1 << 22


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip bits, write noise or zeros over a run, cut, or repeat a piece; mostly in the head or the tail."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        length = len(changed)
        region = [(0, min(length, 512)), (max(0, length - 512), length), (0, length)][rng.integers(3)]
        at = int(rng.integers(region[0], max(region[0] + 1, region[1])))
        run = int(rng.integers(1, 9))
        kind = rng.integers(6)
        if kind == 0:
            del changed[at:]
        elif kind == 1:
            changed[at : at + run] = rng.bytes(run)
        elif kind == 2:
            changed[at : at + run] = bytes([int(rng.choice([0, 255]))]) * run
        elif kind == 3:
            changed[at:at] = changed[at : at + 64]
        elif length:
            at = min(at, length - 1)
            changed[at] ^= 1 << int(rng.integers(8))
        if not changed:
            break
    return bytes(changed)


def attempt(path: Path, action: Any, *arguments: Any) -> Any:
    """The result, or None for an error as it should be."""
    from ats_stream.errors import InputError

    try:
        return action(*arguments)
    except InputError as error:
        refusal = str(error)
    assert refusal.startswith(str(path)), refusal
    assert "\n" not in refusal, refusal
    return None


def read_all(path: Path) -> bool:
    """Read a file in every way; whether it could be opened."""
    from ats_stream.io import open_pyramid

    pyramid = attempt(path, open_pyramid, path)
    if pyramid is None:
        return False
    assert len(repr(pyramid)) < 2000
    for level in pyramid.levels:
        size = (*(1 for _ in level.shape[1:-2]), 16, 16)
        offsets = [[0] * len(size), [n // 2 for n in level.shape[1:]], [n - 3 for n in level.shape[1:]]]
        patches = attempt(path, pyramid.read_patches, level, offsets, size)
        assert patches is None or patches.shape == (3, level.shape[0], *size)
        if math.prod(level.shape) * level.dtype.itemsize <= WHOLE_BYTES:
            whole = attempt(path, pyramid.read, level)
            assert whole is None or (whole.shape, whole.dtype) == (level.shape, level.dtype)
    for name in pyramid.associated_names:
        picture = attempt(path, pyramid.associated, name)
        assert picture is None or picture.ndim == 3
    return True


def main(folder: Path, first: int, last: int) -> None:
    """Run the cases; print what came of them."""
    import logging

    logging.disable(logging.CRITICAL)  # tifffile tells of every odd tag
    warnings.simplefilter("ignore")
    faulthandler.enable()
    files = sorted(p for p in folder.iterdir() if p.is_file())
    opened = 0
    for file in files:  # what is loaded and started once is no case's memory
        assert read_all(file), file
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(first, last):
        file = files[case % len(files)]
        print(f"case {case} {file.name}", flush=True)
        faulthandler.dump_traceback_later(CASE_S, exit=True)
        rng = np.random.default_rng(case)
        path = folder / "damaged" / f"{case}{file.suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(damage(file.read_bytes(), rng))
        opened += read_all(path)
        path.unlink()
        faulthandler.cancel_dump_traceback_later()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{opened} of {last - first} damaged files could be opened, {grown // 1024} MiB more", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
