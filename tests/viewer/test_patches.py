"""Patches out of GeoJSON: boxes and weights as QuPath has them, and one line for anything else."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from view_data import feature

from ats_stream.errors import InputError
from ats_stream.viewer import patches as module
from ats_stream.viewer.patches import Patch, read_patches

if TYPE_CHECKING:
    from pathlib import Path


def written(folder: Path, document: Any) -> Path:
    path = folder / "a.geojson"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_boxes_come_sorted_by_weight(tmp_path: Path) -> None:
    features = [feature(-10, 5, 20, 0.2), feature(30, 40, 8, 0.7), feature(0, 0, 1, 0.7)]
    path = written(tmp_path, {"type": "FeatureCollection", "features": features})
    found = read_patches(path)
    assert found == (
        Patch(left=30, top=40, width=8, height=8, weight=0.7),
        Patch(left=0, top=0, width=1, height=1, weight=0.7),
        Patch(left=-10, top=5, width=20, height=20, weight=0.2),
    )
    assert read_patches(written(tmp_path, features)) == found  # QuPath also writes the bare list
    assert read_patches(written(tmp_path, {"features": []})) == ()


@pytest.mark.parametrize(
    ("measurements", "weight"),
    [
        ({"attention": 0.1, "weight": 2.0, "share": 0.3}, 0.3),
        ({"attention": 0.1, "Weight": 2.0}, 2.0),
        ([{"name": "weight", "value": 3}], 3.0),
        ({"area": 7}, 7.0),
        ({"area": 7, "length": 8}, None),
        ({}, None),
        (None, None),
        ({"weight": float("nan")}, None),
    ],
)
def test_the_weight_is_the_measurement_that_says_most(
    tmp_path: Path, measurements: Any, weight: float | None
) -> None:
    one = feature(0, 0, 1, 0)
    one["properties"] = {"measurements": measurements, "name": "patch 1"}
    assert read_patches(written(tmp_path, [one])) == (
        Patch(left=0, top=0, width=1, height=1, weight=weight, name="patch 1"),
    )


def test_patches_without_a_weight_come_last(tmp_path: Path) -> None:
    bare = {**feature(5, 5, 1, 0), "properties": None}
    found = read_patches(written(tmp_path, [bare, feature(0, 0, 1, -1.0)]))
    assert [one.weight for one in found] == [-1.0, None]


@pytest.mark.parametrize(
    "document",
    [
        "",
        "{",
        "[" * 100_000,
        '"text"',
        {"features": {}},
        [{}],
        [None],
        [{"geometry": None}],
        [{"geometry": {"type": "Point", "coordinates": [0, 0]}}],
        [{"geometry": {"type": "Polygon", "coordinates": []}}],
        [{"geometry": {"type": "Polygon", "coordinates": [[]]}}],
        [{"geometry": {"type": "Polygon", "coordinates": [[[0]]]}}],
        [{"geometry": {"type": "Polygon", "coordinates": [[["a", 0]]]}}],
        '[{"geometry": {"type": "Polygon", "coordinates": [[[Infinity, 0]]]}}]',
        [{**feature(0, 0, 1, 1), "properties": {"measurements": {"share": "much"}}}],
        [{**feature(0, 0, 1, 1), "properties": 7}],
    ],
)
def test_anything_else_is_refused_in_one_line_that_names_the_file(tmp_path: Path, document: Any) -> None:
    with pytest.raises(InputError, match=r"a\.geojson: ") as refused:
        read_patches(written(tmp_path, document))
    assert len(str(refused.value).splitlines()) == 1


@given(document=st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(("features", "geometry", "type", "coordinates", "properties")), inner),
    max_leaves=12,
))  # fmt: skip
def test_no_document_gives_another_error(tmp_path_factory: pytest.TempPathFactory, document: Any) -> None:
    path = written(tmp_path_factory.getbasetemp(), document)
    with contextlib.suppress(InputError):
        assert all(isinstance(one, Patch) for one in read_patches(path))


def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, [feature(0, 0, 1, 1)] * 3)
    monkeypatch.setattr(module, "MAX_PATCHES", 2)
    with pytest.raises(InputError, match="at most 2"):
        read_patches(path)
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 10)
    with pytest.raises(InputError, match="bytes"):
        read_patches(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_patches(tmp_path / "none.geojson")
