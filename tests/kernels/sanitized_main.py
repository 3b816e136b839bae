"""Runs kernel launches in a process of its own under a sanitizer; started by test_sample_sanitized.py.

Reads JSON from standard input: {"library", "expressions", "skipped_barrier", "orders", "buffers": [[bytes or
file of content]], "launches": [{"expression", "grid", "block", "args": [["buffer", number] or [dtype,
value]]}]}. Every buffer is memory of its own, of exactly its size. The launches are run once for each order
of the threads; prints the hash of all buffers after each. Needs numpy alone.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from cuda_on_cpu import CpuModule


def main() -> None:
    job = json.load(sys.stdin)
    module = CpuModule(Path(job["library"]), job["expressions"])
    for order in job["orders"]:
        module.configure(thread_order=order, skipped_barrier=job["skipped_barrier"])
        buffers = [
            np.fromfile(one, np.uint8) if isinstance(one, str) else np.zeros(one, np.uint8)
            for one in job["buffers"]
        ]

        def value(kind: str, number: int, buffers: list[np.ndarray] = buffers) -> np.generic:
            if kind == "buffer":
                return np.uint64(buffers[number].ctypes.data)
            return np.dtype(kind).type(number)

        for launch in job["launches"]:
            args = [value(*one) for one in launch["args"]]
            module.launch(launch["expression"], tuple(launch["grid"]), tuple(launch["block"]), args)
        print(hashlib.sha256(b"".join(one.tobytes() for one in buffers)).hexdigest())


if __name__ == "__main__":
    main()
