"""The gather on a device: the bits of the CPU, torch's current stream, feeds, graphs."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from exact import bits
from gather_cases import CASES
from patch_cases import GEOMETRIES, LAYOUTS, Made, make, make_all, random_pixels

from ats_stream.kernels import ChunkTable, gather_crops, gather_patches
from ats_stream.kernels.feeder import DeviceFeeder
from ats_stream.kernels.gather_calls import OUTPUT_TYPES, PatchesCall
from ats_stream.kernels.launch import require_cupy
from ats_stream.kernels.resident import ChunkedImage, ResidentChunks

DEVICE = torch.device("cuda", 0)
SMALL = ("test_crops_have_the_bits_of_the_cpu", "test_patches_have_the_bits_of_slices")


def on_device(call: PatchesCall) -> PatchesCall:
    return PatchesCall(*[value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in call])


def check(made: Made) -> None:
    got = torch.ops.ats_stream.gather_patches(*on_device(made.call))
    assert got.device == DEVICE
    assert torch.equal(bits(got.cpu().contiguous()), bits(made.expected_NCS))


def test_crops_have_the_bits_of_the_cpu() -> None:
    for case in CASES:
        inputs = case.inputs()
        got = gather_crops(*(tensor.to(DEVICE) for tensor in inputs), case.output)
        assert torch.equal(bits(got.cpu()), bits(gather_crops(*inputs, case.output))), case


def test_patches_have_the_bits_of_slices() -> None:
    for geometry, layout in itertools.product(GEOMETRIES, LAYOUTS):
        for made in make_all(geometry, layout):
            check(made)


def test_every_kind_of_float_is_rounded_as_torch_does() -> None:
    # the device rounds pairs with an instruction of its own
    upper = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    lower = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = torch.from_numpy((upper | lower).reshape(-1).view(np.float32))
    ones = torch.ones(1, len(values), 8, dtype=torch.uint8, device=DEVICE)
    scale_C = values.to(DEVICE)
    for output in OUTPUT_TYPES:
        got = gather_crops(ones, scale_C, torch.zeros_like(scale_C), output)[0, :, 3].cpu()
        expected = (values + 0).to(output)
        same = (bits(got) == bits(expected)) | (got.isnan() & expected.isnan())
        assert bool(same.all()), values[~same][:5]


def test_it_runs_on_the_current_stream() -> None:
    made = make(GEOMETRIES[1], LAYOUTS[1], torch.uint8, torch.bfloat16)
    call = on_device(made.call)
    late_L = torch.zeros_like(call.pixels_L)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the pixels arrive after the launch
        late_L.copy_(call.pixels_L, non_blocking=True)
        got = torch.ops.ats_stream.gather_patches(*call._replace(pixels_L=late_L))
        host = got.to("cpu")
    assert torch.equal(bits(host), bits(made.expected_NCS))


def test_what_does_not_fit_is_fill_and_harms_nothing() -> None:
    table = ChunkTable.of_images(torch.ones(2, 3, 16, 16, dtype=torch.uint8, device=DEVICE))
    image_N = torch.tensor([5, -1, 0, 1], device=DEVICE)
    offsets_ND = torch.tensor([[0, 0], [0, 0], [1 << 62, 0], [0, -(1 << 62)]], device=DEVICE)
    one_C = torch.ones(3, device=DEVICE)
    got = gather_patches(table, image_N, offsets_ND, (8, 8), one_C, one_C, fill=6)
    assert torch.equal(got.cpu(), torch.full((4, 3, 8, 8), 7.0))


def test_zero_copy_reads_pinned_memory() -> None:
    feeder = DeviceFeeder(DEVICE, feed="zero_copy")
    rng = np.random.default_rng(0)
    one_C, none_C = torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    for _ in range(5):
        crops_NCS = random_pixels(rng, torch.uint8, (4, 3, 32, 40))
        staged = feeder.stage([crops_NCS])
        (pinned,) = staged.take()
        assert pinned.is_pinned()
        got = gather_crops(pinned, one_C, none_C, channels_last=True)
        staged.release()
        assert torch.equal(got.cpu(), crops_NCS.float())


def test_copies_end_while_the_device_is_at_work() -> None:
    feeder = DeviceFeeder(DEVICE)
    crops_NCS = torch.zeros(64, 3, 224, 224, dtype=torch.uint8)
    feeder.stage([crops_NCS]).take()  # memory and streams exist from here on
    matrix = torch.randn(4096, 4096, device=DEVICE)
    torch.cuda.synchronize()
    worked = torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(1_000_000_000)  # about half a second
    matrix = matrix @ matrix
    worked.record()
    staged = feeder.stage([crops_NCS])
    copied = staged._event
    copied.synchronize()
    assert not worked.query()  # the copy began later and ended before
    assert torch.equal(staged.take()[0].cpu(), crops_NCS)


def test_batches_are_right_whatever_is_under_way() -> None:
    feeder = DeviceFeeder(DEVICE)
    rng = np.random.default_rng(1)
    batches = [random_pixels(rng, torch.uint8, (32, 3, 128, 128)) for _ in range(12)]
    one_C, none_C = torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    staged, sums = feeder.stage([batches[0]]), []
    for number in range(len(batches)):
        following = feeder.stage([batches[number + 1]]) if number + 1 < len(batches) else staged
        (crops_NCS,) = staged.take()
        sums.append(gather_crops(crops_NCS, one_C, none_C).double().sum())
        torch.cuda._sleep(2_000_000)
        staged = following
    assert [int(total) for total in sums] == [int(batch.long().sum()) for batch in batches]


def test_resident_chunks_give_the_patches_of_the_image() -> None:
    side, rng = 16, np.random.default_rng(2)
    image_CYX = random_pixels(rng, torch.uint8, (3, 64, 64))

    def fetch(keys: list[object]) -> list[torch.Tensor]:
        return [
            image_CYX[:, y * side : (y + 1) * side, x * side : (x + 1) * side].contiguous()
            for y, x in keys  # type: ignore[misc]  # pairs
        ]

    pool = ResidentChunks(DEVICE, num_slots=16, chunk_shape=(side, side), num_channels=3)
    keys = [(y, x) for y in range(4) for x in range(4)]
    one_C, none_C = torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    image_N = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    for _ in range(3):
        offsets_ND = torch.from_numpy(rng.integers(0, 40, (4, 2)))
        table = pool.table([ChunkedImage((64, 64), keys)], fetch)
        got = gather_patches(table, image_N, offsets_ND.to(DEVICE), (24, 24), one_C, none_C)
        for patch, (y, x) in zip(got.cpu(), offsets_ND.tolist(), strict=True):
            assert torch.equal(patch, image_CYX[:, y : y + 24, x : x + 24].float())
    assert (pool.num_misses, pool.num_hits) == (16, 32)


def test_outputs_may_have_more_than_two_to_the_31_elements() -> None:
    # 2.2e9 pixels of 15 thousand crops: 2.2 GB in, 4.5 GB out
    generator = torch.Generator(DEVICE).manual_seed(3)
    shape = (14_900, 3, 224, 224)
    crops_NCS = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE, generator=generator)
    assert crops_NCS.numel() > 1 << 31
    one_C, none_C = torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    table = ChunkTable.of_images(crops_NCS)
    index_N = torch.arange(len(crops_NCS), device=DEVICE)
    offsets_ND = torch.zeros(len(crops_NCS), 2, dtype=torch.int64, device=DEVICE)
    for out_NCS in (
        gather_crops(crops_NCS, one_C, none_C, torch.bfloat16),
        gather_patches(table, index_N, offsets_ND, shape[2:], one_C, none_C, torch.bfloat16),
    ):
        for part, expected in zip(out_NCS.split(500), crops_NCS.split(500), strict=True):
            assert torch.equal(part, expected.to(torch.bfloat16))


def test_nothing_is_allocated_by_cupy() -> None:
    cupy = require_cupy(DEVICE)
    check(make(GEOMETRIES[1], LAYOUTS[1], torch.uint8, torch.float32))
    assert cupy.get_default_memory_pool().total_bytes() == 0
    assert cupy.get_default_pinned_memory_pool().n_free_blocks() == 0


def test_a_graph_replays_it() -> None:
    made = make(GEOMETRIES[1], LAYOUTS[3], torch.uint8, torch.float16, channels_last=True)
    call = on_device(made.call)
    torch.ops.ats_stream.gather_patches(*call)  # compiles
    graph = torch.cuda.CUDAGraph()
    pixels_L = call.pixels_L.clone()
    with torch.cuda.graph(graph):
        out_NCS = torch.ops.ats_stream.gather_patches(*call._replace(pixels_L=pixels_L))
    pixels_L.zero_()
    graph.replay()
    assert not torch.equal(bits(out_NCS.cpu().contiguous()), bits(made.expected_NCS))
    pixels_L.copy_(call.pixels_L)
    graph.replay()
    assert torch.equal(bits(out_NCS.cpu().contiguous()), bits(made.expected_NCS))


def test_torch_checks_the_operators() -> None:
    made = make(GEOMETRIES[3], LAYOUTS[3], torch.uint8, torch.bfloat16, is_moved=True, is_adjusted=True)
    call = on_device(made.call)
    results = torch.library.opcheck(torch.ops.ats_stream.gather_patches.default, tuple(call))
    assert set(results.values()) == {"SUCCESS"}
    inputs = [tensor.to(DEVICE) for tensor in CASES[0].inputs()]
    results = torch.library.opcheck(torch.ops.ats_stream.gather_crops.default, (*inputs, torch.float32))
    assert set(results.values()) == {"SUCCESS"}
