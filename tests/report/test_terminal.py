"""Pictures in terminals: what is sent can be read back, and says what the terminal expects."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from ats_stream.report.terminal import half_blocks, inline, protocol_of


@pytest.mark.parametrize(
    ("environ", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"KITTY_WINDOW_ID": "1", "TERM": "xterm-256color"}, "kitty"),
        ({"TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"KONSOLE_VERSION": "230804"}, "kitty"),
        ({"KONSOLE_VERSION": "210401"}, None),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM_PROGRAM": "iTerm.app", "TMUX": "/tmp/tmux"}, None),
        ({"TERM": "screen-256color", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-256color"}, None),
        ({}, None),
    ],
)
def test_terminals_are_known_by_their_environment(environ, protocol):
    assert protocol_of(environ) == protocol


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_kitty_gets_the_picture_in_chunks_of_which_all_but_the_last_announce_more():
    picture = noise(60, 70)
    parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", inline(picture, "kitty"))
    assert "".join(f"\033_G{keys};{data}\033\\" for keys, data in parts) == inline(picture, "kitty")
    assert len(parts) > 2
    assert [keys for keys, _ in parts] == ["a=T,f=100,m=1", *["m=1"] * (len(parts) - 2), "m=0"]
    assert {len(data) for _, data in parts[:-1]} == {4096}
    np.testing.assert_array_equal(decoded("".join(data for _, data in parts)), picture)


def test_iterm_gets_the_picture_and_its_size():
    picture = noise(9, 7)
    found = re.fullmatch(
        r"\x1b\]1337;File=inline=1;size=(\d+);preserveAspectRatio=1:(.*)\x07", inline(picture, "iterm")
    )
    assert int(found[1]) == len(base64.b64decode(found[2]))
    np.testing.assert_array_equal(decoded(found[2]), picture)


def test_half_blocks_hold_two_pixels_each():
    picture = noise(6, 8)
    lines = half_blocks(picture, 8).splitlines()
    colours = [re.findall(r"38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m", line) for line in lines]
    upper_lower = np.array(colours, int).reshape(3, 8, 2, 3)
    np.testing.assert_array_equal(upper_lower.transpose(0, 2, 1, 3).reshape(6, 8, 3), picture)
    assert all(line.endswith("\033[0m") for line in lines)


@pytest.mark.parametrize(("shape", "columns", "cells"), [((100, 200), 40, (10, 40)), ((1, 300), 50, (1, 50))])
def test_half_blocks_keep_the_shape_in_the_columns_given(shape, columns, cells):
    lines = half_blocks(noise(*shape), columns).splitlines()
    assert (len(lines), lines[0].count("\N{UPPER HALF BLOCK}")) == cells
