"""The manifest: round trips, lines cut off anywhere, what is broken."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import google_crc32c
import pytest

from ats_stream.errors import SlideError
from ats_stream.io.conversion.manifest import (
    Manifest,
    ManifestHeader,
    SourceStamp,
    complete_line,
    entry_line,
    entry_of,
    header_line,
    manifest_place,
    parse_manifest,
    read_manifest,
)

HEADER = ManifestHeader(
    tool="ats-stream 1",
    profile="lossless",
    source=SourceStamp(name="a.svs", nbytes=12, mtime_ns=34),
    plan="ab" * 32,
    pixel_size_um=(None, 0.5),
)
ENTRIES = [entry_of("0/zarr.json", [b"{}"]), entry_of("0/c/0/0/0", []), entry_of("zarr.json", [b"a", b"b"])]


def ended(data, num_objects):
    return data + complete_line(num_objects, google_crc32c.value(data))


WHOLE = ended(header_line(HEADER) + b"".join(map(entry_line, ENTRIES)), 3)


def test_what_is_written_is_read():
    expected = Manifest(header=HEADER, entries={e.key: e for e in ENTRIES}, is_complete=True)
    assert parse_manifest(WHOLE) == expected
    assert [json.loads(line) for line in WHOLE.splitlines()] == [
        {
            "manifest": 1,
            "tool": "ats-stream 1",
            "profile": "lossless",
            "source": {"name": "a.svs", "bytes": 12, "mtime_ns": 34},
            "plan": "ab" * 32,
            "pixel_size_um": [None, 0.5],
        },
        {"key": "0/zarr.json", "bytes": 2, "crc32c": ENTRIES[0].crc32c},
        {"key": "0/c/0/0/0", "bytes": 0, "crc32c": None},
        {"key": "zarr.json", "bytes": 2, "crc32c": ENTRIES[2].crc32c},
        {"complete": True, "objects": 3, "crc32c": json.loads(WHOLE.splitlines()[-1])["crc32c"]},
    ]


def test_a_manifest_cut_off_anywhere_holds_what_was_whole():
    lines = WHOLE.splitlines(keepends=True)
    for size in range(len(lines[0]), len(WHOLE)):
        num_whole = WHOLE[:size].count(b"\n")
        found = parse_manifest(WHOLE[:size])
        assert list(found.entries.values()) == ENTRIES[: num_whole - 1]
        assert not found.is_complete


def test_the_last_line_of_a_key_wins_and_work_after_the_end_reopens_it():
    again = entry_of("0/c/0/0/0", [b"more"])
    found = parse_manifest(WHOLE + entry_line(again))
    assert found.entries["0/c/0/0/0"] == again
    assert not found.is_complete
    assert parse_manifest(ended(WHOLE + entry_line(again), 3)).is_complete


@pytest.mark.parametrize("bit", range(8))
def test_no_byte_of_a_whole_manifest_changes_unnoticed(bit):
    for place in range(len(WHOLE)):
        changed = bytearray(WHOLE)
        changed[place] ^= 1 << bit
        with suppress(ValueError):
            assert not parse_manifest(bytes(changed)).is_complete


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no first line"),
        (b'{"manifest": 1', "no first line"),
        (b"x\n", "line 1 is no JSON"),
        (b"[]\n", "line 1 is no object"),
        (b'{"manifest": 2}\n', "format 2, expected 1"),
        (b'{"manifest": 1}\n', "line 1: KeyError"),
        (header_line(HEADER) + b"\n", "line 2 is no JSON"),
        (header_line(HEADER) + b'{"key": "a", "bytes": 0, "crc32c": "00000000"}\n', "line 2 describes"),
        (header_line(HEADER) + b'{"key": "a", "bytes": 3, "crc32c": null}\n', "line 2 describes"),
        (header_line(HEADER) + b'{"key": "", "bytes": 0, "crc32c": null}\n', "line 2 describes"),
        (ended(header_line(HEADER), 1), "line 2 counts 1 objects, before it are 0"),
    ],
)
def test_a_broken_manifest_says_where(data, says):
    with pytest.raises(ValueError, match=f"broken manifest: .*{says}"):
        parse_manifest(data)


def test_it_lies_beside_the_store(tmp_path):
    target = tmp_path / "a.ome.zarr"
    assert read_manifest(target) is None
    place = Path(manifest_place(target))
    place.write_bytes(WHOLE)
    assert read_manifest(target) == read_manifest(f"{target}/") == parse_manifest(WHOLE)
    place.write_bytes(b"x\n")
    with pytest.raises(SlideError, match=r"a\.ome\.zarr\.manifest\.jsonl: broken manifest: line 1"):
        read_manifest(target)


def test_it_lies_beside_a_store_behind_a_url(tmp_path, serve):
    (tmp_path / "a.ome.zarr.manifest.jsonl").write_bytes(WHOLE)
    server = serve(tmp_path)
    assert read_manifest(f"{server.url}/a.ome.zarr/") == parse_manifest(WHOLE)
    assert read_manifest(f"{server.url}/b.ome.zarr") is None
