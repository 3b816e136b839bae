"""What is missing, broken or cut short is one line that names the slide; nothing passes for whole."""

from __future__ import annotations

import errno
import json
import os
import shutil

import numpy as np
import pytest

from ats_stream.errors import SlideError
from ats_stream.io import PyramidWriter, open_pyramid
from ats_stream.io.shard import index_nbytes

CHUNK, SHARD = 32, 64
GRID = (1, 2, 2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    target = tmp_path_factory.mktemp("whole") / "slide.zarr"
    rng = np.random.default_rng(0)
    with PyramidWriter(
        target, level_shapes=[(3, 64, 128), (3, 32, 64)], dtype="uint8", chunk_px=CHUNK, shard_px=SHARD
    ) as writer:
        for column in range(2):
            writer.write_shard(0, (0, column), rng.integers(0, 255, (3, 64, 64), dtype=np.uint8))
        writer.write_shard(1, (0, 0), rng.integers(0, 255, (3, 32, 64), dtype=np.uint8))
    return target


@pytest.fixture
def slide(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "slide.zarr")


def one_line(caught, slide):
    assert str(caught.value).startswith(f"{slide}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.slide == str(slide)


def refused(slide, says):
    with pytest.raises(SlideError, match=says) as caught:
        open_pyramid(slide)
    one_line(caught, slide)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_path_that_does_not_exist(tmp_path):
    refused(tmp_path / "none.zarr", "no such file or folder")


def test_a_file_instead_of_a_folder(tmp_path):
    (tmp_path / "f").write_text("x")
    refused(tmp_path / "f", "not a slide")


def test_a_folder_without_metadata(slide):
    (slide / "zarr.json").unlink()
    refused(slide, "neither zarr.json nor .zattrs")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "\x00", "[" * 100_000])
@pytest.mark.parametrize("place", ["zarr.json", "0/zarr.json"])
def test_broken_json(slide, text, place):
    (slide / place).write_text(text)
    refused(slide, r"broken zarr\.json")


def test_json_cut_at_any_length(slide):
    text = (slide / "zarr.json").read_bytes()
    for length in range(0, len(text) - 1, 7):
        (slide / "zarr.json").write_bytes(text[:length])
        refused(slide, r"broken zarr\.json")


def test_an_array_instead_of_a_group(slide):
    refused(slide / "0", "not that of a group")


def test_a_missing_level(slide):
    shutil.rmtree(slide / "1")
    refused(slide, "level '1' is missing")


@pytest.mark.parametrize(
    ("url", "options", "says"),
    [
        ("ftp://host/slide.zarr", {}, "ftp://host/slide.zarr: expected a URL of s3://"),
        ("s3:///slide.zarr", {}, "expected a URL of s3://"),
        ("https://me:word@host/a.zarr?sig=word", {}, "https://host/a.zarr: a URL with '[?]' or '#' cannot"),
        ("s3://bucket/a.zarr", {"secret_key": "word"}, "'secret_key' is not valid"),
        (
            "s3://bucket/a.zarr",
            {"timeout_s": "word"},
            "timeout_s must be a number of at least 0.001, got str",
        ),
        ("s3://bucket/a.zarr", {"max_retries": -1}, "max_retries must be a number of at least 0"),
        ("http://host/a.zarr", {"region": "word"}, "options .'region'. are not for http"),
        ("az://container/a.zarr", {}, "Account must be specified"),
    ],
)
def test_urls_and_options_that_cannot_be_used(url, options, says):
    with pytest.raises(SlideError, match=says) as caught:
        open_pyramid(url, storage_options=options)
    assert "\n" not in str(caught.value)
    assert "word" not in str(caught.value)


