"""What stands before the pixels of JPEG data, against the encoder that wrote it."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pytest

from ats_stream.io.formats.jpeg_head import parse_head, quality_of, tables_alone

PIXELS = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)


def encode(quality=80, space="YCBCR", subsampling=None, pixels=PIXELS):
    grey = pixels.ndim == 2
    return bytes(
        imagecodecs.jpeg8_encode(
            pixels,
            quality,
            colorspace=None if grey else "RGB",
            outcolorspace=None if grey else space,
            subsampling=subsampling,
        )
    )


def with_segment(data, kind, content):
    """JPEG data with one more segment behind its first two bytes."""
    return data[:2] + bytes([0xFF, kind]) + (len(content) + 2).to_bytes(2, "big") + content + data[2:]


@pytest.mark.parametrize("space", ["YCBCR", "RGB"])
def test_the_quality_of_libjpeg_is_found_again(space):
    found = [quality_of(parse_head(encode(q, space)).quantisation) for q in range(1, 101)]
    assert found == list(range(1, 101))


def test_the_quality_of_other_tables_is_the_nearest():
    first, second, _ = parse_head(encode(60)).quantisation
    other = [value + (i % 2) for i, value in enumerate(first)]
    assert abs(quality_of([other, second, second]) - 60) <= 1
    assert quality_of([None, None]) is None
    assert quality_of([]) is None


@pytest.mark.parametrize("name", ["444", "422", "420", "411", "440"])
def test_subsampling_has_the_name_that_encodes_it(name):
    head = parse_head(encode(subsampling=name))
    assert head.subsampling == name
    assert head.size == (16, 24, 3)
    assert head.is_common


@pytest.mark.parametrize(("space", "is_ycbcr"), [("YCBCR", True), ("RGB", False)])
def test_colours_are_those_that_a_decoder_sees(space, is_ycbcr):
    head = parse_head(encode(100, space))
    assert head.is_ycbcr == is_ycbcr
    assert head.free_segments == ()
    assert not parse_head(encode(pixels=PIXELS[..., 0].copy())).is_ycbcr
    assert parse_head(encode(pixels=PIXELS[..., 0].copy())).subsampling is None


def test_pixels_begin_where_the_head_ends():
    data = encode()
    head = parse_head(data)
    # the head does not depend on the pixels, what follows does
    other = encode(pixels=PIXELS[::-1].copy())
    assert data[: head.nbytes] == other[: head.nbytes]
    assert data[head.nbytes - 3 : head.nbytes] == b"\0\x3f\0"
    assert parse_head(other).nbytes == head.nbytes


@pytest.mark.parametrize(
    ("kind", "content", "name"),
    [
        (0xFE, b"name of a patient", "COM"),
        (0xE1, b"Exif\0\0", "APP1"),
        (0xE2, b"ICC_PROFILE\0", "APP2"),
        (0xE0, b"JFIF\0\1\1\0\0\1\0\1\1\1abc", "APP0"),  # with a thumbnail
        (0xE0, b"JFXX\0\x10", "APP0"),
        (0xEE, b"Adobe and a long story", "APP14"),
        (0xEF, b"", "APP15"),
    ],
)
def test_segments_that_may_hold_text_are_named(kind, content, name):
    head = parse_head(with_segment(encode(), kind, content))
    assert head.free_segments == (name,)
    assert head.size == (16, 24, 3)


def test_tables_may_stand_elsewhere():
    whole = encode(70)
    tables = whole[:2] + b"".join(whole[a:b] for a, b in table_spans(whole)) + b"\xff\xd9"
    spans = table_spans(whole)
    short = b"".join(
        whole[a:b] for a, b in zip([0, *(b for _, b in spans)], [*(a for a, _ in spans), None], strict=True)
    )
    assert parse_head(short).quantisation == (None, None, None)
    assert parse_head(short, tables).quantisation == parse_head(whole).quantisation
    commented = with_segment(with_segment(tables, 0xFE, b"text"), 0xE1, b"more text")
    assert tables_alone(commented) == tables
    decoded = imagecodecs.jpeg8_decode(short, tables=tables_alone(commented))
    np.testing.assert_array_equal(decoded, imagecodecs.jpeg8_decode(whole))


def table_spans(data):
    """Begin and end of the segments of tables, markers included."""
    at, spans = 2, []
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] in (0xDB, 0xC4):
            spans.append((at, end))
        at = end
    return spans


def test_kinds_that_few_decoders_read_are_told():
    data = encode()
    at = data.index(b"\xff\xc0")
    lossless = data[: at + 1] + b"\xc3" + data[at + 2 :]
    deep = data[: at + 4] + b"\x0c" + data[at + 5 :]
    assert not parse_head(lossless).is_common
    assert not parse_head(deep).is_common


@pytest.mark.parametrize("length", range(0, 330, 7))
def test_a_head_cut_short_is_an_error(length):
    data = encode(space="RGB")
    assert length < parse_head(data).nbytes
    with pytest.raises(ValueError, match="JPEG"):
        parse_head(data[:length])


def test_nonsense_is_an_error():
    data = encode()
    for broken in (
        data[:2] + b"\0" + data[2:],
        data[:4] + b"\0\1" + data[6:],
        b"\xff\xd8\xff\xd9" + data[2:],
        b"\xff\xd8\xff\xda\0\4ab" + data,
    ):
        with pytest.raises(ValueError, match="JPEG"):
            parse_head(broken)
    with pytest.raises(ValueError, match="broken JPEG head"):
        parse_head(with_segment(data, 0xDB, b"\0too short"))
