"""gather.cu under AddressSanitizer: no access out of bounds or misaligned, on tensors of just their size."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any

import asan
import cuda_on_cpu
import pytest
import torch
from gather_cases import CASES, Case
from patch_cases import GEOMETRIES, LAYOUTS, Geometry, Layout, make

from ats_stream.kernels import specialisations
from ats_stream.kernels.gather_calls import CropsCall, PatchesCall
from ats_stream.kernels.gather_launch import plan_crops, plan_patches
from ats_stream.kernels.launch import source_text
from ats_stream.kernels.table import PIXEL_TYPES

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not cuda_on_cpu.has_compiler(), reason="g++ is not installed")

# the two 16-bit outputs differ in arithmetic alone, and the sanitizers build slowly
EXPRESSIONS = tuple(
    one.expression for one in specialisations.GATHER if not re.search(r"\bfloat16\b", one.expression)
)


@pytest.fixture(scope="module")
def library() -> Path:
    return cuda_on_cpu.build("gather.cu", source_text("gather.cu"), EXPRESSIONS, cuda_on_cpu.SANITIZER_FLAGS)


def as_data(call: CropsCall | PatchesCall, missing_bytes: dict[str, int] | None = None) -> dict[str, Any]:
    out_NCS = call.output()
    plan = plan_patches(call, out_NCS) if isinstance(call, PatchesCall) else plan_crops(call, out_NCS)
    tensors = {name: value for name, value in call._asdict().items() if isinstance(value, torch.Tensor)}
    memory = out_NCS.movedim(1, -1) if call.channels_last else out_NCS
    return asan.launch_as_data(plan, {**tensors, "out": memory}, missing_bytes)


def test_crops(library: Path) -> None:
    launches = [as_data(case.call()) for case in CASES if case.output != torch.float16]
    done = asan.run(library, EXPRESSIONS, launches)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == str(len(launches))


def test_patches(library: Path) -> None:
    launches = []
    switches = itertools.product(
        GEOMETRIES, LAYOUTS, PIXEL_TYPES, (torch.float32, torch.bfloat16), (False, True)
    )
    for number, (geometry, layout, pixels, output, channels_last) in enumerate(switches):
        made = make(
            geometry,
            layout,
            pixels,
            output,
            channels_last=channels_last,
            is_moved=number % 2 == 0,
            is_adjusted=number % 3 == 0,
            start=number % 5,
        )
        launches.append(as_data(made.call))
    done = asan.run(library, EXPRESSIONS, launches)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == str(len(launches))


WHOLE = Geometry(spaces=((16, 16), (16, 16)), chunk=(16, 16), patch=(16, 16))


def crops(shape: tuple[int, ...]) -> CropsCall:
    return Case(pixels=torch.uint8, output=torch.bfloat16, shape=shape, start=0).call()


def patches(layout: Layout, **changes: Any) -> PatchesCall:
    call = make(WHOLE, layout, torch.uint8, torch.bfloat16).call
    chunk = call.pixels_L.numel() - 256 * layout.channels
    whole = torch.zeros_like(call.offsets_ND)
    starts_T = torch.full_like(call.starts_T, chunk)  # the last chunk of the memory, read to its end
    return call._replace(offsets_ND=whole, starts_T=starts_T, **changes)


@pytest.mark.parametrize(
    ("call", "missing", "access"),
    [
        (crops((2, 3, 16)), "crops_NCS", "READ"),
        (crops((2, 3, 16)), "out", "WRITE"),
        (crops((2, 3, 17)), "crops_NCS", "READ"),
        (crops((2, 3, 17)), "out", "WRITE"),
        (patches(LAYOUTS[1]), "out", "WRITE"),
        (patches(LAYOUTS[3]), "out", "WRITE"),
        (patches(LAYOUTS[1], channels_last=True), "out", "WRITE"),
        (patches(LAYOUTS[1]), "image_N", "READ"),
        (patches(LAYOUTS[1]), "starts_T", "READ"),
        (patches(LAYOUTS[1]), "pixels_L", "READ"),
        (patches(LAYOUTS[3]), "pixels_L", "READ"),
    ],
)
def test_the_sanitizer_does_see_one_missing_byte(
    library: Path, call: CropsCall | PatchesCall, missing: str, access: str
) -> None:
    done = asan.run(library, EXPRESSIONS, [as_data(call, {missing: 1})])
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert f"{access} of size" in done.stderr
    assert "gather.cu" in done.stderr
