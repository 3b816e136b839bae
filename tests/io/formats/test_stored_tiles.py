"""Tiles as they lie in a file: few reads, the bytes themselves, and nothing that is no tile."""

from __future__ import annotations

import itertools
import os

import imagecodecs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ats_stream.io.formats.parts import file_stamp
from ats_stream.io.formats.stored_tiles import ITEM_TAG, StoredTiles, plan_runs
from ats_stream.io.sources import ChunkError

SIDE = 16


def tile(seed, side=SIDE, quality=80):
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return bytes(imagecodecs.jpeg8_encode(pixels, quality))


def insert(data, at, kind, content):
    return data[:at] + bytes([0xFF, kind]) + (len(content) + 2).to_bytes(2, "big") + content + data[at:]


def store(path, tiles, grid, *, gap=b"", **options):
    """Tiles one after another in a file; None for one that is not stored."""
    data, offsets, sizes = b"head", [], []
    for one in tiles:
        data += gap if one is not None else b""
        offsets.append(len(data) if one is not None else 0)
        sizes.append(len(one) if one is not None else 0)
        data += one or b""
    path.write_bytes(data)
    return StoredTiles(
        path=str(path),
        stamp=file_stamp(path),
        offset=np.array(offsets, np.uint64).reshape(1, *grid),
        nbytes=np.array(sizes, np.uint64).reshape(1, *grid),
        size=(SIDE, SIDE, 3),
        tables=None,
        **options,
    )


@given(
    ranges=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 60)), max_size=30),
    gap=st.integers(0, 20),
)
def test_runs_serve_every_range_once_and_read_no_large_gap(ranges, gap):
    begin = np.array([a for a, _ in ranges], np.int64)
    end = begin + np.array([n for _, n in ranges], np.int64)
    runs = plan_runs(begin, end, gap)
    assert sorted(n for _, _, numbers in runs for n in numbers.tolist()) == list(range(len(ranges)))
    for a, b, numbers in runs:
        inside = begin[numbers], end[numbers]
        assert (a, b) == (inside[0].min(), inside[1].max())
        covered = {p for x, y in zip(*inside, strict=True) for p in range(x, y + gap)}
        assert covered >= set(range(a, b))
    for (_, b, _), (a, _, _) in itertools.pairwise(runs):
        assert a > b + gap


def test_tiles_in_a_row_come_with_one_read(tmp_path, monkeypatch):
    data = [tile(i) for i in range(12)]
    tiles = store(tmp_path / "a", data, (3, 4))
    reads = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: reads.append(len(to[0])) or preadv(fd, to, at))
    assert tiles.read((0, 0, 0), (1, 3, 4)) == {(0, *divmod(i, 4)): data[i] for i in range(12)}
    assert reads == [sum(map(len, data))]
    reads.clear()
    found = tiles.read((0, 1, 1), (1, 3, 3))
    assert found == {(0, y, x): data[(y + 1) * 4 + x + 1] for y in range(2) for x in range(2)}
    # two tiles between the rows are less than a page
    assert len(reads) == 1


@pytest.mark.parametrize("gap", [0, 20, 9000])
@pytest.mark.parametrize("missing", [(), (5,), (0, 1, 11)])
def test_joined_tiles_are_the_same(tmp_path, gap, missing):
    data = [None if i in missing else tile(i) for i in range(12)]
    tiles = store(tmp_path / "a", data, (3, 4), gap=bytes(gap))
    swapped = StoredTiles(**{**vars(tiles), "offset": tiles.offset[:, ::-1], "nbytes": tiles.nbytes[:, ::-1]})
    for one in (tiles, swapped):
        for start, stop in (((0, 0, 0), (1, 3, 4)), ((0, 1, 1), (1, 3, 3)), ((0, 0, 2), (1, 1, 3))):
            expected = one.read(start, stop)
            places, nbytes, pieces = one.read_joined(start, stop)
            assert list(map(tuple, places.tolist())) == list(expected)
            assert nbytes.tolist() == [len(d) for d in expected.values()]
            assert b"".join(pieces) == b"".join(expected.values())
    if gap == 0 and not missing:
        assert len(tiles.read_joined((0, 0, 0), (1, 3, 4))[2]) == 1
        assert len(tiles.read_joined((0, 0, 0), (1, 3, 2))[2]) == 3