def test_options_for_a_path_are_refused(slide):
    with pytest.raises(SlideError, match="storage options are for URLs"):
        open_pyramid(slide, storage_options={"region": "x"})


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("shape", [64, 128], r"shape \(64, 128\)"),
        ("shape", [3, 64, 0], "broken array metadata"),
        ("shape", [3, 64, -5], "broken array metadata"),
        ("shape", "abc", "broken array metadata"),
        ("shape", [3, 16, 16], "level 1 .* is larger than the level before"),
        ("shape", [1, 64, 128], "level 1 is uint8"),
        ("data_type", "uint16", "level 1 is uint8"),
        (
            "chunk_grid",
            {"name": "regular", "configuration": {"chunk_shape": [3, 50, 50]}},
            "no multiples of chunks",
        ),
        (
            "chunk_grid",
            {"name": "regular", "configuration": {"chunk_shape": [64, 64]}},
            "broken array metadata",
        ),
        ("codecs", 5, "broken array metadata"),
        ("codecs", [], "zarr-python cannot open it|broken array metadata"),
        ("node_type", "group", "not a zarr v3 array"),
        ("zarr_format", 7, "cannot open it"),
    ],
)
def test_array_metadata_that_do_not_fit(slide, key, value, says):
    edit(slide / "0" / "zarr.json", lambda meta: meta.update({key: value}))
    if key == "codecs" and value == []:
        # an empty chain is legal for the parser: the chunks then have the wrong size
        with pytest.raises(SlideError):
            open_pyramid(slide).read(0)
        return
    refused(slide, says)


@pytest.mark.parametrize("place", ["top", "inner"])
def test_an_unknown_codec_is_named(slide, place):
    def change(meta):
        inner = meta["codecs"][0]["configuration"]["codecs"]
        (meta["codecs"] if place == "top" else inner).append({"name": "nonsense", "configuration": {}})

    edit(slide / "0" / "zarr.json", change)
    refused(slide, "level '0': zarr-python cannot open it: .*nonsense")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("file", ["zarr.json", "0/zarr.json", "0/c/0/0/0"])
def test_files_that_may_not_be_read(slide, file):
    (slide / file).chmod(0)
    with pytest.raises(SlideError, match="Permission denied") as caught:
        open_pyramid(slide).read(0)
    one_line(caught, slide)


@pytest.mark.parametrize("file", ["zarr.json", "0/zarr.json", "0/c/0/0/0"])
def test_files_that_the_system_refuses(slide, file, monkeypatch):
    """As before, for whoever may read everything."""
    really = os.open

    def refuse(path, *arguments, **keywords):
        if str(path).endswith(f"{slide.name}/{file}"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return really(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(SlideError, match=r"cannot open .*: Permission denied") as caught:
        open_pyramid(slide).read(0)
    one_line(caught, slide)


def reading_fails(slide, says):
    pyramid = open_pyramid(slide)
    before = pyramid.read_stats(0)
    with pytest.raises(SlideError, match=says) as caught:
        pyramid.read(0)
    one_line(caught, slide)
    assert "level 0: " in str(caught.value)
    assert pyramid.read_stats(0) == before
    # what is whole can still be read
    assert pyramid.read(1).any()


def test_a_shard_cut_at_any_length_is_noticed(slide):
    path = slide / "0" / "c" / "0" / "0" / "1"
    data = path.read_bytes()
    for length in [*range(0, len(data), 997), len(data) - index_nbytes(GRID), len(data) - 1]:
        path.write_bytes(data[:length])
        reading_fails(slide, "shard c/0/0/1: (truncated shard|shard index is damaged)")


def test_bytes_in_front_of_a_shard_are_noticed(slide):
    path = slide / "0" / "c" / "0" / "0" / "0"
    path.write_bytes(b"junk" + path.read_bytes())
    reading_fails(slide, "chunk .* is damaged")


def test_a_damaged_chunk_is_named(slide):
    path = slide / "0" / "c" / "0" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[:40] = b"\xff" * 40
    path.write_bytes(bytes(data))
    reading_fails(slide, r"chunk \(0, 0, 0\) is damaged: zstd cannot decode")


def test_a_shard_that_cannot_be_opened(slide):
    path = slide / "0" / "c" / "0" / "0" / "0"
    path.unlink()
    path.mkdir()
    reading_fails(slide, "cannot read c/0/0/0")


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_link_in_a_circle(slide):
    path = slide / "0" / "c" / "0" / "0" / "0"
    path.unlink()
    path.symlink_to(path)
    reading_fails(slide, "cannot open c/0/0/0")


def test_a_shard_that_is_absent_holds_the_fill_value(slide):
    (slide / "0" / "c" / "0" / "0" / "1").unlink()
    level = open_pyramid(slide).read(0)
    assert (level[:, :, SHARD:] == 0).all()
    assert level[:, :, :SHARD].any()


def test_a_label_listed_outside_of_its_folder_is_not_opened(slide):
    folder = slide / "labels"
    folder.mkdir()
    content = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"ome": {"version": "0.5", "labels": ["../0", "no"]}},
    }
    (folder / "zarr.json").write_text(json.dumps(content))
    assert open_pyramid(slide).label_names == ()
