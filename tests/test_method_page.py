"""The examples of docs/method.md, run in the order of the page, give what it says."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parent.parent / "docs" / "method.md"


def test_examples_of_the_page() -> None:
    text = PAGE.read_text()
    names: dict[str, object] = {}
    num_examples = num_programs = 0
    torch.manual_seed(0)
    for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        block, line = found[1], text.count("\n", 0, found.start()) + 1
        if block.startswith(">>> "):
            test = doctest.DocTestParser().get_doctest(block, names, PAGE.name, str(PAGE), line)
            runner = doctest.DocTestRunner()
            runner.run(test, clear_globs=False)
            names.update(test.globs)
            assert runner.summarize(verbose=False).failed == 0
            num_examples += len(test.examples)
        else:
            exec(compile("\n" * line + block, str(PAGE), "exec"), names)
            num_programs += 1
    assert num_examples > 15
    assert num_programs == 1


def test_pictures_and_files_of_the_page_exist() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", PAGE.read_text())
    assert targets
    for target in targets:
        assert (PAGE.parent / target).is_file(), target
