"""Weights from local files: by name, whole, or one message about all that does not fit."""

from __future__ import annotations

import sys
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from ats_stream.errors import CheckpointError, InputError
from ats_stream.models import load_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def network(width: int = 4) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Linear(width, 2))


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "model": lambda state: {"model": state, "optimiser": {}},
    "parallel": lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
    "no counters": lambda state: OrderedDict((n, v) for n, v in state.items() if "num_batches" not in n),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_state_dicts_are_found_however_they_are_wrapped(tmp_path: Path, wrapping: str, legacy: bool) -> None:
    source, target = network(), network()
    for value in source.state_dict().values():
        value.add_(1)
    if wrapping == "no counters":
        source[1].num_batches_tracked.zero_()
    path = tmp_path / "weights.pth"
    torch.save(WRAPPINGS[wrapping](source.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    assert not same(source, target)
    load_weights(target, path)
    assert same(source, target)


def test_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    source, target = network(), network()
    for value in source.state_dict().values():
        value.add_(1)
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    load_weights(target, str(path))
    assert same(source, target)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: not a checkpoint, or damaged: ."):
        load_weights(target, path)
    with pytest.raises(CheckpointError, match=r"none\.safetensors: no such checkpoint"):
        load_weights(target, tmp_path / "none.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not there
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        load_weights(target, path)


def test_all_that_does_not_fit_is_told_at_once_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = network().state_dict()
    del state["1.bias"], state["2.bias"]
    state |= {f"fc.{number}": torch.zeros(1) for number in range(7)}
    state["0.weight"] = torch.zeros(4, 1, 5, 5)
    state["0.bias"] = state["0.bias"].half()
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    target = network()
    with pytest.raises(InputError) as caught:
        load_weights(target, path)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value) == (
        f"{path}: does not fit Sequential: 2 missing: 1.bias, 2.bias; "
        "7 unexpected: fc.0, fc.1, fc.2, fc.3, fc.4, ...; "
        "2 of another size or dtype: 0.weight ((4, 1, 5, 5) float32, expected (4, 1, 3, 3) float32), "
        "0.bias ((4,) float16, expected (4,) float32)"
    )
    assert same(target, network())
    with pytest.raises(CheckpointError, match=r"Sequential: 2 missing: 1\.bias, 2\.bias; 2 of another size"):
        load_weights(target, path, ignore=("fc.",))


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code from a checkpoint was run",)


@pytest.mark.parametrize(
    "content", ["text", "damaged", "marked", "code", "list", "number", "empty", "absent", "folder"]
)
def test_what_is_no_checkpoint_is_refused(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pth"
    if content == "text":
        path.write_text("weights\n")
    elif content == "damaged":
        torch.save(network().state_dict(), path)
        whole = bytearray(path.read_bytes())
        whole[whole.index(network().state_dict()["2.weight"].numpy().tobytes())] ^= 1
        path.write_bytes(whole)
    elif content == "marked":  # as a folder, which torch would not read
        torch.save(network().state_dict(), path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.infolist()[1].external_attr = 0x10
            archive._didModify = True
    elif content == "folder":
        path.mkdir()
    elif content != "absent":
        saved: Any = {"code": Code(), "list": [torch.zeros(1)], "number": {"a": 1}, "empty": {}}[content]
        torch.save(saved, path)
    target = network()
    with pytest.raises(CheckpointError, match=r"weights\.pth: ") as caught:
        load_weights(target, path)
    assert "\n" not in str(caught.value)
    assert same(target, network())
    assert capsys.readouterr().out == ""
