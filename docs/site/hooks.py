"""Hooks of mkdocs: the page of benchmarks, and links out of docs/ into the source."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))  # mkdocs takes this back once the module is loaded

from results_page import page as benchmarks_page  # noqa: E402  from benchmarks/

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

_OUT_OF_DOCS = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of benchmarks, made from the results that are stored."""
    files.append(
        File.generated(config, "benchmarks.md", content=benchmarks_page(ROOT / "benchmarks" / "results"))
    )
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to files beside docs/ lead nowhere on the site: their paths are shown instead."""
    if "/" in page.file.src_uri:
        return markdown
    return _OUT_OF_DOCS.sub(r"\1 (`\2`)", markdown)
