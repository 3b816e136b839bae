"""What the head of compressed image data declares, read before a decoder allocates memory for it. Pure."""

from __future__ import annotations

import struct

JPEG_END = b"\xff\xd9"
# start of frame: every kind of JPEG but DHT (C4), JPG (C8) and DAC (CC)
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
MARKERS_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})
_CODESTREAM = b"\xff\x4f\xff\x51"
# a JP2 file puts boxes of colour and resolution before its codestream
_BOXES_BYTES = 1 << 16


def jpeg_size(data: bytes) -> tuple[int, int, int]:
    """(height, width, components) of JPEG data; ValueError when they declare none.

    >>> jpeg_size(bytes.fromhex("ffd8 ffc0 0011 08 0010 0020 03 012200 021101 031101"))
    (16, 32, 3)
    """
    if data[:2] != b"\xff\xd8":
        raise ValueError("no JPEG data")
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise ValueError("broken JPEG head")
        kind = data[at + 1]
        if kind == 0xFF:  # fill bytes may stand before a marker
            at += 1
            continue
        if kind in MARKERS_ALONE:
            at += 2
            continue
        if kind in FRAMES:
            if at + 10 > len(data):
                break
            height, width, components = struct.unpack_from(">HHB", data, at + 5)
            return height, width, components
        if kind in (0xDA, 0xD9):
            break
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    raise ValueError("JPEG data without a frame")


def jpeg2000_size(data: bytes) -> tuple[int, int, int]:
    """(height, width, components) of a JPEG 2000 codestream or JP2 file; ValueError when there is none."""
    at = data.find(_CODESTREAM, 0, _BOXES_BYTES)
    if at < 0 or at + 42 > len(data):
        raise ValueError("no JPEG 2000 data")
    # after the marker and its length: capabilities, size of the grid, offset of the image in it, and of tiles
    right, bottom, left, top = struct.unpack_from(">4I", data, at + 8)
    components = struct.unpack_from(">H", data, at + 40)[0]
    return max(0, bottom - top), max(0, right - left), components


def webp_size(data: bytes) -> tuple[int, int, int]:
    """(height, width, 4) of WebP data; ValueError when they are none.

    >>> webp_size(b"RIFF\\x16\\0\\0\\0WEBPVP8X\\x0a\\0\\0\\0\\0\\0\\0\\0\\x1f\\0\\0\\x0f\\0\\0")
    (16, 32, 4)
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        raise ValueError("no WebP data")
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[a : a + 3], "little") + 1 for a in (24, 27))
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (v & 0x3FFF for v in struct.unpack_from("<HH", data, 26))
    else:
        raise ValueError("broken WebP head")
    return height, width, 4
