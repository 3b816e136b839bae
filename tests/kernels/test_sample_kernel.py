"""sample.cu built by g++ and run on host memory: bit for bit what the operator and `draw` give on the CPU.

Not compared: R (Draw.weight) on a real device, whose exponentials may differ in the last place.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import cuda_on_cpu
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from race_on_cpu import SMALL, race_by_kernel

from ats_stream.errors import InputError
from ats_stream.kernels import arithmetic
from ats_stream.kernels.launch import source_text
from ats_stream.kernels.sample import MAX_KEPT, Arrivals, RacePlan, plan_race, sample_race
from ats_stream.kernels.sample_cpu import compiled_path
from ats_stream.sampling import SCHEMES, draw, race

NEVER = float("-inf")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
RACES = [scheme for scheme in SCHEMES if scheme != "balanced"]

pytestmark = pytest.mark.skipif(not cuda_on_cpu.has_compiler(), reason="g++ is not installed")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    whole = {8: torch.int64, 4: torch.int32}[tensor.element_size()]
    return tensor.contiguous().view(whole)


def normal(seed: int, *shape: int, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(*shape, generator=generator, dtype=torch.float64)


def check(logits_BM: torch.Tensor, num_kept: int, *, plan: RacePlan = SMALL, **options: Any) -> Arrivals:
    """Hold the kernel to the operator's CPU path in every field."""
    got = race_by_kernel(logits_BM, num_kept, plan=plan, **options)
    seed = torch.tensor(options.pop("seed", 0))
    streams_B = options.pop("stream_ids_B", torch.arange(len(logits_BM)))
    options.pop("thread_order", None)
    expected = sample_race(logits_BM, num_kept, seed=seed, stream_ids_B=streams_B, **options)
    for field in fields(Arrivals):
        one, other = getattr(got, field.name), getattr(expected, field.name)
        if field.name in ("peak", "largest"):
            # which of two zeros is the largest, and which NaN a NaN is, is left open
            one, other = (torch.where(value.isnan(), torch.nan, value + 0.0) for value in (one, other))
        assert torch.equal(bits(one), bits(other)), field.name
    return got


def test_the_source_is_ascii_and_includes_nothing() -> None:
    assert "#include" not in source_text("sample.cu")


@pytest.mark.parametrize(
    "name", ["PHILOX_MULTIPLIERS", "PHILOX_WEYL", "LOG2_E", "LN2_HIGH", "LN2_LOW", "REACH", "FAR"]
)
def test_the_source_spells_the_constants_of_arithmetic(name: str) -> None:
    value = getattr(arithmetic, name)
    for one in value if isinstance(value, tuple) else (value,):
        assert (f"0x{one:X}u" if isinstance(one, int) else repr(one)) in source_text("sample.cu")


# ---- the operator ----


@pytest.mark.parametrize("num_positions", [1, 2, 3, 5, 255, 256, 257, 1023, 4099])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_size(dtype: torch.dtype, num_positions: int) -> None:
    for num_rows, num_kept in ((1, 1), (3, 11), (2, 50)):
        logits_BM = normal(num_positions, num_rows, num_positions).to(dtype)
        streams_B = torch.tensor([-7, 1 << 40, 3])[:num_rows]
        for by_logit in (False, True):
            check(logits_BM, num_kept, seed=-5, stream_ids_B=streams_B, by_logit=by_logit)


@pytest.mark.parametrize("block", [32, 96, 256])
@pytest.mark.parametrize("num_parts", [1, 2, 7])
def test_neither_parts_nor_blocks_nor_room_nor_the_order_of_threads_show(num_parts: int, block: int) -> None:
    logits_BM = normal(1, 2, 1501).float()
    for room, thread_order in ((12, 0), (64, 1), (2048, 2)):  # 11 are kept
        plan = RacePlan(num_parts=num_parts, block=block, room=room)
        check(logits_BM, 11, plan=plan, thread_order=thread_order)


def test_as_many_kept_as_there_is_room_for() -> None:
    logits_BM = normal(2, 1, 5000).float()
    check(logits_BM, MAX_KEPT, plan=plan_race(1, 5000, MAX_KEPT, num_blocks=3))
    check(logits_BM[:, :700], MAX_KEPT, plan=RacePlan(num_parts=2, block=64, room=2048))


