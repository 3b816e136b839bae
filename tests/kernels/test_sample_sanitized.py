"""sample.cu under sanitizers: no access out of bounds, no race, no barrier that could be left out unseen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cuda_on_cpu
import pytest
import torch
from race_on_cpu import EXPRESSIONS

from ats_stream.kernels.launch import source_text
from ats_stream.kernels.sample import Race, RacePlan

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.skipif(not cuda_on_cpu.has_compiler(), reason="g++ is not installed")

NUM_BARRIERS = cuda_on_cpu.numbered_barriers(source_text("sample.cu"))[1]
RACE_FOUND, NO_PROGRESS = 66, 86


class Job:
    """The launches of races as data for sanitized_main.py, their input in files."""

    def __init__(self, folder: Path, flags: Sequence[str]) -> None:
        self._folder = folder
        self._buffers: list[int | str] = []
        self._launches: list[dict[str, Any]] = []
        self._library = cuda_on_cpu.build("sample.cu", source_text("sample.cu"), EXPRESSIONS, flags)

    def add(self, logits_BM: torch.Tensor, num_kept: int, plan: RacePlan, *, missing: int = 0) -> None:
        """Add a race; of the logits, the last ``missing`` bytes are withheld."""
        streams_B = torch.arange(len(logits_BM))
        race = Race.of(logits_BM, num_kept, torch.tensor(3), streams_B, False, None, plan)
        numbers = {}
        for tensor in (race.logits_BM, race.seed, race.stream_ids_B):
            content = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            file = self._folder / f"buffer{len(self._buffers)}"
            content[: len(content) - (missing if tensor is race.logits_BM else 0)].tofile(file)
            numbers[tensor.data_ptr()] = len(self._buffers)
            self._buffers.append(str(file))
        for tensor in (race.parts, *race.fields):
            numbers[tensor.data_ptr()] = len(self._buffers)
            self._buffers.append(tensor.nbytes)
        for launch in race.launches():
            args = [
                ["buffer", numbers[int(value)]] if int(value) in numbers else [str(value.dtype), int(value)]
                for value in launch.args
            ]
            form = {"expression": launch.expression, "grid": launch.grid, "block": launch.block}
            self._launches.append({**form, "args": args})

    def run(
        self, runtime: str, *, orders: Sequence[int] = (0,), skipped_barrier: int = -1
    ) -> subprocess.CompletedProcess[str]:
        job = {
            "library": str(self._library),
            "expressions": EXPRESSIONS,
            "skipped_barrier": skipped_barrier,
            "orders": list(orders),
            "buffers": self._buffers,
            "launches": self._launches,
        }
        environment = {
            **os.environ,
            "LD_PRELOAD": runtime,
            "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter leaves memory to the system at its end
            "TSAN_OPTIONS": f"exitcode={RACE_FOUND}",
        }
        main = [sys.executable, str(Path(__file__).with_name("sanitized_main.py"))]
        # ThreadSanitizer needs addresses where it expects them
        command = ["setarch", "-R", *main] if "tsan" in runtime else main
        return subprocess.run(
            command,
            input=json.dumps(job),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )


def logits(*shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(5))


# ---- memory ----


def test_no_access_out_of_bounds_or_misaligned(tmp_path: Path) -> None:
    job = Job(tmp_path, cuda_on_cpu.SANITIZER_FLAGS)
    for num_positions, num_parts in ((1, 1), (130, 2), (700, 3)):
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            plan = RacePlan(num_parts=num_parts, block=64, room=16)
            job.add(logits(2, num_positions).to(dtype), 7, plan)
    done = job.run(cuda_on_cpu.asan_runtime())
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(done.stdout.split()) == 1


@pytest.mark.parametrize("num_positions", [64, 67])
def test_the_sanitizer_does_see_one_missing_byte(tmp_path: Path, num_positions: int) -> None:
    job = Job(tmp_path, cuda_on_cpu.SANITIZER_FLAGS)
    job.add(logits(1, num_positions), 7, RacePlan(num_parts=1, block=32, room=16), missing=1)
    done = job.run(cuda_on_cpu.asan_runtime())
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "sample.cu" in done.stderr


# ---- barriers ----


@pytest.fixture(scope="module")
def racing_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A race in which every line runs: candidates without room, sorts on the way, arrivals put out again."""
    job = Job(tmp_path_factory.mktemp("race"), cuda_on_cpu.THREAD_SANITIZER_FLAGS)
    job.add(logits(1, 1500), 9, RacePlan(num_parts=2, block=64, room=16))
    return job


def test_no_race_and_the_same_in_any_order_of_threads(racing_job: Job) -> None:
    done = racing_job.run(cuda_on_cpu.tsan_runtime(), orders=(0, 1, 2))
    assert done.returncode == 0, done.stderr[-4000:]
    results = done.stdout.split()
    assert len(results) == 3


@pytest.mark.parametrize("number", range(NUM_BARRIERS))
def test_every_barrier_is_missed(racing_job: Job, number: int) -> None:
    done = racing_job.run(cuda_on_cpu.tsan_runtime(), skipped_barrier=number)
    assert done.returncode in (RACE_FOUND, NO_PROGRESS), done.stderr[-4000:]


def test_a_barrier_that_some_threads_do_not_reach_ends_the_process(tmp_path: Path) -> None:
    source = """
    __global__ void f(int* x) {
      if (threadIdx.x < 5) __syncthreads();
      x[threadIdx.x] = 1;
    }
    """
    library = cuda_on_cpu.build("f.cu", source, ["f"])
    program = f"""
import numpy as np
from cuda_on_cpu import CpuModule
x = np.zeros(32, np.int32)
CpuModule({str(library)!r}, ["f"]).launch("f", (1, 1), (32,), [np.uint64(x.ctypes.data)])
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == NO_PROGRESS
    assert "a barrier waits for all threads" in done.stderr
