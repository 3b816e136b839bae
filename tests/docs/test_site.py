"""The site builds without a warning, loads nothing from elsewhere, and shows what the sources say."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from site_docstrings import as_markdown

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    # the theme advertises its successor
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


class Loaded(HTMLParser):
    """Addresses that a browser fetches when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        relation = named.get("rel") or ""
        if tag == "link" and relation not in ("canonical", "prev", "next"):
            self.addresses.append(named.get("href") or "")
        elif tag != "a":
            self.addresses.append(named.get("src") or "")


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        parser = Loaded()
        parser.feed(page.read_text())
        assert parser.addresses
        assert [one for one in parser.addresses if re.match(r"(https?:)?//", one)] == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", sheet.read_text()), sheet


@pytest.mark.slow
def test_the_reference_shows_every_public_name(site: Path) -> None:
    for part in ("sampling", "io", "models", "workers", "kernels"):
        page = (site / "reference" / f"{part}.html").read_text()
        for name in importlib.import_module(f"ats_stream.{part}").__all__:
            # a function with the name of its module is shown from there
            places = (f'id="ats_stream.{part}.{name}"', f'id="ats_stream.{part}.{name}.{name}"')
            assert any(place in page for place in places), f"{part}.{name} has no docstring"
        assert not re.search(r":(func|class|mod|meth|data):", page), part


@pytest.mark.slow
def test_numbers_of_benchmarks_are_those_of_the_results(site: Path) -> None:
    page = (site / "benchmarks.html").read_text()
    stored = (ROOT / "benchmarks" / "results" / "demo.json").read_text()
    found = re.findall(r'"seconds": ([0-9.]+)', stored)
    assert found
    assert all(f"<td>{seconds}</td>" in page for seconds in found)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see :func:`~ats_stream.sampling.draw`, :data:`N`", "see `draw`, `N`"),
        ("Adds.\n\n>>> 1 + 1\n2\n\nEnd.", "Adds.\n\n```python\n>>> 1 + 1\n2\n```\n\nEnd."),
        (
            "    >>> f(\n    ...     1)\n    [[0]]\n",
            "    ```python\n    >>> f(\n    ...     1)\n    [[0]]\n    ```\n",
        ),
    ],
)
def test_docstrings_become_markdown(text: str, shown: str) -> None:
    assert as_markdown(text) == shown
