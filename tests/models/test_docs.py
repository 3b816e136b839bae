"""The examples of docs/models.md run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from types import ModuleType

    import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def test_the_examples_of_the_page_run(
    timm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == PAGE.read_text().count("```") / 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    assert names["features"].shape == (1, 192)
    assert bool(names["loss"].isfinite())
