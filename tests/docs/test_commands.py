"""Every command line in the documentation is one that the program takes."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ats_stream import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_START = re.compile(r"^\s*(?:ats-stream|(?:ray job submit .*-- )?python jobs/(\w+)\.py) ")


def commands() -> Iterator[tuple[str, list[str]]]:
    """Page, and the words behind ``ats-stream``, of each indented line that runs it."""
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", page.read_text())  # lines that go on
        for line in re.findall(r"^    +(\S.*)$", text, re.MULTILINE):
            if (found := _START.match(line)) and "COMMAND" not in line:
                words = shlex.split(line[found.end() :], comments=True)
                words = words[: words.index(">")] if ">" in words else words
                yield page.name, [found[1], *words] if found[1] else words


FOUND = list(commands())


def test_there_are_commands_to_look_at() -> None:
    names = {words[0] for _, words in FOUND}
    assert {"preprocess", "verify", "info", "plan", "train", "predict", "demo", "doctor"} <= names


@pytest.mark.parametrize(
    ("page", "words"), FOUND, ids=[f"{page}: {' '.join(words)}" for page, words in FOUND]
)
def test_a_documented_command_is_taken(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "stop":  # a script of its own, without arguments
        assert words == ["stop"]
        return
    if not words[0].startswith("-"):
        module = importlib.import_module(f"ats_stream.commands.{words[0]}")
        monkeypatch.setattr(module, "run", lambda arguments: {})
    try:
        code = cli.main(words)
    except SystemExit as left:  # --version and --help
        code = int(left.code or 0)
    assert code == 0
