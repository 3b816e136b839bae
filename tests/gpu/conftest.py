"""Tests that need a CUDA device and CuPy, skipped without; run.py beside runs them without pytest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ats_stream.kernels.launch import has_cupy

# the cases and references of the kernels' own tests
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "kernels")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() and has_cupy():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and CuPy"))