def test_tiles_out_of_order_shared_far_apart_or_missing(tmp_path):
    data = [tile(i) for i in range(4)]
    far = store(tmp_path / "far", [data[0], None, *data[2:]], (2, 2), gap=bytes(9000))
    assert far.read((0, 0, 0), (1, 2, 2)) == {(0, 0, 0): data[0], (0, 1, 0): data[2], (0, 1, 1): data[3]}
    assert far.read((0, 0, 1), (1, 1, 2)) == {}
    tiles = store(tmp_path / "a", data, (2, 2))
    flipped = StoredTiles(**{**vars(tiles), "offset": tiles.offset[:, ::-1], "nbytes": tiles.nbytes[:, ::-1]})
    assert list(flipped.read((0, 0, 0), (1, 2, 2)).values()) == [data[2], data[3], data[0], data[1]]
    # blank tiles may be stored once
    offset, nbytes = (np.broadcast_to(t[:, :1, :1], (1, 2, 2)) for t in (tiles.offset, tiles.nbytes))
    shared = StoredTiles(**{**vars(tiles), "offset": offset, "nbytes": nbytes})
    assert set(shared.read((0, 0, 0), (1, 2, 2)).values()) == {data[0]}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: insert(t, 2, 0xFE, b"name"), "has COM segments, which may hold text"),
        (lambda t: insert(insert(t, 2, 0xE1, b"Exif"), 2, 0xED, b"x"), "has APP13, APP1 segments, which may"),
        (lambda t: insert(t, len(t) - 2, 0xFE, b"name"), "has further segments, which may hold text"),
        (lambda t: insert(t, len(t) - 2, 0xE7, b"name"), "has further segments, which may hold text"),
        (lambda t: insert(t, len(t) - 2, 0xF0, b"name"), "has further segments, which may hold text"),
        (lambda t: t + b"name", "does not end as JPEG data must"),
        (lambda t: t[:-2], "does not end as JPEG data must"),
        (lambda t: bytes(len(t)), "does not end as JPEG data must"),
        (lambda t: bytes(20) + b"\xff\xd9", "is damaged: no JPEG data"),
        (lambda t: tile(0, 8), r"is a JPEG of 8 x 8 x 3, the tile has 16 x 16 x 3"),
        (lambda t: t.replace(b"\xff\xc0", b"\xff\xc9", 1), "is JPEG of a kind that few decoders read"),
    ],
)
@pytest.mark.parametrize("where", [0, 5, 8])
def test_what_is_no_tile_is_not_copied(tmp_path, damage, says, where):
    data = [tile(i) for i in range(9)]
    data[where] = damage(data[where])
    tiles = store(tmp_path / "a", data, (3, 3))
    row, column = divmod(where, 3)
    with pytest.raises(ChunkError, match=rf"^tile \(row {row}, column {column}\) {says}"):
        tiles.read((0, 0, 0), (1, 3, 3))
    # the others are what they are
    assert tiles.read((0, 1, 0), (1, 2, 2)) == {(0, 0, 0): data[3], (0, 0, 1): data[4]}
    with pytest.raises(ValueError, match=says):
        tiles.sample(9)


def test_tables_may_differ_from_tile_to_tile(tmp_path):
    data = [tile(i, quality=i + 1) for i in range(40)]
    assert len({d[:100] for d in data}) == 40
    tiles = store(tmp_path / "a", data, (5, 8))
    assert list(tiles.read((0, 0, 0), (1, 5, 8)).values()) == data


def test_items_of_dicom_are_whole_frames(tmp_path):
    padded = [d + bytes(len(d) % 2) for d in (tile(i) for i in range(4))]
    path = tmp_path / "a"
    items = [ITEM_TAG + len(d).to_bytes(4, "little") + d for d in padded]
    path.write_bytes(b"".join(items))
    ends = np.cumsum([len(i) for i in items])
    sizes = np.array([len(d) for d in padded])
    tiles = StoredTiles(
        path=str(path), stamp=file_stamp(path), offset=(ends - sizes).reshape(1, 2, 2),
        nbytes=sizes.reshape(1, 2, 2), size=(SIDE, SIDE, 3), tables=None, is_dicom=True,
    )  # fmt: skip
    assert list(tiles.read((0, 0, 0), (1, 2, 2)).values()) == padded
    # a frame in two items has the head of the second one among its pixels
    wrong = StoredTiles(**{**vars(tiles), "nbytes": tiles.nbytes + np.array([[[0, 0], [0, 2]]])})
    path.write_bytes(path.read_bytes() + b"\xff\xd9")
    wrong = StoredTiles(**{**vars(wrong), "stamp": file_stamp(path)})
    with pytest.raises(ChunkError, match=r"tile \(row 1, column 1\) is no single item of the pixel data"):
        wrong.read((0, 0, 0), (1, 2, 2))


def test_a_file_that_changed_is_an_error(tmp_path):
    path = tmp_path / "a"
    tiles = store(path, [tile(0)], (1, 1))
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(ChunkError, match="the file changed since it was opened"):
        tiles.read((0, 0, 0), (1, 1, 1))
    path.unlink()
    with pytest.raises(ChunkError, match=r"cannot open .*: No such file"):
        tiles.read((0, 0, 0), (1, 1, 1))


def test_reads_that_fail_are_errors(tmp_path, monkeypatch):
    tiles = store(tmp_path / "a", [tile(0)], (1, 1))

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ChunkError, match=r"cannot read bytes 4 to \d+: Input/output error"):
        tiles.read((0, 0, 0), (1, 1, 1))
    monkeypatch.setattr(os, "preadv", lambda *_: 5)
    with pytest.raises(ChunkError, match=r"truncated: 5 of \d+ bytes from 4"):
        tiles.read((0, 0, 0), (1, 1, 1))
    empty = store(tmp_path / "b", [None], (1, 1))
    with pytest.raises(ValueError, match="no tile has bytes"):
        empty.sample(16)
