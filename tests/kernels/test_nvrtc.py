"""Every kernel that can be launched, compiled for every architecture by NVRTC, without a GPU."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import nvrtc
import pytest
from nvrtc import CompileError, Report, compile_reports

from ats_stream.kernels.launch import COMPILE_OPTIONS, source_text
from ats_stream.kernels.specialisations import ARCHITECTURES, BY_SOURCE, REGISTER_STEPS

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(
    not nvrtc.is_installed(), reason="NVRTC is not installed (make setup, on Linux for x86-64)"
)
Jobs = dict[tuple[str, int], Future[dict[str, Report]]]


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    """All compilations, begun at once: NVRTC runs in threads."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            (source, architecture): pool.submit(
                compile_reports,
                source_text(source),
                [one.expression for one in specialisations],
                architecture,
                COMPILE_OPTIONS,
            )
            for source, specialisations in BY_SOURCE.items()
            for architecture in ARCHITECTURES
        }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", BY_SOURCE)
def test_every_specialisation_fits_its_registers_and_keeps_its_wide_stores(
    jobs: Jobs, source: str, architecture: int
) -> None:
    reports = jobs[source, architecture].result()
    assert list(reports) == [one.expression for one in BY_SOURCE[source]]
    for one in BY_SOURCE[source]:
        report = reports[one.expression]
        assert report.spilled_bytes == 0, one.expression
        assert report.registers <= one.max_registers, one.expression
        assert (report.wide_stores > 0) >= one.has_wide_stores, one.expression
        assert report.narrow_streaming_stores == 0, one.expression


@pytest.mark.parametrize("source", BY_SOURCE)
def test_the_bounds_are_near_what_is_needed(jobs: Jobs, source: str) -> None:
    # a bound that no architecture comes near would let a kernel grow unseen
    for one in BY_SOURCE[source]:
        most = max(
            jobs[source, architecture].result()[one.expression].registers for architecture in ARCHITECTURES
        )
        # the least step of occupancy that fits, or the one above it, which a family of kernels may share
        assert one.max_registers in [step for step in REGISTER_STEPS if step >= most][:2], one.expression


# ---- the instrument itself ----

SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) spill(float* x) {
  float v[64];
  for (int i = 0; i < 64; ++i) v[i] = x[i * 7];
  for (int round = 0; round < 100; ++round)
    for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i + round) & 63] + x[i];
  for (int i = 0; i < 64; ++i) x[i * 3] = v[i];
}
"""
STORES = """
template <int N> __global__ void store(float* x) {
  if (N == 4) __stcs(reinterpret_cast<float4*>(x) + threadIdx.x, make_float4(1, 2, 3, 4));
  else __stcs(x + threadIdx.x, 1.0f);
}
"""


@pytest.mark.parametrize("architecture", [70, 90])
def test_the_report_tells_wide_from_narrow_stores(architecture: int) -> None:
    reports = compile_reports(STORES, ["store<4>", "store<1>"], architecture, COMPILE_OPTIONS)
    found = {name: (one.wide_stores, one.narrow_streaming_stores) for name, one in reports.items()}
    assert found == {"store<4>": (1, 0), "store<1>": (0, 1)}


def test_the_report_sees_memory_that_registers_did_not_hold() -> None:
    report = compile_reports(SPILLING, ["spill"], 80, (*COMPILE_OPTIONS, "--maxrregcount=24"))["spill"]
    assert report.spilled_bytes > 0
    assert report.registers <= 32


def test_what_does_not_compile_comes_with_the_compilers_words() -> None:
    with pytest.raises(CompileError, match="nonsense"):
        compile_reports("__global__ void f() { nonsense(); }", ["f"], 80, COMPILE_OPTIONS)