@pytest.mark.parametrize("share", [0.0, 0.002, 0.2, 0.7])
def test_impossible_positions(share: float) -> None:
    logits_BM = normal(2, 4, 4001).float()
    logits_BM[torch.rand(4, 4001, generator=torch.Generator().manual_seed(3)) >= share] = NEVER
    for by_logit in (False, True):
        found = check(logits_BM, 12, by_logit=by_logit)  # a row may have none at all
        is_there_BK = found.index != arithmetic.PADDING_INDEX
        assert bool((found.logit > NEVER).eq(is_there_BK).all())
        assert is_there_BK.sum(dim=1).tolist() == (logits_BM > NEVER).sum(dim=1).clamp(max=12).tolist()


EXTREME = {
    "equal": torch.zeros(2, 3000),
    "subnormal": normal(5, 2, 3000, spread=1e-310),
    "subnormal float32": normal(5, 2, 3000, spread=1e-41).float(),
    "subnormal float16": normal(5, 2, 3000, spread=1e-6).half(),
    "signed zeros": torch.tensor([0.0, -0.0]).repeat(2, 1500),
    "wide": normal(6, 2, 3000, spread=1e4),
    "wider": normal(6, 2, 3000, spread=1e7).float(),
    "around 2^30": normal(6, 2, 3000, spread=50.0) - 2.0**30,
    "around 2^30, float32": (normal(6, 2, 3000, spread=500.0) + 2.0**30 - 700).float(),
    "around 2^30 + 120": normal(6, 2, 3000, spread=50.0) - 2.0**30 + 120,
    "around -2^30": normal(6, 2, 3000, spread=50.0) + 2.0**30,
    "far apart": normal(6, 2, 3000, spread=1e30).float(),
    "the ends of float64": normal(6, 2, 3000).sign() * 1.7e308,
    "the ends of float32": normal(6, 2, 3000).sign().float() * 3.4e38,
    "the ends of float16": (normal(6, 2, 3000).half() * 1e4).clamp(-65504, 65504),
    "a finite mask": torch.where(normal(6, 2, 3000) > 7, 1.0, torch.finfo(torch.float32).min),
    "far below and near": torch.where(normal(6, 2, 3000) > 3, 0.0, -3e9).float(),
    "rising": torch.linspace(-3e4, 3e4, 3000).expand(2, -1),
    "rising slowly": torch.linspace(0, 200, 3000).expand(2, -1),
    "falling": torch.linspace(3e4, -3e4, 3000).expand(2, -1),
    "one winner at the end": torch.cat([torch.zeros(2, 2999), torch.full((2, 1), 500.0)], dim=1),
    "one winner at the start": torch.cat([torch.full((2, 1), 500.0), torch.zeros(2, 2999)], dim=1),
}


@pytest.mark.parametrize("name", EXTREME)
@pytest.mark.parametrize("by_logit", [False, True], ids=["race", "by logit"])
def test_extreme_logits(name: str, by_logit: bool) -> None:
    for num_kept in (1, 21):
        found = check(EXTREME[name], num_kept, by_logit=by_logit)
        assert not bool(found.logs.isnan().any())


def test_what_is_no_number_never_arrives_and_shows() -> None:
    logits_BM = normal(3, 4, 900).float()
    logits_BM[0, 5] = float("nan")
    logits_BM[1, [7, 8]] = torch.tensor([float("inf"), NEVER])
    logits_BM[2] = NEVER
    found = check(logits_BM, 4)
    assert found.largest.isnan().tolist() == [True, False, False, False]
    assert found.largest[1:3].tolist() == [float("inf"), NEVER]
    assert bool(found.logit[[0, 1, 3]].isfinite().all())


def test_names() -> None:
    logits_BM = normal(4, 2, 1203).float()
    shuffled_M = torch.randperm(1 << 20, generator=torch.Generator().manual_seed(0))[:1203]
    for index in (
        torch.arange(1203) + 4099,
        torch.arange(1203).flip(0),
        shuffled_M + (1 << 33),
        torch.stack([shuffled_M, shuffled_M + 1], dim=1).T,
    ):
        check(logits_BM, 9, global_index=index)
        check(torch.zeros(2, 1203), 9, global_index=index, by_logit=True)  # all tie: the lowest names win


