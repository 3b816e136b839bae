"""Runs kernel launches on exactly sized memory; started under AddressSanitizer by test_gather_kernel.py.

Reads JSON from standard input: {"library", "expressions", "launches": [{"expression", "grid", "block",
"buffers": [[bytes, first byte used]], "args": [int64]}]}. Prints how many launches ran; the first fault ends
the process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from cuda_on_cpu import CpuModule


def main() -> None:
    job = json.load(sys.stdin)
    module = CpuModule(Path(job["library"]), job["expressions"])
    for launch in job["launches"]:
        buffers = [np.ones(size, np.uint8) for size, _ in launch["buffers"]]
        starts = [start for _, start in launch["buffers"]]
        addresses = (
            np.uint64(buffer.ctypes.data + start) for buffer, start in zip(buffers, starts, strict=True)
        )
        sizes = (np.int64(value) for value in launch["args"])
        module.launch(
            launch["expression"], tuple(launch["grid"]), tuple(launch["block"]), (*addresses, *sizes)
        )
    print(len(job["launches"]))


if __name__ == "__main__":
    main()
