"""The race as an operator: its contract, what it refuses, how it is planned and launched, when it is used."""

from __future__ import annotations

import logging
import sys
from dataclasses import fields
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import cuda_on_cpu
import pytest
import torch
from race_on_cpu import EXPRESSIONS, race_module

from ats_stream.errors import InputError
from ats_stream.kernels import sample
from ats_stream.kernels.sample import MAX_KEPT, Arrivals, is_handled, plan_race, sample_race
from ats_stream.kernels.sample_cpu import compiled_path

if TYPE_CHECKING:
    from ats_stream.kernels.launch import Launch


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def arguments(logits_BM: torch.Tensor, num_kept: int = 4, **changed: Any) -> dict[str, Any]:
    given = {"seed": torch.tensor(5), "stream_ids_B": torch.arange(len(logits_BM)), "global_index": None}
    return {"logits_BM": logits_BM, "num_kept": num_kept, "by_logit": False, **given, **changed}


@pytest.mark.parametrize("global_index", [None, torch.arange(50) * 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_operator_keeps_to_its_contract(dtype: torch.dtype, global_index: torch.Tensor | None) -> None:
    given = (logits(3, 50).to(dtype), 4, torch.tensor(5), torch.arange(3), False, global_index)
    torch.library.opcheck(torch.ops.ats_stream.sample_race.default, given)


BAD = {
    "integers": (arguments(torch.zeros(2, 9, dtype=torch.int64)), "got torch.int64"),
    "one axis": (arguments(torch.zeros(9)), r"\(B, M\).*\(9,\)"),
    "no position": (arguments(torch.zeros(2, 0)), r"got torch.float32 \(2, 0\)"),
    "nothing kept": (arguments(logits(2, 9), 0), "at least 1, got 0"),
    "a list of seeds": (arguments(logits(2, 9), seed=torch.zeros(2, dtype=torch.int64)), "seed must be"),
    "a float seed": (arguments(logits(2, 9), seed=torch.tensor(1.0)), "seed must be int64"),
    "streams of other rows": (arguments(logits(2, 9), stream_ids_B=torch.arange(3)), r"\(2,\), got.*\(3,\)"),
    "short streams": (arguments(logits(2, 9), stream_ids_B=torch.arange(2).int()), "got torch.int32"),
    "names of another map": (arguments(logits(2, 9), global_index=torch.arange(8)), r"\(9,\) or \(2, 9\)"),
    "a list": (
        {**arguments(logits(2, 9)), "logits_BM": [[0.0]]},
        "logits_BM is a list, expected a torch.Tensor",
    ),
    "an array": ({**arguments(logits(2, 9)), "logits_BM": logits(2, 9).numpy()}, "logits_BM is a ndarray"),
    "sparse": ({**arguments(logits(2, 9)), "logits_BM": logits(2, 9).to_sparse()}, "layout torch.sparse_coo"),
    "part of an arrival": (arguments(logits(2, 9), 1.5), "num_kept is 1.5, expected a whole number"),  # type: ignore[arg-type]  # the test
    "a number as seed": (arguments(logits(2, 9), seed=5), "seed is a int, expected a torch.Tensor"),
    "streams in a list": (arguments(logits(2, 9), stream_ids_B=[0, 1]), "stream_ids_B is a list"),
    "names in a list": (arguments(logits(2, 9), global_index=[0] * 9), "global_index is a list"),
    "elsewhere": (arguments(logits(2, 9), seed=torch.zeros((), dtype=torch.int64, device="meta")), "on meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name: str) -> None:
    given, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        sample_race(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_views_that_are_not_contiguous_are_read_as_they_are(dtype: torch.dtype) -> None:
    whole = logits(6, 90).to(dtype)
    for logits_BM in (whole[::2, 3:70], whole[:, ::3], whole.t(), whole[:1].expand(3, -1)):
        got, expected = (sample_race(**arguments(one)) for one in (logits_BM, logits_BM.contiguous()))
        for field in fields(Arrivals):
            assert torch.equal(getattr(got, field.name), getattr(expected, field.name)), field.name


def test_the_cuda_path_refuses_before_it_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    # meta tensors stand for the device: the same checks, and nothing could be launched
    class OnCuda:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.device, self._tensor = torch.device("cuda", 0), tensor

        def __getattr__(self, name: str) -> Any:
            return getattr(self._tensor, name)

    def check(shape: tuple[int, int], num_kept: int) -> None:
        seed, streams_B = (
            OnCuda(torch.zeros(one, dtype=torch.int64, device="meta")) for one in ((), shape[:1])
        )
        sample._check(OnCuda(torch.zeros(shape, device="meta")), num_kept, seed, streams_B, None)  # type: ignore[arg-type]

    check((2, (1 << 31) - 1), MAX_KEPT)
    with pytest.raises(InputError, match=f"at most {MAX_KEPT} on CUDA, got {MAX_KEPT + 1}"):
        check((2, 5000), MAX_KEPT + 1)
    with pytest.raises(InputError, match="more than 2147483647 positions"):
        check((2, 1 << 31), 5)


# ---- the plan ----


@pytest.mark.parametrize("num_rows", [1, 16, 5000])
@pytest.mark.parametrize("num_positions", [1, 31, 4096, 70_000, 10**9])
@pytest.mark.parametrize("num_kept", [1, 65, MAX_KEPT])
def test_plans_keep_to_the_limits_of_the_kernel(num_rows: int, num_positions: int, num_kept: int) -> None:
    plan = plan_race(num_rows, num_positions, num_kept, num_blocks=396)
    assert plan.num_parts >= 1
    assert plan.num_parts == 1 or num_rows * plan.num_parts <= 396
    assert plan.block % 32 == 0
    assert 32 <= plan.block <= 256
    assert num_kept < plan.room <= 2048
    tile = 4 * plan.block
    assert (plan.num_parts - 1) * tile < num_positions  # every part has work
    assert num_positions + plan.num_parts * tile < 1 << 32  # as the kernel counts
    assert plan.num_parts * num_kept < 1 << 32


def test_plans_fill_a_device() -> None:
    assert plan_race(1, 10**6, 65, num_blocks=396).num_parts > 200
    assert plan_race(16, 10**6, 65, num_blocks=396).num_parts == 396 // 16
    assert plan_race(400, 10**6, 65, num_blocks=396).num_parts == 1


# ---- the CUDA path, its kernels built by g++ ----


@pytest.mark.skipif(not cuda_on_cpu.has_compiler(), reason="g++ is not installed")
def test_the_cuda_path_launches_both_kernels_and_fills_its_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    def launch(plan: Launch, device: torch.device) -> None:
        assert plan.source == "sample.cu"
        assert plan.expression in EXPRESSIONS
        launched.append(plan.expression)
        race_module().launch(plan.expression, plan.grid, plan.block, plan.args)

    properties = SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(sample, "launch_on_current_stream", launch)
    race_module().configure()
    for global_index in (None, torch.arange(20_000).flip(0)):
        given = arguments(logits(3, 20_000), 9, global_index=global_index).values()
        logits_BM, num_kept, by_logit, seed, streams_B, names = given
        got = sample._sample_race_cuda(logits_BM, num_kept, seed, streams_B, by_logit, names)
        expected = sample._sample_race(logits_BM, num_kept, seed, streams_B, by_logit, names)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert launched == ["sample_race<float>", "sample_merge"] * 2


# ---- when it is used ----


def on_cuda(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
    return SimpleNamespace(device=torch.device("cuda", 1), shape=shape, dtype=dtype)


@pytest.fixture
def fresh_look_for_cupy() -> Any:
    sample._has_cupy.cache_clear()
    yield
    sample._has_cupy.cache_clear()


@pytest.mark.usefixtures("fresh_look_for_cupy")
def test_cuda_tensors_are_handled_where_cupy_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(__version__="14.2.0"))  # type: ignore[arg-type]
    assert is_handled(on_cuda(2, 10), 5)
    assert is_handled(on_cuda(2, (1 << 31) - 1), MAX_KEPT)
    assert not is_handled(on_cuda(2, 1 << 31), 5)
    assert not is_handled(on_cuda(2, 5000), MAX_KEPT + 1)
    assert not is_handled(on_cuda(2, 10, dtype=torch.float8_e5m2), 5)
    with compiled_path(False):
        assert not is_handled(on_cuda(2, 10), 5)


@pytest.mark.usefixtures("fresh_look_for_cupy")
def test_without_cupy_draws_say_once_that_they_go_through_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # an import of it then fails
    with caplog.at_level(logging.WARNING):
        assert not is_handled(on_cuda(2, 10), 5)
        assert not is_handled(on_cuda(2, 10), 5)
    (record,) = caplog.records
    assert "draws on CUDA go through torch" in record.message
    assert "ats-stream[cuda12]" in record.message


def test_arrivals_name_their_fields() -> None:
    found = sample_race(**arguments(logits(2, 50)))
    assert isinstance(found, Arrivals)
    assert torch.equal(found.largest, logits(2, 50).amax(dim=1).double())
    assert torch.allclose(found.logs[0], logits(2, 50).double().logsumexp(dim=1))
