"""The race on a CUDA device: the bits of the CPU. Needs torch, CuPy and a device."""

from __future__ import annotations

import itertools
from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from ats_stream.kernels.launch import require_cupy
from ats_stream.kernels.sample import MAX_KEPT, Arrivals, is_handled, sample_race
from ats_stream.kernels.sample_cpu import compiled_path
from ats_stream.sampling import SCHEMES, draw

if TYPE_CHECKING:
    from collections.abc import Sequence

DEVICE = torch.device("cuda", 0)
NEVER = float("-inf")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SMALL = ("test_small_maps_of_every_dtype",)


def normal(seed: int, *shape: int, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(*shape, generator=generator, dtype=torch.float64)


def race(logits_BM: torch.Tensor, num_kept: int, **options: object) -> Arrivals:
    seed, streams_B = torch.tensor(-3), torch.arange(len(logits_BM)) + (1 << 40)
    device = logits_BM.device
    moved = {name: one.to(device) if isinstance(one, torch.Tensor) else one for name, one in options.items()}
    return sample_race(logits_BM, num_kept, seed=seed.to(device), stream_ids_B=streams_B.to(device), **moved)  # type: ignore[arg-type]


def check(logits_BM: torch.Tensor, num_kept: int, **options: object) -> None:
    expected, got = race(logits_BM, num_kept, **options), race(logits_BM.cuda(), num_kept, **options)
    for field in fields(Arrivals):
        one, other = getattr(got, field.name).cpu() + 0, getattr(expected, field.name) + 0  # -0 is 0
        assert torch.equal(one.view(torch.int64), other.view(torch.int64)), field.name


def check_sizes(sizes: Sequence[int], numbers_kept: Sequence[int]) -> None:
    for dtype, num_positions in itertools.product(DTYPES, sizes):
        logits_BM = normal(num_positions, 3, num_positions).to(dtype)
        logits_BM[1, 1:] = NEVER
        for num_kept, by_logit in itertools.product(numbers_kept, (False, True)):
            check(logits_BM, num_kept, by_logit=by_logit)


def test_small_maps_of_every_dtype() -> None:
    # parts, full lists, sorts on the way and their merging, at a size for compute-sanitizer
    check_sizes([5, 1023, 20_001], [1, 65])


def test_every_dtype_and_size() -> None:
    check_sizes([1, 4099, 100_001], [1, 65, MAX_KEPT])


def test_near_and_far_logits() -> None:
    for spread in (0.0, 1.0, 50.0, 1e4, 1e9, 1e30):
        check(normal(1, 2, 50_000, spread=spread), 33)
        check(normal(1, 2, 50_000, spread=spread).float(), 33)
        check(normal(1, 2, 50_000, spread=spread).sort(dim=1).values.float(), 33)


def test_names_and_layouts() -> None:
    whole = normal(2, 6, 9001).float()
    shuffled_M = torch.randperm(1 << 20, generator=torch.Generator().manual_seed(0))[:9001]
    check(whole, 9, global_index=shuffled_M + (1 << 33))
    for logits_BM in (whole[::2, 100:6500], whole[:, ::3], whole[:1].expand(4, -1), whole[1:, 1:]):
        check(logits_BM, 5)


def test_sixteen_million_logits() -> None:
    check(normal(0, 16, 1_000_000).float(), 65)


def test_a_thousand_million_logits() -> None:
    # drawn on the device: the CPU reads the same bits
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits_BM = torch.randn(1, 10**9, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    got, expected = race(logits_BM, 65), race(logits_BM.cpu(), 65)
    assert torch.equal(got.index.cpu(), expected.index)
    assert torch.equal(got.levels.cpu(), expected.levels)
    assert int(got.index.max()) > 1 << 28


def test_nothing_is_allocated_by_cupy() -> None:
    cupy = require_cupy(DEVICE)
    check(normal(4, 2, 50_000).float(), 9)
    assert cupy.get_default_memory_pool().total_bytes() == 0
    assert cupy.get_default_pinned_memory_pool().n_free_blocks() == 0


def test_a_draw_is_that_of_the_cpu_and_of_torch_on_the_device() -> None:
    for scheme in SCHEMES:
        check_draw(scheme)


def check_draw(scheme: str) -> None:
    logits_BM = normal(3, 4, 128 * 96).float()
    logits_BM[1, 500:] = NEVER
    assert is_handled(logits_BM.cuda(), 17)
    on_cpu = draw(logits_BM, 16, scheme=scheme, seed=7, map_shape=(128, 96))
    for by_torch in (False, True):
        if by_torch:
            with compiled_path(False):
                found = draw(logits_BM.cuda(), 16, scheme=scheme, seed=7, map_shape=(128, 96))
        else:
            found = draw(logits_BM.cuda(), 16, scheme=scheme, seed=7, map_shape=(128, 96))
        for name in ("index", "log_prob", "num_drawn", "log_normaliser", "keys", "threshold"):
            one, other = getattr(on_cpu, name), getattr(found, name)
            assert one is other is None or torch.equal(one, other.cpu()), name
        assert torch.allclose(on_cpu.weight, found.weight.cpu(), rtol=1e-6)


def test_a_race_runs_on_the_current_stream_and_in_a_graph() -> None:
    logits_BM = normal(4, 2, 50_000).float().cuda()
    expected = race(logits_BM, 9)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        seed, streams_B = torch.tensor(-3).cuda(), (torch.arange(2) + (1 << 40)).cuda()
        sample_race(logits_BM, 9, seed=seed, stream_ids_B=streams_B)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        found = sample_race(logits_BM, 9, seed=seed, stream_ids_B=streams_B)
    graph.replay()
    for field in fields(Arrivals):
        assert torch.equal(getattr(found, field.name), getattr(expected, field.name)), field.name
