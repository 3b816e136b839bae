"""The conversion benchmark: its sources are what they claim, its engines run and agree, it judges rightly."""

from __future__ import annotations

import convert
import numpy as np
import pytest
from convert_engines import ENGINES, level_shapes

from ats_stream.io import open_pyramid


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    sides = ("side_px", "lossless_side_px", "array_side_px", "slide_side_px")
    return convert.Data(tmp_path_factory.mktemp("convert"), **dict.fromkeys(sides, 1024))


def only(case, *engines):
    return convert.Case(**{**vars(case), "engines": engines})


def by_name(found):
    return {one["name"]: one for one in found["contestants"]}


def test_every_engine_of_every_case_and_target_exists(data):
    names = {case.name: set(case.engines) for case in (make(data) for make in convert.MAKERS.values())}
    assert set.union(*names.values()) == set(ENGINES)
    for target in convert.TARGETS:
        assert {target.ours, target.peer or target.ours} <= names[target.case]


def test_the_array_is_the_slide_before_it_became_jpeg_and_slides_are_many(data):
    array = np.load(data.array())
    slide = open_pyramid(data.slide(1024)).read(0)
    assert np.abs(array.astype(int) - slide).mean() < 5
    slides = sorted(data.slides().iterdir())
    assert len(slides) == convert.NUM_SLIDES
    assert {path.stat().st_ino for path in slides} == {data.slide(1024).stat().st_ino}


def test_levels_end_where_ours_do():
    assert level_shapes((3, 1000, 601)) == [(3, 1000, 601), (3, 500, 301), (3, 250, 151)]


@pytest.mark.torture
def test_a_slide_is_converted_by_ours_and_decoded_by_the_floor(data, tmp_path):
    case = only(convert.lossless_case(data), convert.OURS, convert.FLOOR, "libvips")
    found = convert.run_case(case, 2, tmp_path)
    ours, floor = by_name(found)[convert.OURS], by_name(found)[convert.FLOOR]
    assert convert.differing(case, found) == []
    assert (ours["mean_difference"], ours["repetitions"], floor["repetitions"]) == (0, 2, 2)
    assert min(ours["mpix_per_cpu_s"], floor["mpix_per_cpu_s"]) > 0
    assert ours["peak_mib"] >= ours["opened_mib"] > 0
    assert ours["bytes"] > found["source_bytes"] > 0
    assert ours["files"] >= 7  # three levels and the group
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_array_pyramids_of_tensorstore_and_ours_are_the_same(data, tmp_path):
    pytest.importorskip("tensorstore")
    case = only(convert.array_case(data), convert.OURS, "tensorstore")
    found = convert.run_case(case, 1, tmp_path)
    assert {one["mean_difference"] for one in found["contestants"]} == {0}
    assert 0.9 < by_name(found)[convert.OURS]["bytes"] / by_name(found)["tensorstore"]["bytes"] < 1.1


@pytest.mark.slow
def test_an_engine_that_fails_is_reported_and_the_others_are_measured(data, tmp_path):
    case = only(convert.pass_case(data), convert.COPY, "re-encoding alone")
    (tmp_path / "no.tiff").write_bytes(b"II*\0")
    found = convert.run_case(convert.Case(**{**vars(case), "source": tmp_path / "no.tiff"}), 1, tmp_path)
    copy, broken = (by_name(found)[name] for name in case.engines)
    assert copy["bytes"] == 4
    assert "not_available" in broken


def test_targets_compare_with_bounds_and_peers():
    lossless = [
        {"name": "ats-stream", "mpix_per_s": 50.0, "mpix_per_cpu_s": 41.0},
        {"name": "ats-stream, one thread", "mpix_per_cpu_s": 41.0},
        {"name": "re-encoding alone", "mpix_per_cpu_s": 60.0},
        {"name": "ngff-zarr", "mpix_per_s": 10.0},
        {"name": "ome-zarr-py", "mpix_per_s": 11.0},
        {"name": "ngff-zarr bin-shrink", "not_available": "gone"},
    ]
    passed = [{"name": "ats-stream pass", "bytes_per_source_byte": 1.05, "peak_mib": 150.0}]
    cases = [{"case": "lossless", "contestants": lossless}, {"case": "pass", "contestants": passed}]
    checks = {check["what"]: (check.get("value"), check["holds"]) for check in convert.check_targets(cases)}
    cpu = "lossless: mpix_per_cpu_s of ats-stream"
    speed = "lossless: mpix_per_s of ats-stream over"
    assert checks[f"{cpu}, one thread, at least"] == (41.0, True)
    assert checks[f"{cpu}, one thread over re-encoding alone, at least"] == (0.6833, False)
    assert checks[f"{speed} ngff-zarr, at least"] == (5.0, True)
    assert checks[f"{speed} ome-zarr-py, at least"] == (4.5455, False)
    assert checks[f"{speed} ngff-zarr bin-shrink, at least"] == (None, None)
    assert checks["pass: bytes_per_source_byte of ats-stream pass, at most"] == (1.05, False)
    assert checks["pass: peak_mib of ats-stream pass, at most"] == (150.0, True)
    assert checks["pass: mpix_per_s of ats-stream pass, at least"] == (None, None)
