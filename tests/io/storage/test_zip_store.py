"""Zip files: the same pixels as the folder that was packed, and every damage told in one line."""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ats_stream.errors import SlideError
from ats_stream.io import PyramidWriter, open_pyramid, read_batch
from ats_stream.io.storage.store_error import StoreError
from ats_stream.io.storage.stores import LocalBlob, LocalStore
from ats_stream.io.storage.zip_store import ZipStore

SIDE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("zip") / "slide.zarr"
    rng = np.random.default_rng(0)
    with PyramidWriter(
        target, level_shapes=[(3, SIDE, SIDE)], dtype="uint8", chunk_px=16, shard_px=32
    ) as writer:
        for place in np.ndindex(2, 2):
            writer.write_shard(0, place, rng.integers(0, 255, (3, 32, 32), dtype=np.uint8))
        writer.write_label("tissue", np.eye(SIDE, dtype=np.uint8), downsample=1)
    return target


def pack(folder, target, *, method=zipfile.ZIP_STORED, top="", comment=b""):
    with zipfile.ZipFile(target, "w", method) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, top + path.relative_to(folder).as_posix())
        archive.comment = comment
    return target


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("top", ["", "slide.zarr/"])
@pytest.mark.parametrize("comment", [b"", b"x" * 65535], ids=["", "comment"])
def test_a_zip_reads_as_its_folder(folder, tmp_path, method, top, comment):
    target = pack(folder, tmp_path / "a.zip", method=method, top=top, comment=comment)
    pyramid, plain = open_pyramid(target, cache_bytes=1 << 16), open_pyramid(folder)
    np.testing.assert_array_equal(pyramid.read(0), plain.read(0))
    offsets = np.random.default_rng(0).integers(-20, 70, (9, 2))
    np.testing.assert_array_equal(
        pyramid.read_patches(0, offsets, (20, 11)), plain.read_patches(0, offsets, (20, 11))
    )
    np.testing.assert_array_equal(pyramid.label("tissue").read(0), plain.label("tissue").read(0))
    assert pyramid.slide == str(target)
    copy = pickle.loads(pickle.dumps(pyramid))
    np.testing.assert_array_equal(copy.read(0), plain.read(0))


@given(
    members=st.dictionaries(
        st.text("abc/é0", min_size=1, max_size=8).filter(lambda n: not n.endswith("/")),
        st.tuples(st.binary(max_size=50), st.booleans()),
        max_size=6,
    ),
)
def test_members_are_found_whatever_their_names_and_methods(tmp_path_factory, members):
    path = tmp_path_factory.mktemp("members") / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, (data, is_deflated) in members.items():
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if is_deflated else zipfile.ZIP_STORED)
    store = ZipStore(LocalStore(path.parent), "a.zip")
    for name, (data, _) in members.items():
        key = name.removeprefix(store.directory().root)
        assert store.get(key, 100) == data
        assert store.size(key) == len(data)
        with store.open(key) as blob:
            assert blob.read(1, 3) == data[1:4]
            assert blob.tail(4) == (data[-4:], len(data))
    assert store.get("none", 100) is None
    assert store.open("none") is None


def test_zip64_members_are_found(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive, archive.open("big", "w", force_zip64=True) as member:
        member.write(b"hello")
    data = path.read_bytes()
    assert ZipStore(LocalStore(tmp_path), "a.zip").get("big", 10) == b"hello"
    # the same directory with its end in 64 bits, as zipfile writes it for very many members
    at = data.rfind(b"PK\5\6")
    count, nbytes, start = struct.unpack("<HII", data[at + 10 : at + 20])
    record = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, nbytes, start)
    locator = b"PK\6\7" + struct.pack("<IQI", 0, at, 1)
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(data[:at] + record + locator + end)
    assert ZipStore(LocalStore(tmp_path), "a.zip").get("big", 10) == b"hello"


def refused(path, says):
    with pytest.raises(SlideError, match=says) as caught:
        open_pyramid(path).read(0)
    assert str(caught.value).startswith(f"{path}")
    assert "\n" not in str(caught.value)


