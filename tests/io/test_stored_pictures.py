"""Pictures that a conversion kept beside an image, wherever the store lies."""

from __future__ import annotations

import json
import pickle
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ats_stream.cli import main
from ats_stream.errors import InputError, SlideError
from ats_stream.io import PyramidWriter, open_pyramid
from ats_stream.io.formats import parts

if TYPE_CHECKING:
    from pathlib import Path

RNG = np.random.default_rng(0)
PICTURES = {
    "macro": RNG.integers(0, 255, (3, 30, 40), dtype=np.uint8),
    "label": RNG.integers(0, 2**16, (1, 9, 7), dtype=np.uint16),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with PyramidWriter(tmp_path / "a.zarr", level_shapes=[(3, 20, 20)], dtype="uint8") as writer:
        writer.write_shard(0, (0, 0), np.ones((3, 20, 20), np.uint8))
        for name, picture in PICTURES.items():
            writer.write_associated(name, picture)
    return tmp_path / "a.zarr"


def check(pyramid: Any) -> None:
    for one in (pyramid, pickle.loads(pickle.dumps(pyramid))):
        assert one.associated_names == ("macro", "label")
        for name, picture in PICTURES.items():
            got = one.associated(name)
            assert got.dtype == picture.dtype
            np.testing.assert_array_equal(got, picture)
        with pytest.raises(InputError, match=r"no associated image 'x', there are \('macro', 'label'\)"):
            one.associated("x")


@pytest.mark.parametrize("kind", ["folder", "zip", "server", "zip on a server"])
def test_they_are_read_from_any_store(folder: Path, serve: Any, kind: str) -> None:
    shutil.make_archive(str(folder), "zip", folder)
    if "server" not in kind:
        check(open_pyramid(folder.with_suffix(".zarr.zip") if kind == "zip" else folder))
        return
    server = serve(folder.parent)
    pyramid = open_pyramid(f"{server.url}/{folder.name}{'.zip' if 'zip' in kind else ''}")
    assert not any("associated" in path for path, _ in server.requests)  # until somebody asks
    check(pyramid)


def test_a_bucket_holds_them_too(folder: Path, s3: Any) -> None:
    check(open_pyramid(s3.upload(folder, "kept", "a.zarr"), storage_options=s3.options))


def test_a_store_without_them_has_none(folder: Path, serve: Any) -> None:
    shutil.rmtree(folder / "associated")
    server = serve(folder)
    for pyramid in (open_pyramid(folder), open_pyramid(server.url)):
        assert pyramid.associated_names == ()
        with pytest.raises(InputError, match="no associated image 'macro'"):
            pyramid.associated("macro")
    # a service may refuse a key that is absent
    server.fault = lambda path, count: 403 if "associated" in path else None
    assert open_pyramid(server.url).associated_names == ()
    server.fault = lambda path, count: 500 if "associated" in path else None
    pyramid = open_pyramid(server.url, storage_options={"max_retries": 0})
    with pytest.raises(SlideError, match=r"associated: cannot read .*: the server answered 500"):
        pyramid.associated("macro")


@pytest.mark.parametrize(
    ("listed", "names"), [("macro", ()), (["../..", "/etc", "macro"], ("macro",)), ([], ()), ([7], ("7",))]
)
def test_what_a_group_lists_is_not_believed(folder: Path, listed: Any, names: tuple[str, ...]) -> None:
    group = folder / "associated" / "zarr.json"
    content = json.loads(group.read_text())
    content["attributes"]["ats_stream"]["associated"] = listed
    group.write_text(json.dumps(content))
    assert open_pyramid(folder).associated_names == names


@pytest.mark.parametrize("text", ["{", "[]", '{"zarr_format": 3, "node_type": "array"}'])
def test_a_broken_group_is_an_error_of_one_line(folder: Path, text: str) -> None:
    (folder / "associated" / "zarr.json").write_text(text)
    pyramid = open_pyramid(folder)
    with pytest.raises(SlideError, match=f"^{folder}/associated: ") as caught:
        _ = pyramid.associated_names
    assert "\n" not in str(caught.value)


def test_broken_and_huge_pictures_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyramid = open_pyramid(folder)
    with monkeypatch.context() as patch:
        patch.setattr(parts, "MAX_PICTURE_PX", 30 * 40 - 1)
        with pytest.raises(SlideError, match=r"macro: the picture is too large to be read whole: 40 x 30"):
            pyramid.associated("macro")
    shutil.rmtree(folder / "associated" / "macro")
    with pytest.raises(SlideError, match=r"associated/macro: no OME-Zarr image"):
        pyramid.associated("macro")
    np.testing.assert_array_equal(pyramid.associated("label"), PICTURES["label"])


def test_info_lists_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(folder)]) == 0
    assert "pictures    macro, label" in capsys.readouterr().out
