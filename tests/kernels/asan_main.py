"""Runs kernel launches on exactly sized memory; started under AddressSanitizer by the tests of memory.

Reads JSON from standard input: {"library", "expressions", "launches": [{"expression", "grid", "block",
"buffers": [{"size": bytes, "data": base64 or null}], "args": [[type, value]]}]}. An argument of type "buffer"
is the address of [number, first byte] or null; others are numpy scalars. Prints how many launches ran; the
first fault ends the process.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from cuda_on_cpu import CpuModule


def main() -> None:
    job = json.load(sys.stdin)
    module = CpuModule(Path(job["library"]), job["expressions"])
    for launch in job["launches"]:
        buffers = [memory(**buffer) for buffer in launch["buffers"]]
        args = [argument(kind, value, buffers) for kind, value in launch["args"]]
        module.launch(launch["expression"], tuple(launch["grid"]), tuple(launch["block"]), args)
    print(len(job["launches"]))


def memory(*, size: int, data: str | None) -> np.ndarray[Any, Any]:
    buffer = np.ones(size, np.uint8)
    if data is not None:
        buffer[:] = np.frombuffer(base64.b64decode(data), np.uint8)[:size]
    return buffer


def argument(kind: str, value: Any, buffers: list[np.ndarray[Any, Any]]) -> np.generic:
    if kind != "buffer":
        return np.dtype(kind).type(value)
    if value is None:
        return np.uint64(0)
    number, start = value
    return np.uint64(buffers[number].ctypes.data + start)


if __name__ == "__main__":
    main()
