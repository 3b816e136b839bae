"""One self-contained HTML page: headings, figures, tables and key numbers, without a request to anywhere.

Everything a caller gives is text and is escaped; pictures travel inside the file. The same page gives the
same bytes.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import jinja2

from ats_stream.errors import InputError
from ats_stream.files import write_atomic
from ats_stream.report.colour import ANCHORS
from ats_stream.report.curve import LineChart, render_svg

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from PIL import Image

_JPEG_QUALITY = 88


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture or a chart with a caption."""

    content: Image.Image | LineChart
    """What is shown."""
    caption: str = ""
    """Text below, also what a screen reader says of a picture."""
    dark: Image.Image | None = None
    """The picture to show instead on a dark page."""
    encoding: Literal["png", "jpeg"] = "png"
    """How pictures are stored: exactly, or smaller."""
    narrow: bool = False
    """Whether it shares its row with other narrow figures."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text or numbers under column names; numbers are set to the right."""

    header: tuple[str, ...]
    """Column names."""
    rows: tuple[tuple[str | int | float | None, ...], ...]
    """Cells; None is an empty cell, floats are shown to four significant digits."""

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.header):
                raise InputError(f"table row {index} has {len(row)} cells, the header {len(self.header)}")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page; what is empty is left out."""

    heading: str
    """Its title."""
    text: str = ""
    """Paragraphs, parted by an empty line."""
    key_values: tuple[tuple[str, str | int | float], ...] = ()
    """Few important numbers, (name, value), set large."""
    figures: tuple[Figure, ...] = ()
    """Pictures and charts."""
    table: Table | None = None
    """One table."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """The whole page."""

    title: str
    """Title of the page and of the window."""
    subtitle: str = ""
    """One line below the title."""
    sections: tuple[Section, ...] = ()
    """The parts, in order."""
    footer: str = ""
    """One line at the end, such as how the page was made."""


def write_page(path: str | os.PathLike[str], page: Page) -> Path:
    """Write `page` to `path` as one HTML file, whole or not at all; gives the path.

    Raises StorageError when the disk refuses.
    """
    return write_atomic(path, render_page(page).encode())


def render_page(page: Page) -> str:
    """The HTML of `page`: no script, no external address, light or dark as the reader's system is."""
    return _template().render(page=page)


def png_bytes(image: Image.Image) -> bytes:
    """`image` as PNG; equal pixels give equal bytes."""
    return _encoded(image, "png")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ats_stream.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        data_uri=_data_uri, number=_number_text, chart=render_svg, paragraphs=_paragraphs
    )
    environment.tests.update(chart=_is_chart, number=_is_number)
    stops = ", ".join("#" + bytes(int(value) for value in anchor).hex() for anchor in ANCHORS)
    environment.globals.update(gradient=stops)
    return environment.get_template("page.html")


def _data_uri(image: Image.Image, encoding: Literal["png", "jpeg"]) -> str:
    return f"data:image/{encoding};base64,{base64.b64encode(_encoded(image, encoding)).decode()}"


def _encoded(image: Image.Image, encoding: Literal["png", "jpeg"]) -> bytes:
    stream = io.BytesIO()
    if encoding == "png":
        image.save(stream, format="PNG", compress_level=9)
    else:
        # no chroma subsampling: thin coloured boxes would bleed
        image.convert("RGB").save(stream, format="JPEG", quality=_JPEG_QUALITY, subsampling=0, optimize=True)
    return stream.getvalue()


def _is_chart(content: object) -> bool:
    return isinstance(content, LineChart)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number_text(value: object) -> str:
    """Numbers as a reader wants them: integers grouped by thousands, floats to four digits, None as nothing.

    >>> _number_text(1234567), _number_text(0.123456), _number_text(None), _number_text("a")
    ('1,234,567', '0.1235', '', 'a')
    """
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
