"""Every example in a docstring of the package gives what it says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import ats_stream

ROOT = Path(ats_stream.__file__).parent
WITH_EXAMPLES = sorted(
    ".".join(("ats_stream", *path.relative_to(ROOT).with_suffix("").parts))
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name: str) -> None:
    module = importlib.import_module(name.removesuffix(".__init__"))
    assert any(found.examples for found in doctest.DocTestFinder().find(module))  # none may hide from doctest
    assert doctest.testmod(module).failed == 0
