"""Which files of a folder of predictions belong to an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ats_stream.errors import InputError, MissingFileError
from ats_stream.viewer.predictions import Prediction, Predictions

if TYPE_CHECKING:
    from pathlib import Path


def folder(tmp_path: Path, names: tuple[str, ...], table: str | None = None) -> Predictions:
    for name in names:
        (tmp_path / "attention" / f"{name}.ome.zarr").mkdir(parents=True)
        (tmp_path / "patches").mkdir(exist_ok=True)
        (tmp_path / "patches" / f"{name}.geojson").touch()
    if table is not None:
        (tmp_path / "predictions.csv").write_text(table)
    return Predictions(tmp_path)


def named(found: Prediction) -> str | None:
    if found.attention is None or found.patches is None:
        assert found.attention is found.patches is None
        return None
    assert found.attention.name.removesuffix(".ome.zarr") == found.patches.name.removesuffix(".geojson")
    return found.patches.name.removesuffix(".geojson")


def test_the_row_of_the_path_names_the_files(tmp_path: Path) -> None:
    rows = ("x/a.svs,a-1,b,0.25,9", "y/a.svs,a-2,a,0.75,9", "/z/c.ome.zarr,c,a,1,9")
    table = "\n".join(("slide,name,predicted,p_a,seconds", *rows))
    found = folder(tmp_path, ("a-1", "a-2", "c"), table)
    assert [named(found.of(place)) for place in ("x/a.svs", "y/a.svs", "/z/c.ome.zarr/")] == [
        "a-1",
        "a-2",
        "c",
    ]
    assert found.of("x/a.svs").facts == {"predicted": "b", "p_a": "0.25"}
    assert found.slides == ("x/a.svs", "y/a.svs", "/z/c.ome.zarr")


def test_a_moved_image_is_known_by_its_name_if_only_one_has_it(tmp_path: Path) -> None:
    table = "slide,name\nx/a.svs,a-1\ny/a.svs,a-2\nz/c.ome.zarr,c\n"
    found = folder(tmp_path, ("a-1", "a-2", "c", "a"), table)
    assert named(found.of("elsewhere/c.ome.zarr")) == "c"
    assert found.of("elsewhere/a.svs") == Prediction()  # which of the two is not known
    assert named(found.of("elsewhere/d.svs")) is None


def test_paths_are_compared_as_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = folder(tmp_path, ("one", "two"), f"slide,name\n{tmp_path}/d/a.svs,one\n{tmp_path}/e/a.svs,two\n")
    assert named(found.of("e/../e/a.svs")) == "two"
    rows = "s3://b/u.ome.zarr,u\nhttps://host/v.zarr,v\nhttps://other/v.zarr,w\n"
    remote = folder(tmp_path / "r", ("u", "v", "w"), f"slide,name\n{rows}")
    assert named(remote.of("s3://b/u.ome.zarr")) == "u"
    assert named(remote.of("https://me:secret@other/v.zarr?sig=abc")) == "w"


def test_without_a_table_files_are_known_by_the_name(tmp_path: Path) -> None:
    found = folder(tmp_path, ("a", "b.svs"))
    assert named(found.of("x/a.ome.zarr")) == "a"
    assert named(found.of("x/b.svs")) == "b.svs"
    assert found.slides == ()


def test_a_table_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.geojson").touch()
    found = folder(tmp_path / "p", ("a",), "slide,name\nx/a.svs,../../secret\n")
    assert found.of("x/a.svs") == Prediction()


def test_what_is_no_folder_of_predictions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such folder"):
        Predictions(tmp_path / "none")
    with pytest.raises(InputError, match="no predictions"):
        Predictions(tmp_path)
    for text in ("a,b\n1,2\n", "slide\n\x00\n", "slide,name\n,a\n"):
        (tmp_path / "predictions.csv").write_text(text)
        with pytest.raises(InputError, match=r"predictions\.csv"):
            Predictions(tmp_path).of("x")
    (tmp_path / "predictions.csv").write_bytes(b"slide\n\xff\n")
    with pytest.raises(InputError, match=r"predictions\.csv"):
        Predictions(tmp_path)