def test_layouts() -> None:
    whole = normal(7, 6, 2000).float()
    for logits_BM in (
        whole[::2, 100:1500],
        whole[:, ::3],
        whole[:1].expand(4, -1),
        whole[:, :200].T[:6],
        whole[1:, 1:],  # rows that begin at odd addresses
        whole.half()[1:, 3:],
    ):
        check(logits_BM, 5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 900)),
    num_kept=st.integers(1, 40),
    num_parts=st.integers(1, 9),
    warps=st.integers(1, 3),
    spare=st.integers(1, 100),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 0.5, 4.0, 60.0]),
    share=st.sampled_from([0.0, 0.05, 0.9, 1.0]),
    seed=st.integers(-(1 << 63), (1 << 63) - 1),
)
def test_any_shape(
    shape: tuple[int, int],
    num_kept: int,
    num_parts: int,
    warps: int,
    spare: int,
    dtype: torch.dtype,
    spread: float,
    share: float,
    seed: int,
) -> None:
    logits_BM = normal(seed % 1000, *shape, spread=spread).to(dtype)
    logits_BM[torch.rand(shape, generator=torch.Generator().manual_seed(seed % 1000)) > share] = NEVER
    plan = RacePlan(num_parts=num_parts, block=32 * warps, room=num_kept + spare)
    check(logits_BM, num_kept, plan=plan, seed=seed, thread_order=seed % 3)


@pytest.mark.slow
def test_a_million_logits_as_planned_for_a_device() -> None:
    logits_BM = normal(0, 1, 1_000_000).float()
    check(logits_BM, 65, plan=plan_race(16, 1_000_000, 65, num_blocks=396))


# ---- draw ----


@pytest.fixture
def kernel_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `draw` find the kernel in the place of the operator, whatever the size."""

    def by_kernel(logits_BM: torch.Tensor, num_kept: int, *, seed: torch.Tensor, **options: Any) -> Arrivals:
        return race_by_kernel(logits_BM, num_kept, plan=SMALL, seed=int(seed), **options)

    monkeypatch.setattr(race, "is_handled", lambda logits_BM, num_kept: not on_torch)
    monkeypatch.setattr(race, "sample_race", by_kernel)


on_torch = False
FIELDS = ("index", "log_prob", "weight", "num_drawn", "log_normaliser", "keys", "threshold")


def both(monkeypatch: pytest.MonkeyPatch, logits_BM: torch.Tensor, num_samples: int, **options: Any) -> None:
    by_kernel = draw(logits_BM, num_samples, **options)
    monkeypatch.setitem(globals(), "on_torch", True)
    with compiled_path(False):
        plain = draw(logits_BM, num_samples, **options)
    monkeypatch.setitem(globals(), "on_torch", False)
    for name in FIELDS:
        one, other = getattr(by_kernel, name), getattr(plain, name)
        assert one is other is None or torch.equal(bits(one), bits(other)), name
    if by_kernel.race is not None:
        assert plain.race is not None
        for name in ("key", "index", "logit", "log_rest", "log_total"):
            assert torch.equal(bits(getattr(by_kernel.race, name)), bits(getattr(plain.race, name))), name


@pytest.mark.usefixtures("kernel_draws")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_draws_are_those_of_torch_in_every_field(
    monkeypatch: pytest.MonkeyPatch, scheme: str, dtype: torch.dtype
) -> None:
    logits_BM = normal(9, 3, 48 * 30).to(dtype)
    logits_BM[1, 7:] = NEVER
    for num_samples in (1, 10):
        both(monkeypatch, logits_BM, num_samples, scheme=scheme, seed=(1 << 64) - 9, map_shape=(48, 30))


@pytest.mark.usefixtures("kernel_draws")
@pytest.mark.parametrize("scheme", RACES)
def test_more_samples_than_can_be_drawn(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    both(monkeypatch, normal(9, 2, 5), 7, scheme=scheme, global_index=torch.arange(5) * 100)


@pytest.mark.usefixtures("kernel_draws")
def test_draws_refuse_what_cannot_be_drawn_from() -> None:
    for bad, message in ((float("nan"), "row 1 contains nan"), (float("inf"), "row 1 contains inf")):
        logits_BM = torch.zeros(2, 50)
        logits_BM[1, 20] = bad
        with pytest.raises(InputError, match=message):
            draw(logits_BM, 3)
    with pytest.raises(InputError, match="row 0 has no drawable position"):
        draw(torch.full((2, 50), NEVER), 3)