def test_damage_is_told(folder, tmp_path):
    path = pack(folder, tmp_path / "a.zip")
    data = path.read_bytes()
    for length in (0, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        refused(path, "not a zip file, or it is truncated")
    at = data.rfind(b"PK\5\6")
    path.write_bytes(data[: at + 10] + struct.pack("<HII", 60_000, 2**31, 5) + data[at + 20 :])
    refused(path, "damaged zip a.zip: a directory of 60000 members, 2147483648 bytes")
    path.write_bytes(data.replace(b"PK\1\2", b"PK\1\3", 1))
    refused(path, "entry 0 of .* is broken")
    path.write_bytes(data.replace(b"PK\3\4", b"PK\3\5"))
    refused(path, "no header of zarr.json where the directory says")
    path.write_bytes(data[:-2000] + data[-2000:].replace(b"0/c/0/1/1", b"0/c/0/0/0"))
    refused(path, "level 0: damaged zip: another header than that of c/0/0/0")
    path.write_bytes(data.replace(b'"node_type"', b'"node_tipe"', 1))
    refused(path, "CRC-32 does not match")


def test_other_methods_are_refused(folder, tmp_path):
    refused(pack(folder, tmp_path / "a.zip", method=zipfile.ZIP_BZIP2), "compression method 12")


def test_a_zip_without_an_image(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w"):
        pass
    refused(tmp_path / "a.zip", "neither zarr.json nor .zattrs")


def test_a_zip_that_changes_is_noticed(folder, tmp_path):
    path = pack(folder, tmp_path / "a.zip")
    pyramid = open_pyramid(path)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(SlideError, match="changed since it was opened"):
        pyramid.read(0)


@pytest.mark.parametrize("stated", [1000, 10 << 20])
def test_a_member_unpacks_to_what_is_stated_and_no_more(tmp_path, stated):
    bomb = zlib.compress(bytes(1 << 20), 9)[2:-4]
    entry_name = b"zarr.json"
    crc = zlib.crc32(bytes(stated))
    common = struct.pack("<HHHHIIIHH", 0, 8, 0, 0, crc, len(bomb), stated, len(entry_name), 0)
    local = b"PK\3\4" + struct.pack("<H", 20) + common + entry_name + bomb
    entry = (
        b"PK\1\2" + struct.pack("<HH", 20, 20) + common + struct.pack("<HHHII", 0, 0, 0, 0, 0) + entry_name
    )
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local), 0)
    (tmp_path / "a.zip").write_bytes(local + entry + end)
    with pytest.raises(StoreError, match="its size or CRC-32 does not match"):
        ZipStore(LocalStore(tmp_path), "a.zip").get("zarr.json", 1 << 30)
    with pytest.raises(StoreError, match="at most 10 are read"):
        ZipStore(LocalStore(tmp_path), "a.zip").get("zarr.json", 10)


def test_a_copy_of_a_zip_that_is_gone_says_so_when_it_reads(folder, tmp_path):
    path = pack(folder, tmp_path / "a.zip")
    copied = pickle.dumps(open_pyramid(path))
    path.unlink()
    with pytest.raises(SlideError, match=r"level 0: a\.zip does not exist"):
        pickle.loads(copied).read(0)
    with pytest.raises(SlideError, match=r"level 0: a\.zip does not exist"):
        read_batch([(pickle.loads(copied), 0, [[0, 0]])] * 2, (4, 4))


def test_only_as_many_bytes_are_read_as_asked_for(folder, tmp_path, monkeypatch):
    target = pack(folder, tmp_path / "a.zip")
    pyramid = open_pyramid(target)
    read, real = [], LocalBlob.read

    def counting(blob, start, nbytes):
        read.append(nbytes)
        return real(blob, start, nbytes)

    monkeypatch.setattr(LocalBlob, "read", counting)
    pyramid.read_patches(0, [[0, 0]], (16, 16))
    stored = pyramid.read_stats(0).stored_bytes
    # the header of the member with its name, its index, one chunk
    assert sum(read) == 30 + len("0/c/0/0/0") + stored + 16 * 4 + 4
