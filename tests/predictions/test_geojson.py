"""Boxes for QuPath: closed rings in level-0 pixels, ordered by what patches count for."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING

import pytest
from samples import bad_record, record

from ats_stream.predictions.geojson import patches_geojson

if TYPE_CHECKING:
    from ats_stream.predictions.record import SlideRecord


def features(one: SlideRecord) -> list[dict]:
    collection = json.loads(patches_geojson(one))
    assert collection["type"] == "FeatureCollection"
    return collection["features"]


def test_each_patch_is_a_closed_square() -> None:
    one = record()
    found = features(one)
    assert len(found) == 6
    corners = set()
    for feature in found:
        (ring,) = feature["geometry"]["coordinates"]
        assert feature["type"] == "Feature"
        assert feature["geometry"]["type"] == "Polygon"
        assert ring[0] == ring[-1]
        left, top = ring[0]
        assert ring == [[left, top], [left + 64, top], [left + 64, top + 64], [left, top + 64], [left, top]]
        corners.add((top, left))
    assert corners == set(zip(one.patches.y, one.patches.x, strict=True))


def test_properties_are_those_that_qupath_reads() -> None:
    found = features(record())
    assert len({uuid.UUID(feature["id"]) for feature in found}) == 6
    for feature in found:
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        assert isinstance(properties["name"], str)
        assert set(properties["classification"]) == {"name", "color"}
        assert all(isinstance(value, int | float) for value in properties["measurements"].values())


def test_the_first_counts_for_most_and_shares_sum_to_1() -> None:
    one = record()
    shares = [feature["properties"]["measurements"]["share"] for feature in features(one)]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    total = sum(one.patches.counts_for)
    assert shares[0] == max(one.patches.counts_for) / total
    assert [f["properties"]["name"] for f in features(one)] == [f"patch {n}" for n in range(1, 7)]


def test_the_bytes_are_the_same_every_time_and_a_bad_slide_has_none() -> None:
    assert patches_geojson(record()) == patches_geojson(record())
    assert features(bad_record()) == []
