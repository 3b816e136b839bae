"""What is shipped for the page: the OpenSeadragon that its note names, its licence, and nothing forgotten."""

from __future__ import annotations

import json
import re
from importlib import resources

from ats_stream.files import sha256_of
from ats_stream.viewer.answers import STATIC

FOLDER = resources.files("ats_stream.viewer") / "static"
NOTE = json.loads((FOLDER / "openseadragon.json").read_text())


def test_openseadragon_is_the_one_of_the_note() -> None:
    for name, digest in NOTE["sha256"].items():
        assert sha256_of((FOLDER / name).read_bytes()) == digest
    script = (FOLDER / "openseadragon.min.js").read_text()
    assert script.startswith(f"//! openseadragon {NOTE['version']}\n")
    assert NOTE["license"] == "BSD-3-Clause"
    licence = (FOLDER / "openseadragon.LICENSE.txt").read_text()
    assert "Redistributions in binary form must reproduce" in licence


def test_every_file_of_the_page_is_served_or_is_about_openseadragon() -> None:
    names = {entry.name for entry in FOLDER.iterdir()}
    assert names == set(STATIC) | {"openseadragon.json", "openseadragon.LICENSE.txt"}


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    ours = [name for name in STATIC if name != "openseadragon.min.js"]
    for name in ours:
        text = (FOLDER / name).read_text()
        assert not re.findall(r"https?://|//[a-z]+\.[a-z]+/", text), name
        for asked in re.findall(r"""(?:src|href)="([^"]+)"|from "\./([^"]+)\"""", text):
            wanted = next(filter(None, asked))
            assert wanted in STATIC or wanted == "data:,", (name, wanted)


def test_our_scripts_are_ascii_and_put_text_in_as_text() -> None:
    for name in STATIC:
        if name.endswith(".js") and name != "openseadragon.min.js":
            text = (FOLDER / name).read_text()
            assert text.isascii(), name
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), (
                name
            )
