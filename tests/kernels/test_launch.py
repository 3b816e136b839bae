"""The CUDA half of the gather on a machine without a GPU: a recording CuPy whose kernels g++ has built."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import cuda_on_cpu
import pytest
import torch
from cuda_on_cpu import CpuModule
from gather_cases import CASES, Case

from ats_stream.errors import InputError
from ats_stream.kernels import gather, gather_crops, gather_launch, launch
from ats_stream.kernels.gather_calls import CropsCall
from ats_stream.kernels.launch import require_cupy, source_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

STREAM = 0x5EED  # the address of torch's current stream, as the fake tells it


class Recorder:
    """Stands for CuPy and for torch's streams; writes down what happens, in order."""

    __version__ = "14.2.0"

    def __init__(self) -> None:
        self.events: list[object] = []
        self.cuda = SimpleNamespace(Device=self.device, Stream=SimpleNamespace(from_external=self.stream))

    def device(self, index: int) -> Scope:
        return Scope(self.events, f"device {index}")

    def stream(self, handle: Any) -> Scope:
        version, address = handle.__cuda_stream__()
        return Scope(self.events, f"stream {version} {address:#x}")

    def RawModule(  # noqa: N802  CuPy's name
        self, *, code: str, options: tuple[str, ...], name_expressions: tuple[str, ...]
    ) -> RecordedModule:
        self.events.append(("compile", options, name_expressions))
        assert code == source_text("gather.cu")
        return RecordedModule(self.events, code, name_expressions)


class Scope:
    """A context that records its two ends."""

    def __init__(self, events: list[object], name: str) -> None:
        self._events, self._name = events, name

    def __enter__(self) -> None:
        self._events.append(f"enter {self._name}")

    def __exit__(self, *_: object) -> None:
        self._events.append(f"leave {self._name}")


class RecordedModule:
    """A cupy.RawModule whose functions run on the CPU."""

    def __init__(self, events: list[object], code: str, name_expressions: tuple[str, ...]) -> None:
        self._events = events
        self._module = CpuModule(cuda_on_cpu.build("gather.cu", code, name_expressions), name_expressions)

    def get_function(self, expression: str) -> Any:
        def function(grid: tuple[int, int], block: tuple[int], args: Sequence[Any]) -> None:
            self._events.append("launch")
            self._module.launch(expression, grid, block, args)

        return function


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    if not cuda_on_cpu.has_compiler():
        pytest.skip("g++ is not installed")
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "cupy", recorder)  # type: ignore[arg-type]  # stands for the module
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM + device.index)
    )
    launch._kernel.cache_clear()
    yield recorder
    launch._kernel.cache_clear()


def launch_as_on_device(case: Case, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The output through the plan and the launcher of the CUDA path, and that of the CPU path."""
    inputs = case.inputs()
    out_NCS = torch.empty(case.shape, dtype=case.output)
    plan = gather_launch.plan_crops(CropsCall(*inputs, case.output), out_NCS)
    launch.launch_on_current_stream(plan, torch.device("cuda", index))
    return out_NCS, gather_crops(*inputs, case.output)


def test_a_launch_compiles_once_per_device_and_runs_on_the_current_stream(recorder: Recorder) -> None:
    case = Case(pixels=torch.uint8, output=torch.bfloat16, shape=(2, 3, 9, 9), start=0)
    for index in (1, 1, 0):
        got, expected = launch_as_on_device(case, index)
        assert torch.equal(got, expected)

    compiled = ("compile", ("-std=c++17",), ("gather_crops<unsigned char, bfloat16>",))

    def one_call(index: int, *, first: bool) -> list[object]:
        stream = f"stream 0 {STREAM + index:#x}"
        inside = [f"enter {stream}", "launch", f"leave {stream}"]
        return [f"enter device {index}", *([compiled] if first else []), *inside, f"leave device {index}"]

    assert recorder.events == [*one_call(1, first=True), *one_call(1, first=False), *one_call(0, first=True)]


def test_the_cuda_kernel_of_the_operator_fills_its_output(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the function registered for CUDA, given host tensors: only the device that it names is changed
    device = torch.device("cuda", 0)
    monkeypatch.setattr(
        gather, "launch_on_current_stream", lambda plan, _: launch.launch_on_current_stream(plan, device)
    )
    for case in (CASES[0], CASES[len(CASES) // 2], CASES[-1]):
        inputs = case.inputs()
        got = gather._gather_crops_cuda(*inputs, case.output)
        assert torch.equal(got, gather_crops(*inputs, case.output))
    assert recorder.events.count("launch") == 3


def test_the_cuda_kernel_refuses_before_it_launches(recorder: Recorder) -> None:
    crops_NCS = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    constant = torch.ones(3)
    with pytest.raises(InputError, match="contiguous"):
        gather._gather_crops_cuda(crops_NCS[..., 1:], constant, constant, torch.float32)
    with pytest.raises(InputError, match="channels"):
        gather._gather_crops_cuda(crops_NCS, constant[:2], constant, torch.float32)
    assert recorder.events == []


# ---- without CuPy ----


def test_without_cupy_the_error_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # an import of it then fails
    with pytest.raises(
        InputError, match=r"cuda:1 needs CuPy.*ats-stream\[cuda12\].*ats-stream\[cuda13\]"
    ) as caught:
        require_cupy(torch.device("cuda", 1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("version", "accepted"), [("13.6.0", False), ("14.1.0", False), ("14.2.0", True), ("15.0.0a1", True)]
)
def test_an_old_cupy_is_refused(monkeypatch: pytest.MonkeyPatch, version: str, accepted: bool) -> None:
    found = SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "cupy", found)  # type: ignore[arg-type]  # stands for the module
    if accepted:
        assert require_cupy(torch.device("cuda", 0)) is found
    else:
        with pytest.raises(InputError, match=rf"CuPy {version} was found, 14.2 or later is needed.*cuda12"):
            require_cupy(torch.device("cuda", 0))
