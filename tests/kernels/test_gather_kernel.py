"""gather.cu itself: built with g++ against the CPU path bit for bit."""

from __future__ import annotations

import cuda_on_cpu
import numpy as np
import pytest
import torch
from cuda_on_cpu import CpuModule
from exact import bits
from gather_cases import CASES, Case

from ats_stream.kernels import gather_crops, specialisations
from ats_stream.kernels.gather_calls import CropsCall
from ats_stream.kernels.gather_launch import plan_crops
from ats_stream.kernels.launch import source_text

EXPRESSIONS = tuple(one.expression for one in specialisations.GATHER)
GUARD = 64  # bytes before and behind an output that must stay as they were

needs_compiler = pytest.mark.skipif(not cuda_on_cpu.has_compiler(), reason="g++ is not installed")


@pytest.fixture(scope="module")
def module() -> CpuModule:
    return CpuModule(cuda_on_cpu.build("gather.cu", source_text("gather.cu"), EXPRESSIONS), EXPRESSIONS)


def run_kernel(
    module: CpuModule,
    crops_NCS: torch.Tensor,
    scale_C: torch.Tensor,
    shift_C: torch.Tensor,
    output: torch.dtype,
) -> torch.Tensor:
    """Launch gather.cu as planned into guarded memory; every byte of the output starts as 0xa5."""
    num_bytes = crops_NCS.numel() * output.itemsize
    memory = torch.full((GUARD + num_bytes + GUARD,), 0xA5, dtype=torch.uint8)
    out_NCS = memory[GUARD : GUARD + num_bytes].view(output).view(crops_NCS.shape)
    assert out_NCS.data_ptr() % 16 == 0
    launch = plan_crops(CropsCall(crops_NCS, scale_C, shift_C, output), out_NCS)
    module.launch(launch.expression, launch.grid, launch.block, launch.args)
    assert bool((memory[:GUARD] == 0xA5).all() & (memory[GUARD + num_bytes :] == 0xA5).all())
    return out_NCS


def test_the_source_is_ascii_and_includes_nothing() -> None:
    assert "#include" not in source_text("gather.cu")


# ---- the plan ----


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plan_covers_each_plane_within_the_limits_of_cuda(case: Case) -> None:
    crops_NCS, scale_C, shift_C = case.inputs()
    out_NCS = torch.empty(case.shape, dtype=case.output)
    launch = plan_crops(CropsCall(crops_NCS, scale_C, shift_C, case.output), out_NCS)
    (block,) = launch.block
    assert launch.grid[0] == case.shape[0] * case.shape[1]
    assert 1 <= launch.grid[1] <= 65535
    assert 32 <= block <= 256
    assert block % 32 == 0
    patch_size, run = crops_NCS[0, 0].numel(), 16 // case.output.itemsize
    most_runs = max((start + patch_size - 1) // run + 1 for start in range(run))
    assert launch.grid[1] * block >= most_runs > (launch.grid[1] - 1) * block
    pointers = [tensor.data_ptr() for tensor in (crops_NCS, scale_C, shift_C, out_NCS)]
    assert [int(value) for value in launch.args] == [*pointers, case.shape[1], patch_size]
    assert all(value.itemsize == 8 for value in launch.args)  # the width that gather.cu declares


def test_the_plan_stops_at_the_widest_grid() -> None:
    huge = torch.empty(1, 1, 2**30, dtype=torch.uint8, device="meta")
    call = CropsCall(huge, huge, huge, torch.float32)
    launch = plan_crops(call, torch.empty(huge.shape, device="meta"))
    assert launch.grid == (1, 65535)


# ---- the source on the CPU ----


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_gives_the_bits_of_the_cpu_path(module: CpuModule, case: Case) -> None:
    inputs = case.inputs()
    got = run_kernel(module, *inputs, case.output)
    assert torch.equal(bits(got), bits(gather_crops(*inputs, case.output)))


@needs_compiler
@pytest.mark.parametrize("grid_y", [1, 2, 3])
def test_a_smaller_grid_gives_the_same(module: CpuModule, grid_y: int) -> None:
    # each thread then strides over several runs, as it does for patches above the limit of the grid
    inputs = Case(pixels=torch.uint8, output=torch.float16, shape=(2, 3, 61, 83), start=0).inputs()
    out_NCS = torch.full(inputs[0].shape, float("nan"), dtype=torch.float16)
    launch = plan_crops(CropsCall(*inputs, torch.float16), out_NCS)
    module.launch(launch.expression, (launch.grid[0], grid_y), (64,), launch.args)
    assert torch.equal(bits(out_NCS), bits(gather_crops(*inputs, torch.float16)))


def every_kind_of_float() -> torch.Tensor:
    """All signs, exponents and upper fractions, with lower bits next to where the 16-bit formats round."""
    upper = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    lower = np.array(
        [0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32
    )
    return torch.from_numpy((upper | lower).reshape(-1).view(np.float32))


@needs_compiler
@pytest.mark.parametrize("output", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("patch_size", [1, 8], ids=["single stores", "whole runs"])
def test_every_kind_of_float_is_rounded_as_torch_and_numpy_do(
    module: CpuModule, output: torch.dtype, patch_size: int
) -> None:
    values = every_kind_of_float()  # one channel each: fma(1, value, 0)
    crops_NCS = torch.ones(1, len(values), patch_size, dtype=torch.uint8)
    got = run_kernel(module, crops_NCS, values, torch.zeros_like(values), output)[0]
    for column in got.T:
        expected = (values + 0).to(output)  # fma(1, -0, 0) is +0
        same = (bits(column) == bits(expected)) | (column.isnan() & expected.isnan())
        assert bool(same.all()), values[~same][:5]
    if output == torch.float16:
        with np.errstate(over="ignore"):
            by_numpy = values.numpy().astype(np.float16)
        assert np.array_equal(got[:, 0].numpy(), by_numpy, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("output", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_constants_of_any_size_agree_too(module: CpuModule, output: torch.dtype) -> None:
    # far apart, subnormal, overflowing: the float64 sum is inexact for many of these channels
    rng = np.random.default_rng(11)
    channels = 5000
    scale = (rng.choice([-1.0, 1.0], channels) * 2.0 ** rng.uniform(-149, 128, channels)).astype(np.float32)
    shift = (rng.choice([-1.0, 1.0], channels) * 2.0 ** rng.uniform(-149, 128, channels)).astype(np.float32)
    near = rng.random(channels) < 0.5
    shift[near] = (-scale[near] * rng.integers(1, 65536, near.sum())).clip(-3e38, 3e38)
    crops_NCS = torch.from_numpy(rng.integers(0, 65536, (1, channels, 9), dtype=np.uint16))
    scale_C, shift_C = torch.from_numpy(scale), torch.from_numpy(shift)
    got = run_kernel(module, crops_NCS, scale_C, shift_C, output)
    assert torch.equal(bits(got), bits(gather_crops(crops_NCS, scale_C, shift_C, output)))
