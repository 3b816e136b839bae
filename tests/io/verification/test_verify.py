"""Verification: a whole store passes, and no change of a byte, object or pixel passes for whole."""

from __future__ import annotations

import json
import random
import shutil
import zipfile
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr

from ats_stream.errors import SlideError
from ats_stream.io import ConvertConfig, PyramidWriter, convert, open_pyramid, verify, write_pyramid
from ats_stream.io.conversion.manifest import (
    ManifestHeader,
    SourceStamp,
    complete_line,
    entry_line,
    entry_of,
    header_line,
    manifest_place,
    parse_manifest,
)
from ats_stream.io.reduce import halve
from ats_stream.io.shard import index_nbytes
from ats_stream.io.verification.objects import check_object

CONFIG = ConvertConfig(chunk_px=16, shard_px=32, coarsest_px=32)


def write_manifest(folder, profile="lossless", *, source="none.svs", absent=(), is_complete=True):
    """The manifest of what a folder holds."""
    header = ManifestHeader(
        tool="ats-stream",
        profile=profile,
        source=SourceStamp(name=source, nbytes=1, mtime_ns=2),
        plan="0" * 64,
        pixel_size_um=(0.5, 0.5),
    )
    entries = [
        entry_of(path.relative_to(folder).as_posix(), [path.read_bytes()])
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    entries += [entry_of(key, []) for key in absent]
    data = header_line(header) + b"".join(map(entry_line, entries))
    if is_complete:
        data += complete_line(len(entries), google_crc32c.value(data))
    Path(manifest_place(folder)).write_bytes(data)
    return parse_manifest(data)


@pytest.fixture(scope="module")
def image(picture):
    pixels = picture((3, 75, 90))
    pixels[:, :32, :32] = 255  # one shard of level 0 holds nothing but the fill value
    return pixels


@pytest.fixture(scope="module")
def whole(tmp_path_factory, image):
    """Three levels in shards of 32 px, a mask, and the manifest beside it."""
    folder = tmp_path_factory.mktemp("whole") / "a.ome.zarr"
    write_pyramid(image, folder, CONFIG, pixel_size_um=0.5)
    write_manifest(folder, absent=["0/c/0/0/0"])
    return folder


@pytest.fixture
def store(whole, tmp_path):
    """A copy that a test may damage."""
    target = shutil.copytree(whole, tmp_path / whole.name)
    shutil.copy(manifest_place(whole), tmp_path)
    return target


def found(target, **options):
    report = verify(target, num_threads=1, **options)
    assert report.ok == (not report.findings)
    for finding in report.findings:
        assert "\n" not in str(finding)
    return [(finding.key, finding.reason) for finding in report.findings]


def flip(path, place, value=1):
    data = bytearray(path.read_bytes())
    data[place] ^= value
    path.write_bytes(data)


def forget(target):
    Path(manifest_place(target)).unlink()


# --- whole stores


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_whole_store_is_ok(whole, quick, num_threads):
    report = verify(whole, quick=quick, num_threads=num_threads)
    assert report.findings == ()
    files = [path for path in whole.rglob("*") if path.is_file()]
    assert report.num_objects == len(files)
    assert report.num_bytes == sum(path.stat().st_size for path in files)
    assert report.num_levels == 6
    assert report.has_manifest
    assert report.notes == ()
    assert str(report).startswith(f"{whole}: ok ({len(files)} objects, ")


def test_a_converted_slide_is_ok_against_its_source(slide_path, tmp_path):
    target = tmp_path / "slide.ome.zarr"
    convert(slide_path, target, ConvertConfig(keep_associated=True))
    write_manifest(target, source=slide_path.name)
    assert found(target, source=slide_path) == []
    assert found(target, source=slide_path.parent) == []


@pytest.mark.parametrize("shape", [(1, 33, 65), (2, 64, 31), (1, 1, 70), (3, 70, 1)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_every_shape_and_type_is_ok(tmp_path, picture, shape, dtype):
    target = tmp_path / "a.zarr"
    write_pyramid(picture(shape, dtype), target, ConvertConfig(chunk_px=8, shard_px=16, coarsest_px=8))
    write_manifest(target)
    assert found(target) == []


@pytest.mark.parametrize(
    "name",
    [
        "ome-zarr-py-create/astronaut_v04.ome.zarr",
        "galaxy-v05/input10.zarr",
        "bioformats2raw-v04/astronaut.zarr",
    ],
)
def test_stores_of_other_programs_are_ok(test_data, name):
    report = verify(test_data / "ngff" / name)
    assert report.findings == ()
    assert not report.has_manifest
    assert report.notes == ("without a manifest, damage that still decodes may not be seen",)


# --- damage


class Blob:
    """Bytes, open."""

    stamp = None

    def __init__(self, data):
        self.data = data

    def read(self, start, nbytes):
        return self.data[start : start + nbytes]

    def tail(self, nbytes):
        return self.data[-nbytes:], len(self.data)

    def whole(self, max_bytes):
        return self.data

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class OneObject:
    """A store of one object."""

    is_remote = False

    def __init__(self, policy, data):
        self.policy, self.data = policy, data

    def open(self, key):
        return Blob(self.data)


def test_every_byte_of_every_object_counts(whole):
    manifest = parse_manifest(Path(manifest_place(whole)).read_bytes())
    pyramid = open_pyramid(whole)
    policy = pyramid._store.policy
    num_flips = 0
    for key, entry in manifest.entries.items():
        if entry.crc32c is None:
            continue
        data = bytearray((whole / key).read_bytes())
        for place in range(len(data)):
            data[place] ^= 1 << place % 8
            one = OneObject(policy, bytes(data))
            reason = check_object(one, key, len(data), array=None, entry=entry, is_quick=False)
            assert reason.startswith("is damaged: its crc32c is ")
            data[place] ^= 1 << place % 8
            num_flips += 1
    assert num_flips > 20_000


@pytest.mark.parametrize("seed", range(12))
def test_flipped_bytes_are_told_with_their_object(store, seed):
    rng = random.Random(seed)
    files = [path for path in sorted(store.rglob("*")) if path.is_file()]
    path = rng.choice([path for path in files if (path.name == "zarr.json") == (seed % 2 == 0)])
    flip(path, rng.randrange(path.stat().st_size), 1 << rng.randrange(8))
    key = path.relative_to(store).as_posix()
    findings = found(store)
    assert [reason for other, reason in findings if other == key and "is damaged: its crc32c is" in reason]


def test_a_damaged_chunk_is_one_line(store):
    flip(store / "0/c/0/1/1", 40)
    ((key, reason),) = found(store)
    assert key == "0/c/0/1/1"
    assert reason.startswith("is damaged: its crc32c is ")


def test_a_damaged_manifest_is_told(store):
    place = Path(manifest_place(store))
    for at in random.Random(0).sample(range(place.stat().st_size), 8):
        flip(place, at)
        findings = found(store, quick=True)
        assert "a.ome.zarr.manifest.jsonl" in [key for key, _ in findings]
        flip(place, at)
    assert found(store) == []


def test_objects_that_are_missing_cut_or_surplus_are_told(store):
    (store / "1/c/0/0/1").unlink()
    cut = store / "0/c/0/2/2"
    cut.write_bytes(cut.read_bytes()[:-1])
    (store / "0/c/0/0/0").write_bytes(b"x")
    (store / "0/c/0/2/9").write_bytes(b"x")
    (store / "notes.txt").write_text("x")
    for quick in (True, False):
        reasons = dict(found(store, quick=quick))
        assert reasons["1/c/0/0/1"] == "is missing"
        assert reasons["0/c/0/2/2"].startswith(f"has {cut.stat().st_size} bytes, the manifest says ")
        assert reasons["0/c/0/0/0"].startswith("has 1 bytes, the manifest says that nothing is stored")
        assert reasons["0/c/0/2/9"] == reasons["notes.txt"] == "is not in the manifest"
        assert len(reasons) == 5


def test_a_conversion_that_did_not_end_is_told(store):
    write_manifest(store, absent=["0/c/0/0/0"], is_complete=False)
    assert found(store) == [
        ("a.ome.zarr.manifest.jsonl", "the conversion has not come to its end, run it again")
    ]


def test_without_a_manifest_the_index_and_chunks_are_checked(store):
    forget(store)
    assert found(store) == []
    shard = store / "0/c/0/1/1"
    size, index = shard.stat().st_size, index_nbytes((1, 2, 2))
    for back in range(1, index + 1):
        flip(shard, size - back)
        ((key, reason),) = found(store, quick=False) if back % 16 == 1 else [("0/c/0/1/1", "shard index")]
        assert key == "0/c/0/1/1"
        assert "shard index" in reason
        flip(shard, size - back)
    flip(shard, 0)  # the magic number of zstd
    ((key, reason),) = found(store)
    assert key == "0/c/0/1/1"
    assert "chunk (0, 2, 2) is damaged: zstd cannot decode" in reason
    shard.write_bytes(shard.read_bytes()[: size // 2])
    assert [key for key, _ in found(store)] == ["0/c/0/1/1"]


def test_without_a_manifest_chunks_outside_of_the_grid_are_told(store):
    forget(store)
    (store / "0/c/0/3/0").parent.mkdir()
    for name in ("0/c/0/3/0", "0/c/0/2/03", "1/junk"):
        (store / name).write_bytes(b"x")
    (store / "README").write_text("x")
    assert found(store) == [
        (name, f"lies in the array {name[0]}, but is no part of it")
        for name in ("0/c/0/2/03", "0/c/0/3/0", "1/junk")
    ]


# --- levels


def rewrite(target, folder, change):
    """Change pixels through zarr-python, and the manifest accordingly."""
    array = zarr.open_array(str(target / folder), mode="r+")
    array[...] = change(array[...])
    if Path(manifest_place(target)).exists():
        write_manifest(target, absent=["0/c/0/0/0"] if not (target / "0/c/0/0/0").exists() else [])


def plus_one_at(place):
    def change(pixels):
        pixels[place] += 1
        return pixels

    return change


def test_one_pixel_that_is_not_the_mean_is_told(store, image):
    half = halve(image)
    half[0, 20, 30] += 1
    rewrite(store, "1", plus_one_at((0, 20, 30)))
    first, second = found(store) if len(found(store)) == 2 else (*found(store), None)
    assert first == ("1", "1 values are not the mean of the level above, one at (0, 20, 30), off by 1")
    changed = (halve(half) != open_pyramid(store).read(2)).sum()
    assert (second is None) == (changed == 0)


def test_one_pixel_of_a_mask_is_told(store):
    pixels = open_pyramid(store).label("tissue").read(1)[0]
    row, column = np.argwhere(pixels == 0)[0]
    rewrite(store, "labels/tissue/1", plus_one_at((int(row), int(column))))
    assert found(store)[0] == (
        "labels/tissue/1",
        f"1 values are not the largest value of the level above, one at (0, {row}, {column}), off by 1",
    )


def test_levels_of_other_programs_may_be_resampled_but_not_exchanged(store):
    forget(store)
    rewrite(store, "1", lambda pixels: np.clip(pixels.astype(int) + 20, 0, 255))
    assert found(store) == []
    rewrite(store, "1", lambda pixels: 255 - pixels)
    assert [key for key, _ in found(store)] == ["1", "2"]
    rewrite(store, "labels/tissue/2", lambda pixels: np.full_like(pixels, 7))
    assert "labels/tissue/2" in [key for key, _ in found(store)]


def test_levels_of_another_shape_are_told(tmp_path, picture):
    target = tmp_path / "a.zarr"
    with PyramidWriter(
        target, level_shapes=[(1, 64, 64), (1, 16, 16)], dtype="uint8", chunk_px=16, shard_px=64
    ) as writer:
        writer.write_shard(0, (0, 0), picture((1, 64, 64)))
        writer.write_shard(1, (0, 0), picture((1, 64, 64))[:, ::4, ::4])
    assert found(target) == []
    write_manifest(target)
    assert found(target) == [("1", "its shape (1, 16, 16) is not half of (1, 64, 64), rounded up")]


# --- structure


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_both_validators_are_asked(store):
    forget(store)

    def shift_first(content):
        transforms = content["attributes"]["ome"]["multiscales"][0]["datasets"][1][
            "coordinateTransformations"
        ]
        transforms.reverse()

    edit(store / "zarr.json", shift_first)
    validators = [reason.split(":")[0] for key, reason in found(store, quick=True) if key == "zarr.json"]
    assert "yaozarrs" in validators
    assert "ome-zarr-models" in validators


def test_without_validators_the_rest_is_checked_and_the_summary_says_what_to_install(store, monkeypatch):
    import sys

    for name in ("yaozarrs", "ome_zarr_models"):
        monkeypatch.setitem(sys.modules, name, None)
    report = verify(store)
    assert report.ok
    assert report.notes == (
        "metadata not validated by yaozarrs and ome-zarr-models: pip install 'ats-stream[verify]'",
    )
    forget(store)
    edit(store / "1/zarr.json", lambda content: content.update(dimension_names=["c", "x", "y"]))
    assert found(store) == [
        ("1/zarr.json", "dimension_names are ['c', 'x', 'y'], the image's axes ['c', 'y', 'x']")
    ]


def test_what_cannot_be_opened_is_a_finding_and_no_store_an_error(store, tmp_path):
    forget(store)
    (store / "1/zarr.json").write_text("{")
    reasons = dict(found(store))
    assert reasons["1/zarr.json"] == "is no JSON object"
    assert "broken zarr.json" in reasons["zarr.json"]
    (store / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group"}))
    assert {key for key, _ in found(store)} == {"zarr.json", "1/zarr.json"}
    with pytest.raises(SlideError, match="no such file or folder"):
        verify(tmp_path / "none.zarr")


# --- sources


def test_a_store_that_is_not_its_source_is_told(store, slide_path, tmp_path, image):
    assert found(store, source=slide_path)[0][1].startswith("is uint8 (3, 75, 90), the source uint8 (3, 2967")
    other = tmp_path / "other.zarr"
    write_pyramid(np.roll(image, 1, axis=1), other, CONFIG, pixel_size_um=0.25)
    size, pixels = found(store, source=other)
    assert size == ("zarr.json", "pixel size 0.5 x 0.5 um, the source states 0.25 x 0.25 um")
    assert pixels[1].startswith("16 of 16 patches differ from the source, the first at ")
    with pytest.raises(SlideError, match=r"the source of .* is not there: no none.svs in it"):
        verify(store, source=tmp_path)
    write_manifest(store, absent=["0/c/0/0/0"], source="other.zarr")
    assert len(found(store, source=tmp_path)) == 2
    assert len(found(store)) == 2  # it lies beside the store
    shutil.rmtree(other)
    assert found(store) == []


# --- other kinds of stores


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_a_zip_is_verified_by_the_manifest_or_by_its_own_checksums(store, method):
    packed = store.with_name("a.ome.zarr.zip")
    with zipfile.ZipFile(packed, "w", method) as archive:
        for path in sorted(store.rglob("*")):
            archive.write(path, path.relative_to(store).as_posix())
    assert found(packed) == []
    with zipfile.ZipFile(packed) as archive:
        member = archive.getinfo("0/c/0/1/1")
    flip(packed, member.header_offset + 30 + len(member.filename) + member.compress_size // 2)
    assert [key for key, _ in found(packed)] == ["0/c/0/1/1"]
    forget(store)
    assert [key for key, _ in found(packed)] == ["0/c/0/1/1"]


@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_store_behind_http_is_verified_without_a_list(store, serve, with_manifest):
    server = serve(store.parent)
    if not with_manifest:
        forget(store)
    report = verify(f"{server.url}/a.ome.zarr")
    assert report.findings == ()
    assert "objects cannot be listed: those that do not belong there are not seen" in report.notes
    assert report.num_bytes == sum(p.stat().st_size for p in store.rglob("*") if p.is_file())
    flip(store / "0/c/0/1/1", 0)
    assert [key for key, _ in found(f"{server.url}/a.ome.zarr")] == ["0/c/0/1/1"]
