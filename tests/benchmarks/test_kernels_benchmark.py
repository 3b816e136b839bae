"""The benchmark of the kernels runs, and what it compares computes the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import kernels_gather
import kernels_gather_cpu
import numpy as np
import pytest
import torch

from ats_stream.kernels import ChunkTable, gather_crops, normalisation

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def instrument() -> ModuleType:
    """cuda_on_cpu of the kernels' tests."""
    path = ROOT / "tests" / "kernels" / "cuda_on_cpu.py"
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_case_is_measured_with_its_floor() -> None:
    cases = kernels_gather_cpu.measure(quick=True)
    assert [case["case"].split("-> ")[1] for case in cases] == ["float32", "bfloat16", "float16"]
    for case in cases:
        fresh = ("slices", "patches", "stacked", "crops", "stacked_last", "last", "floor", "floor_huge")
        again = [f"{way}_again" for way in ("slices", "patches", "stacked", "crops", "floor")]
        assert [*case["ms"]] == [*fresh, *again]
        assert all(milliseconds > 0 for milliseconds in case["ms"].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_into_memory_that_is_there_compute_the_same(dtype: torch.dtype) -> None:
    crops_NCS = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    scale_C, shift_C = torch.tensor([0.5, 0.25, 2.0]), torch.tensor([-1.0, 0.0, 3.0])  # exact in both
    again = kernels_gather_cpu.Again(crops_NCS, scale_C, shift_C, dtype)
    by_torch = again.normalise(crops_NCS).clone()
    where = torch.arange(5), torch.zeros(5, 2, dtype=torch.int64)
    ours = again.gather(ChunkTable.of_images(crops_NCS), *where, (4, 4))
    assert torch.equal(ours, by_torch)
    assert torch.equal(ours, gather_crops(crops_NCS, scale_C, shift_C, dtype))


def test_one_thread_per_patch_gives_the_same_batch() -> None:
    cuda_on_cpu = instrument()
    if not cuda_on_cpu.has_compiler():
        pytest.skip("g++ is not installed")
    crops_NCS = torch.arange(5 * 3 * 16, dtype=torch.int32).to(torch.uint8).view(5, 3, 4, 4)
    scale_C, shift_C = normalisation([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    out_NCS = torch.empty(crops_NCS.shape)
    source = Path(kernels_gather.__file__).with_name("one_thread_per_patch.cu").read_text()
    names = ["one_thread_per_patch"]
    module = cuda_on_cpu.CpuModule(cuda_on_cpu.build("one_thread_per_patch.cu", source, names), names)
    pointers = [np.uint64(tensor.data_ptr()) for tensor in (crops_NCS, scale_C, shift_C, out_NCS)]
    module.launch(names[0], (1, 1), (32,), (*pointers, np.int64(5), np.int64(3), np.int64(16)))
    assert torch.equal(out_NCS, gather_crops(crops_NCS, scale_C, shift_C))
