"""The page: parses, escapes, asks nothing of the network, and is the same bytes for the same content."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from ats_stream.errors import InputError, StorageError
from ats_stream.report.curve import LineChart, Series
from ats_stream.report.page import Figure, Page, Section, Table, render_page, write_page

if TYPE_CHECKING:
    from pathlib import Path

EVIL = '<script>alert("1")</script>&\'"'
VOID = {"meta", "link", "img", "source", "br", "hr", "input"}


class Outline(HTMLParser):
    """Checks that tags nest and keeps what the tests ask about."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not set(self.open) & {"style", "script"}:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def picture(value: int = 200) -> Image.Image:
    return Image.fromarray(np.full((4, 6, 3), value, np.uint8))


def full_page(name: str = "a.svs") -> Page:
    chart = LineChart(
        series=(Series(name=name, x=(0, 1, 2), y=(3, 2, 1)),), x_label=f"x {name}", y_label=f"y {name}"
    )
    return Page(
        title=f"Title {name}",
        subtitle=f"Subtitle {name}",
        footer=f"Footer {name}",
        sections=(
            Section(
                heading=f"Numbers {name}",
                text=f"One {name}\n\nTwo\nlines",
                key_values=((name, name), ("k", 0.5)),
            ),
            Section(
                heading="Pictures",
                figures=(
                    Figure(content=picture(), dark=picture(20), caption=f"Caption {name}"),
                    Figure(content=picture(), encoding="jpeg", narrow=True),
                    Figure(content=chart),
                ),
            ),
            Section(heading="Table", table=Table(header=(name, "n"), rows=((name, 1234567), (None, 0.25)))),
        ),
    )


def test_page_parses_and_shows_everything() -> None:
    outline = Outline(render_page(full_page()))
    for text in (
        "Title a.svs",
        "Subtitle a.svs",
        "Footer a.svs",
        "One a.svs",
        "Two lines",
        "1,234,567",
        "0.25",
    ):
        assert text in outline.text
    assert len(outline.all("section")) == len(outline.all("h2")) == 3
    assert len(outline.all("figure")) == 3
    assert len(outline.all("svg")) == 1
    assert [row.get("class") for row in outline.all("td")] == [None, "num", None, "num"]
    assert [row.get("class") for row in outline.all("th")] == [None, "num"]
    assert outline.all("html")[0]["lang"] == "en"


def test_names_are_escaped_everywhere() -> None:
    html = render_page(full_page(EVIL))
    assert "<script" not in html
    outline = Outline(html)
    assert outline.all("script") == []
    # title twice, subtitle, heading, paragraph, a tile, table head and cell, caption, footer, and the chart
    assert outline.text.count(EVIL) >= 12
    assert f"Caption {EVIL}" in [image["alt"] for image in outline.all("img")]


def test_the_page_asks_nothing_of_anyone() -> None:
    html = render_page(full_page())
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", html), re.IGNORECASE)
    outline = Outline(html)
    addresses = [
        value
        for _, attributes in outline.tags
        for key, value in attributes.items()
        if key in {"src", "href", "srcset", "action", "data"} and value
    ]
    assert len(addresses) == 3
    assert all(address.startswith("data:image/") for address in addresses)
    assert "@import" not in html
    assert "url(" not in html
    policy = [meta["content"] for meta in outline.all("meta") if meta.get("http-equiv")]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_pictures_travel_inside_the_page() -> None:
    outline = Outline(render_page(full_page()))
    sources = [image["src"] or "" for image in outline.all("img")]
    assert [source.split(";")[0] for source in sources] == ["data:image/png", "data:image/jpeg"]
    (dark,) = outline.all("source")
    assert dark["media"] == "screen and (prefers-color-scheme: dark)"
    for address, value, tolerance in [
        (sources[0], 200, 0),
        (sources[1], 200, 2),
        (dark["srcset"] or "", 20, 0),
    ]:
        image = Image.open(io.BytesIO(base64.b64decode(address.split(",", 1)[1])))
        pixels = np.asarray(image).astype(int)
        assert pixels.shape == (4, 6, 3)
        assert np.abs(pixels - value).max() <= tolerance


def test_light_dark_and_print_have_all_colours() -> None:
    html = render_page(full_page())
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", html)) - {"--line"}
    blocks = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        assert used <= set(re.findall(r"(--[a-z0-9-]+):", block))


def test_an_empty_page_is_a_page() -> None:
    outline = Outline(render_page(Page(title="Only a title")))
    assert outline.text.split() == ["Only", "a", "title"] * 2
    assert outline.all("section") == []


def test_write_is_whole_and_deterministic(tmp_path: Path) -> None:
    path = write_page(tmp_path / "deep" / "report.html", full_page())
    first = path.read_bytes()
    assert first.decode() == render_page(full_page())
    assert write_page(path, full_page()).read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    assert path.stat().st_mode & 0o600 == 0o600


def test_a_target_that_cannot_be_written_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(StorageError, match=r"report\.html: cannot be written"):
        write_page(tmp_path / "report.html", full_page())
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_table_rows_must_fit_the_header() -> None:
    with pytest.raises(InputError, match="table row 1 has 1 cells, the header 2"):
        Table(header=("a", "b"), rows=((1, 2), (1,)))
