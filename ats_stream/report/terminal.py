"""Pictures in a terminal: by the protocols of kitty and iTerm2, or as coloured half blocks.

Kitty graphics: https://sw.kovidgoyal.net/kitty/graphics-protocol/, inline images of iTerm2:
https://iterm2.com/documentation-images.html. Terminals that know sixel alone get half blocks: to tell them
apart, one would have to ask the terminal and wait for its answer.
Shape letters: Y, X space.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

Protocol = Literal["kitty", "iterm"]
_KITTY_CHUNK = 4096  # of base64, by the protocol
_KITTY_PROGRAMS = frozenset({"ghostty"})
_ITERM_PROGRAMS = frozenset({"iTerm.app", "WezTerm", "mintty"})
_UPPER_HALF = "\N{UPPER HALF BLOCK}"


def protocol_of(environ: Mapping[str, str]) -> Protocol | None:
    """How the terminal of this environment shows pictures, None when it cannot or that is not known.

    >>> protocol_of({"TERM": "xterm-kitty"}), protocol_of({"TERM_PROGRAM": "iTerm.app"}), protocol_of({})
    ('kitty', 'iterm', None)
    """
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if "TMUX" in environ or term.startswith(("screen", "tmux")):
        return None  # they swallow what they do not know
    if "KITTY_WINDOW_ID" in environ or "kitty" in term or "ghostty" in term or program in _KITTY_PROGRAMS:
        return "kitty"
    if environ.get("KONSOLE_VERSION", "").isdecimal() and int(environ["KONSOLE_VERSION"]) >= 220400:
        return "kitty"
    if program in _ITERM_PROGRAMS or environ.get("LC_TERMINAL") == "iTerm2":
        return "iterm"
    return None


def png_of(rgb_YX3: NDArray[np.uint8]) -> bytes:
    """The picture as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(rgb_YX3).save(stream, "PNG")
    return stream.getvalue()


def inline(rgb_YX3: NDArray[np.uint8], protocol: Protocol) -> str:
    """What a terminal of this protocol shows as the picture."""
    png = png_of(rgb_YX3)
    data = base64.b64encode(png).decode()
    if protocol == "iterm":
        return f"\033]1337;File=inline=1;size={len(png)};preserveAspectRatio=1:{data}\a"
    chunks = [data[i : i + _KITTY_CHUNK] for i in range(0, len(data), _KITTY_CHUNK)]
    parts = []
    for number, chunk in enumerate(chunks):
        keys = "a=T,f=100," if number == 0 else ""
        parts.append(f"\033_G{keys}m={int(number < len(chunks) - 1)};{chunk}\033\\")
    return "".join(parts)


def half_blocks(rgb_YX3: NDArray[np.uint8], columns: int) -> str:
    """The picture in at most so many columns, two pixels over each other in each character."""
    height, width = rgb_YX3.shape[:2]
    wide = max(1, min(columns, width))
    tall = max(2, round(height * wide / width / 2) * 2)
    small: Any = np.asarray(Image.fromarray(rgb_YX3).resize((wide, tall), Image.Resampling.BOX))
    lines = []
    for upper, lower in zip(small[0::2].tolist(), small[1::2].tolist(), strict=True):
        cells = (
            f"\033[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m{_UPPER_HALF}"
            for a, b in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells) + "\033[0m")
    return "\n".join(lines)
