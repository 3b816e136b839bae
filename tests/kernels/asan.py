"""Planned launches as data for asan_main.py, each tensor in memory of exactly its size."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cuda_on_cpu
import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ats_stream.kernels.launch import Launch


def launch_as_data(
    launch: Launch, tensors: Mapping[str, torch.Tensor | None], missing_bytes: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Describe a launch on ``tensors``; of those in ``missing_bytes`` the last bytes are left out.

    Memory before the first element of a tensor, down to a multiple of 16 bytes, belongs to it, as what a
    tensor begins with may be part of something larger.
    """
    buffers: list[dict[str, Any]] = []
    places: dict[int, list[int]] = {}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        start = tensor.data_ptr() % 16
        data = b"\1" * start + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        size = len(data) - (missing_bytes or {}).get(name, 0)
        places[tensor.data_ptr()] = [len(buffers), start]
        buffers.append({"size": size, "data": base64.b64encode(data).decode()})
    args: list[list[Any]] = []
    for value in launch.args:
        if value.dtype == np.uint64:
            args.append(["buffer", places[int(value)] if value else None])
        else:
            args.append([value.dtype.name, value.item()])
    return {
        "expression": launch.expression,
        "grid": launch.grid,
        "block": launch.block,
        "buffers": buffers,
        "args": args,
    }


def run(library: Path, expressions: Sequence[str], launches: list[Any]) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "LD_PRELOAD": cuda_on_cpu.asan_runtime(),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter leaves memory to the system at its end
    }
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("asan_main.py"))],
        input=json.dumps({"library": str(library), "expressions": list(expressions), "launches": launches}),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
