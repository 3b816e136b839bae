"""Stretches of about a block and more, which the compiled gather writes in vectors: the bits of torch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from exact import bits
from patch_cases import Geometry, Layout, make_all

from ats_stream.kernels import gather_crops
from ats_stream.kernels.gather_blocks import LENGTH
from ats_stream.kernels.gather_calls import OUTPUT_TYPES
from ats_stream.kernels.gather_cpu import compiled_path
from ats_stream.kernels.memory import SMALLEST_BYTES, ask_for_huge_pages
from ats_stream.kernels.orientation import quarter_turn

WIDE = (
    Geometry(spaces=((300,), (90,)), chunk=(2 * LENGTH + 9,), patch=(3 * LENGTH + 1,)),
    Geometry(spaces=((9, 130), (40, 70)), chunk=(7, 3 * LENGTH), patch=(5, 2 * LENGTH)),
)
LAYOUTS = (
    Layout(channels=3, chunk_channels=3, is_interleaved=False),
    Layout(channels=3, chunk_channels=1, is_interleaved=False),
    Layout(channels=3, chunk_channels=3, is_interleaved=True),
    Layout(channels=3, chunk_channels=1, is_interleaved=True),
    Layout(channels=4, chunk_channels=4, is_interleaved=False),
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("geometry", WIDE, ids=str)
def test_wide_patches(geometry: Geometry, layout: Layout) -> None:
    for made in make_all(geometry, layout, adjust_every=5):
        with compiled_path(True):
            got = torch.ops.ats_stream.gather_patches(*made.call)
        assert torch.equal(bits(got.contiguous()), bits(made.expected_NCS)), made.call


@pytest.mark.parametrize("num_pixels", [LENGTH - 1, LENGTH, LENGTH + 1, 2 * LENGTH, 3 * LENGTH - 1])
@pytest.mark.parametrize("is_interleaved", [False, True])
def test_any_float32_is_rounded_as_torch_rounds(num_pixels: int, is_interleaved: bool) -> None:
    rng = np.random.default_rng(num_pixels)
    shape = (200, num_pixels, 3) if is_interleaved else (200, 3, num_pixels)
    patterns = rng.integers(0, 1 << 32, shape, dtype=np.uint32)
    # half of them about the borders of float16, the ties of both, infinity and NaN
    exponents = rng.choice(np.array([0, 1, 102, 103, 112, 113, 127, 142, 143, 254, 255], np.uint32), shape)
    ends = rng.choice(np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x8000, 0x18000], np.uint32), shape)
    near = (patterns & np.uint32(0x80700000)) | (exponents << np.uint32(23)) | ends
    patterns = np.where(rng.random(shape) < 0.5, near, patterns).astype(np.uint32)
    crops = torch.from_numpy(patterns.view(np.float32))
    crops_NCS = crops.movedim(-1, 1) if is_interleaved else crops
    scale_C, shift_C = torch.ones(3), torch.full((3,), -0.0)  # leave every number as it is
    for output, channels_last in itertools.product(OUTPUT_TYPES, (False, True)):
        with compiled_path(True):
            got = gather_crops(
                crops,
                scale_C,
                shift_C,
                output,
                is_interleaved=is_interleaved,
                channels_last=channels_last,
            )
        expected, is_nan = crops_NCS.to(output), crops_NCS.isnan()
        assert torch.equal(got.isnan(), is_nan), output
        assert torch.equal(bits(got.contiguous())[~is_nan], bits(expected.contiguous())[~is_nan]), output


def test_mirrored_lines() -> None:
    crops_NCS = torch.randint(0, 256, (16, 3, 70, 70), dtype=torch.uint8)
    half_turn = torch.full((16,), quarter_turn(2, (-2, -1)), dtype=torch.uint8)
    one, none = torch.ones(3), torch.zeros(3)
    with compiled_path(True):
        got = gather_crops(crops_NCS, one, none, orientation_N=half_turn)
    assert torch.equal(got, crops_NCS.flip(-2, -1).float())


@pytest.mark.parametrize("num_bytes", [1, SMALLEST_BYTES - 1, SMALLEST_BYTES, SMALLEST_BYTES + 4097])
def test_memory_in_huge_pages_holds_what_is_written(num_bytes: int) -> None:
    memory = torch.empty(num_bytes, dtype=torch.uint8)
    ask_for_huge_pages(memory)
    memory.copy_(torch.arange(num_bytes) % 251)
    assert bool((memory == torch.arange(num_bytes) % 251).all())
