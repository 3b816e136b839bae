"""gather_patches, and gather_crops with moves: every path against slices of padded images, bit for bit."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import cuda_on_cpu
import numpy as np
import pytest
import torch
from cuda_on_cpu import CpuModule
from exact import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_cases import (
    FAR,
    GEOMETRIES,
    LAYOUTS,
    Geometry,
    Layout,
    Made,
    adjusted,
    codes_of,
    make,
    make_all,
    move,
    random_pixels,
)

from ats_stream.errors import InputError
from ats_stream.kernels import ChunkTable, gather_crops, gather_patches, specialisations
from ats_stream.kernels.gather_calls import OUTPUT_TYPES, CropsCall, PatchesCall
from ats_stream.kernels.gather_cpu import compiled_path
from ats_stream.kernels.gather_launch import plan_crops, plan_patches
from ats_stream.kernels.launch import source_text
from ats_stream.kernels.orientation import quarter_turn
from ats_stream.kernels.rounding import fma_float32
from ats_stream.kernels.table import PIXEL_TYPES

if TYPE_CHECKING:
    from collections.abc import Callable

EXPRESSIONS = tuple(one.expression for one in specialisations.GATHER)
GUARD = 64  # bytes before and behind an output that must stay as they were


@pytest.fixture(scope="module")
def module() -> CpuModule | None:
    if not cuda_on_cpu.has_compiler():
        return None
    return CpuModule(cuda_on_cpu.build("gather.cu", source_text("gather.cu"), EXPRESSIONS), EXPRESSIONS)


def by_operator(call: PatchesCall) -> torch.Tensor:
    return torch.ops.ats_stream.gather_patches(*call)


def by_kernel(module: CpuModule, call: PatchesCall | CropsCall) -> torch.Tensor:
    """Launch gather.cu as planned into guarded memory."""
    out_NCS = call.output()
    num_bytes = out_NCS.numel() * out_NCS.element_size()
    memory = torch.full((GUARD + num_bytes + GUARD,), 0xA5, dtype=torch.uint8)
    guarded_NCS = (
        memory[GUARD : GUARD + num_bytes].view(call.dtype).as_strided(out_NCS.shape, out_NCS.stride())
    )
    plan = plan_patches(call, guarded_NCS) if isinstance(call, PatchesCall) else plan_crops(call, guarded_NCS)
    module.launch(plan.expression, plan.grid, plan.block, plan.args)
    assert bool((memory[:GUARD] == 0xA5).all() & (memory[GUARD + num_bytes :] == 0xA5).all())
    return guarded_NCS


def check(made: Made, module: CpuModule | None, *, with_torch: bool) -> None:
    expected = bits(made.expected_NCS)
    for is_compiled in (True, False) if with_torch else (True,):
        with compiled_path(is_compiled):
            got = by_operator(made.call)
        assert torch.equal(bits(got.contiguous()), expected), is_compiled
    if module is not None:
        assert torch.equal(bits(by_kernel(module, made.call).contiguous()), expected), "gather.cu"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_path_gives_the_bits_of_slices(
    module: CpuModule | None, geometry: Geometry, layout: Layout
) -> None:
    for made in make_all(geometry, layout):
        # the rounding of the torch path is that of torch itself: one output is enough there
        check(made, module, with_torch=made.call.dtype == torch.float32)


SIDES = st.integers(1, 40)


@st.composite
def geometries(draw: Callable[..., Any]) -> Geometry:
    num_axes = draw(st.integers(1, 3))
    side = (40, 24, 9)[num_axes - 1]
    sizes = st.tuples(*[st.integers(1, side)] * num_axes)
    return Geometry(spaces=(draw(sizes), draw(sizes)), chunk=draw(sizes), patch=draw(sizes))


@st.composite
def layouts(draw: Callable[..., Any]) -> Layout:
    channels = draw(st.integers(1, 6))
    divisors = [one for one in range(1, channels + 1) if channels % one == 0]
    return Layout(
        channels=channels, chunk_channels=draw(st.sampled_from(divisors)), is_interleaved=draw(st.booleans())
    )


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    geometry=geometries(),
    layout=layouts(),
    pixels=st.sampled_from(PIXEL_TYPES),
    output=st.sampled_from(OUTPUT_TYPES),
    switches=st.tuples(*[st.booleans()] * 3),
    start=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    module: CpuModule | None,
    geometry: Geometry,
    layout: Layout,
    pixels: torch.dtype,
    output: torch.dtype,
    switches: tuple[bool, bool, bool],
    start: int,
    seed: int,
) -> None:
    is_moved, is_adjusted, channels_last = switches
    made = make(
        geometry,
        layout,
        pixels,
        output,
        is_moved=is_moved,
        is_adjusted=is_adjusted,
        channels_last=channels_last,
        start=start,
        seed=seed,
    )
    check(made, module, with_torch=True)


@pytest.mark.parametrize("grid_y", [1, 2])
def test_a_smaller_grid_gives_the_same(module: CpuModule | None, grid_y: int) -> None:
    if module is None:
        pytest.skip("g++ is not installed")
    made = make(GEOMETRIES[1], LAYOUTS[1], torch.uint8, torch.float32, is_moved=True)
    out_NCS = made.call.output().fill_(float("nan"))
    plan = plan_patches(made.call, out_NCS)
    module.launch(plan.expression, (plan.grid[0], grid_y), (32,), plan.args)
    assert torch.equal(bits(out_NCS), bits(made.expected_NCS))


def test_threads_share_the_patches() -> None:
    geometry = Geometry(spaces=((300, 300), (280, 290)), chunk=(128, 128), patch=(160, 160))
    made = make(geometry, LAYOUTS[1], torch.uint8, torch.float32)
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            assert torch.equal(bits(by_operator(made.call)), bits(made.expected_NCS))
    finally:
        torch.set_num_threads(before)


# ---- crops that are moved, adjusted or of another memory order ----


@pytest.mark.parametrize("patch", [(24,), (16, 16), (7, 7), (4, 8, 8), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_crops_are_moved_and_adjusted_alike(
    module: CpuModule | None, channels: int, patch: tuple[int, ...]
) -> None:
    rng = np.random.default_rng([channels, *patch])
    codes = [
        code for code in codes_of(len(patch)) if len(set(patch)) == 1 or code in (0, 1, 2, 3, 8, 9, 10, 11)
    ]
    num_crops = len(codes)
    scale_C, shift_C = (torch.from_numpy(rng.uniform(0.01, 2, channels).astype(np.float32)) for _ in range(2))
    wide = (-1, *[1] * len(patch))
    intensity_N2 = torch.from_numpy(rng.uniform((0.5, -40), (1.5, 40), (num_crops, 2)).astype(np.float32))
    orientation_N = torch.tensor(codes, dtype=torch.uint8)
    for pixels, output, is_interleaved, channels_last, is_moved, is_adjusted in itertools.product(
        PIXEL_TYPES, OUTPUT_TYPES, *[(False, True)] * 4
    ):
        crops_NCS = random_pixels(rng, pixels, (num_crops, channels, *patch))
        expected = []
        for crop, code, (gain, by) in zip(crops_NCS, codes, intensity_N2.tolist(), strict=True):
            changed = adjusted(crop, gain, by) if is_adjusted else crop
            expected.append(move(changed, code) if is_moved else changed)
        expected_NCS = fma_float32(torch.stack(expected).float(), scale_C.view(wide), shift_C.view(wide))
        call = CropsCall(
            crops_NCS.movedim(1, -1).contiguous() if is_interleaved else crops_NCS,
            scale_C,
            shift_C,
            output,
            is_interleaved,
            channels_last,
            orientation_N if is_moved else None,
            intensity_N2 if is_adjusted else None,
        )
        for is_compiled in (True, False):
            with compiled_path(is_compiled):
                got = torch.ops.ats_stream.gather_crops(*call)
            assert torch.equal(bits(got.contiguous()), bits(expected_NCS.to(output)))
        if channels_last and len(patch) == 2:
            assert got.is_contiguous(memory_format=torch.channels_last)
        if module is not None:
            assert torch.equal(bits(by_kernel(module, call).contiguous()), bits(expected_NCS.to(output)))


# ---- torch's own checks of the operators ----


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last: bool) -> None:
    made = make(GEOMETRIES[3], LAYOUTS[3], torch.uint8, torch.bfloat16, is_moved=True, is_adjusted=True)
    call = made.call._replace(channels_last=channels_last)
    results = torch.library.opcheck(torch.ops.ats_stream.gather_patches.default, tuple(call))
    assert set(results.values()) == {"SUCCESS"}
    crops = CropsCall(
        random_pixels(np.random.default_rng(0), torch.uint8, (2, 5, 5, 3)),
        call.scale_C,
        call.shift_C,
        torch.float16,
        True,
        channels_last,
        torch.tensor([0, 10], dtype=torch.uint8),
        torch.ones(2, 2),
    )
    results = torch.library.opcheck(torch.ops.ats_stream.gather_crops.default, tuple(crops))
    assert set(results.values()) == {"SUCCESS"}


def test_compiles_into_one_graph() -> None:
    made = make(GEOMETRIES[1], LAYOUTS[1], torch.uint8, torch.float32)
    compiled = torch.compile(lambda call: by_operator(call) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(made.call), by_operator(made.call) * 2)


# ---- what is refused ----

IMAGES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
ONE = torch.ones(3)
INDEX = torch.tensor([0, 1])
OFFSETS = torch.zeros(2, 2, dtype=torch.int64)
MOVES = torch.zeros(2, dtype=torch.uint8)
INTENSITY = torch.ones(2, 2)


def call_with(patch: tuple[int, ...] = (4, 4), **changes: Any) -> torch.Tensor:
    values = {"image_N": INDEX, "offsets_ND": OFFSETS, "scale_C": ONE, "shift_C": ONE, **changes}
    return gather_patches(
        values.pop("table", ChunkTable.of_images(IMAGES)),
        values.pop("image_N"),
        values.pop("offsets_ND"),
        patch,
        values.pop("scale_C"),
        values.pop("shift_C"),
        **values,
    )


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "offsets-list": ({"offsets_ND": [[0, 0]]}, "offsets_ND is a list, expected a torch.Tensor"),
    "offsets-int32": ({"offsets_ND": OFFSETS.int()}, "offsets_ND is torch.int32, expected torch.int64"),
    "offsets-short": ({"offsets_ND": OFFSETS[:1]}, r"offsets_ND has shape \(1, 2\), expected \(2, 2\)"),
    "offsets-axes": ({"offsets_ND": OFFSETS[:, :1].contiguous()}, r"offsets_ND has shape \(2, 1\)"),
    "offsets-strided": ({"offsets_ND": OFFSETS.t().t().expand(2, 2).t()}, "offsets_ND has strides"),
    "no-patches": ({"image_N": INDEX[:0], "offsets_ND": OFFSETS[:0]}, r"image_N has shape \(0,\)"),
    "image-unknown": ({"image_N": INDEX + 1}, "image_N names an image beyond the 2 of the table"),
    "image-negative": ({"image_N": INDEX - 1}, "image_N names an image beyond the 2 of the table"),
    "patch-zero": ({"patch": (0, 4)}, r"a patch of \(0, 4\) pixels: sides must be 1 to"),
    "patch-huge": ({"patch": (1 << 30, 1)}, r"a patch of \(1073741824, 1\) pixels"),
    "patch-many": ({"patch": (1 << 16, 1 << 16)}, "2147483647 pixels at most"),
    "patch-axes": ({"patch": (4, 4, 4)}, r"a patch of \(4, 4, 4\) does not fit chunks of"),
    "channels": ({"scale_C": ONE[:2], "shift_C": ONE[:2]}, "scale_C has 2 channels, the images have 3"),
    "shift-long": ({"shift_C": torch.ones(4)}, r"shift_C has shape \(4,\), expected \(3,\)"),
    "orientation-list": ({"orientation_N": [0, 0]}, "orientation_N is a list, expected a torch.Tensor"),
    "intensity-list": ({"intensity_N2": [[1, 0]] * 2}, "intensity_N2 is a list, expected a torch.Tensor"),
    "offsets-sparse": ({"offsets_ND": OFFSETS.to_sparse()}, "offsets_ND has layout torch.sparse_coo"),
    "orientation-type": ({"orientation_N": MOVES.int()}, "orientation_N is torch.int32"),
    "orientation-long": ({"orientation_N": MOVES.repeat(2)}, r"orientation_N has shape \(4,\)"),
    "orientation-unknown": (
        {"orientation_N": MOVES + 48},
        "orientation_N holds 48, expected numbers below 48",
    ),
    "orientation-axis": ({"orientation_N": MOVES + 4}, "orientation 4 moves an axis that a patch of 2 axes"),
    "intensity-shape": ({"intensity_N2": INTENSITY[:, :1]}, r"intensity_N2 has shape \(2, 1\)"),
    "intensity-nan": ({"intensity_N2": INTENSITY * float("nan")}, "numbers that are not finite"),
    "output": ({"dtype": torch.float64}, "dtype is torch.float64, expected one of torch.float32"),
    "device": ({"offsets_ND": OFFSETS.to("meta")}, "offsets_ND is on meta, expected cpu"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name: str) -> None:
    changes, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        call_with(**changes)
    assert "\n" not in str(caught.value)


def test_crops_that_are_not_square_cannot_be_turned() -> None:
    crops_NCS = torch.zeros(1, 3, 4, 8, dtype=torch.uint8)
    turn_N = torch.tensor([quarter_turn(1)], dtype=torch.uint8)
    with pytest.raises(
        InputError, match=r"orientation 10 exchanges axes of different sizes in crops of \(4, 8\)"
    ):
        gather_crops(crops_NCS, ONE, ONE, orientation_N=turn_N)
    assert gather_crops(crops_NCS, ONE, ONE, orientation_N=turn_N - 7).shape == crops_NCS.shape  # a half turn


def test_a_table_that_lies_is_refused_by_the_operator_too() -> None:
    made = make(GEOMETRIES[1], LAYOUTS[1], torch.uint8, torch.float32)
    beyond = made.call._replace(starts_T=made.call.starts_T + len(made.call.pixels_L))
    with pytest.raises(InputError, match=r"a chunk of 3072 elements ends at"):
        by_operator(beyond)
    images_I7 = made.call.images_I7.clone()
    images_I7[1, 0] += 1
    with pytest.raises(InputError, match="images_I7 does not fit"):
        by_operator(made.call._replace(images_I7=images_I7))


def test_chunks_may_lie_beyond_two_to_the_31_elements(module: CpuModule | None) -> None:
    # only the pages of the chunks that are written and read take memory
    num_elements, side = (1 << 32) + 1777, 16
    pixels_L = torch.empty(num_elements, dtype=torch.uint8)
    size = 3 * side * side
    starts = [(1 << 31) - 5, num_elements - size, (1 << 32) - 800]
    images = random_pixels(np.random.default_rng(1), torch.uint8, (3, 3, side, side))
    for start, image in zip(starts, images, strict=True):
        pixels_L[start : start + size] = image.flatten()
    table = ChunkTable.of_chunks(pixels_L, starts, [(side, side)] * 3, (side, side), num_channels=3)
    image_N, offsets_ND = torch.arange(3), torch.tensor([[0, 0], [-2, 3], [5, -1]])
    expected = [call_with((8, 8), table=ChunkTable.of_images(images), image_N=image_N, offsets_ND=offsets_ND)]
    for is_compiled in (True, False):
        with compiled_path(is_compiled):
            expected.append(call_with((8, 8), table=table, image_N=image_N, offsets_ND=offsets_ND))
    if module is not None:
        fields = (table.pixels_L, table.starts_T, table.images_I7, image_N, offsets_ND, ONE, ONE)
        call = PatchesCall(*fields, [side, side], 3, False, [8, 8], torch.float32)
        expected.append(by_kernel(module, call))
    assert all(torch.equal(one, expected[0]) for one in expected)
    assert len(expected[0].unique()) > 100


def test_far_offsets_are_outside() -> None:
    out_NCS = call_with(offsets_ND=torch.tensor([[FAR, 0], [0, -FAR]]), fill=5.0)
    assert torch.equal(out_NCS, torch.full((2, 3, 4, 4), 6.0))
