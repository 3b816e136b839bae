"""The reading benchmark: its data are what they claim to be, its server answers as HTTP says, it runs."""

import json
import urllib.error
import urllib.request

import imagecodecs
import numpy as np
import pytest
import read
import read_cases
import synthetic_slide
import tifffile
from latency_server import COUNTS, latency_server
from read_engines import needed_chunks
from synthetic_slide import SlideConfig

from ats_stream.io import open_pyramid
from ats_stream.io.shard import parse_index


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return read_cases.Data(tmp_path_factory.mktemp("read"), SlideConfig(side_px=1024), None)


def test_slide_has_its_levels_and_the_pixels_of_its_blocks(data):
    with tifffile.TiffFile(data.slide) as tiff:
        levels = [level.asarray() for level in tiff.series[0].levels]
    assert [level.shape for level in levels] == [(1024, 1024, 3), (256, 256, 3), (64, 64, 3)]
    block = synthetic_slide.tissue_block(0, 0, 0).astype(np.int16)
    assert np.abs(levels[0] - block).mean() < 5
    assert np.array_equal(block, synthetic_slide.tissue_block(0, 0, 0))
    assert not np.array_equal(block, synthetic_slide.tissue_block(0, 0, 1))


def test_store_of_zstd_holds_the_decoded_pixels(data):
    store = open_pyramid(data.zstd(128))
    with tifffile.TiffFile(data.slide) as tiff:
        expected = tiff.pages[0].asarray()
    assert np.array_equal(store.read(0).transpose(1, 2, 0), expected)
    assert store.levels[0].chunk_shape == (3, 128, 128)


def test_store_of_jpeg_holds_the_tiles_of_the_slide(data):
    shard = (data.jpeg() / "0" / "c" / "0" / "0" / "0").read_bytes()
    index = parse_index(shard, (1, 4, 4))
    with tifffile.TiffFile(data.slide) as tiff:
        page = tiff.pages[0]
        for number, (place, size) in enumerate(index.reshape(-1, 2).tolist()):
            tiff.filehandle.seek(page.dataoffsets[number])
            assert shard[place : place + size] == tiff.filehandle.read(page.databytecounts[number])
            assert imagecodecs.jpeg8_decode(shard[place : place + size]).shape == (256, 256, 3)


def test_sparse_store_is_written_at_its_sites_alone(tmp_path):
    synthetic_slide.write_sparse_store(tmp_path / "sparse.ome.zarr", 31622, 128, 0)
    store = open_pyramid(tmp_path / "sparse.ome.zarr")
    assert store.levels[0].shape == (3, 31622, 31622)
    draw = read_cases.site_offsets(31622, 256)
    offsets = draw(np.random.default_rng(0))
    inside = store.read_patches(0, offsets, (256, 256))
    assert store.read_stats(0).stored_bytes > 0
    assert (inside.reshape(len(inside), -1).std(axis=1) > 0).all()
    assert (store.read_patches(0, synthetic_slide.sites(31622) + 512, (256, 256)) == 255).all()


def test_what_was_made_is_kept_until_its_parameters_change(tmp_path):
    made = []

    def make(path):
        made.append(path)
        path.write_text("x")

    for parameters in ({"a": 1}, {"a": 1}, {"a": 2}):
        synthetic_slide.keep(tmp_path / "file", parameters, make)
    assert len(made) == 2
    (tmp_path / "file").unlink()
    synthetic_slide.keep(tmp_path / "file", {"a": 2}, make)
    assert len(made) == 3


def fetch(url, method="GET", **headers):
    request = urllib.request.Request(url, method=method, headers=headers)
    with urllib.request.urlopen(request) as reply:
        return reply.status, reply.headers, reply.read()


def test_server_answers_ranges_and_counts_them(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_bytes(bytes(range(100)))
    (tmp_path / "secret").write_bytes(b"x")
    with latency_server(tmp_path / "in", 0) as server:
        assert fetch(f"{server}/file")[::2] == (200, bytes(range(100)))
        for wanted, part in (("5-9", range(5, 10)), ("90-", range(90, 100)), ("-3", range(97, 100))):
            status, headers, body = fetch(f"{server}/file", Range=f"bytes={wanted}")
            assert (status, body) == (206, bytes(part))
            assert headers["Content-Range"] == f"bytes {part.start}-{part.stop - 1}/100"
        status, headers, body = fetch(f"{server}/file", method="HEAD")
        assert (status, headers["Content-Length"], body) == (200, "100", b"")
        for place, code in (("nothing", 404), ("../secret", 404), ("%2e%2e/secret", 404)):
            with pytest.raises(urllib.error.HTTPError) as error:
                fetch(f"{server}/{place}")
            assert error.value.code == code
            error.value.close()
        assert json.loads(fetch(server + COUNTS)[2]) == {"requests": 8, "bytes": 100 + 5 + 10 + 3}


def test_chunks_under_patches_are_counted_once():
    assert needed_chunks(np.array([[5, 5], [6, 4]]), 10, 10) == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_all_readers_of_a_case_give_the_same_pixels(data):
    (case,) = read_cases.local_cases(data, "random")
    few = [c for c in case.contestants if c.engine in {read_cases.OURS_1, "zarr-python loop", "zstd alone"}]
    found = read.run_case(read_cases.Case(name="few", what="", size_px=256, contestants=tuple(few)), 1)
    by_name = {c["name"]: c for c in found["contestants"]}
    assert read.differing(case, found) == []
    assert by_name["zarr-python loop"]["mean_difference"] == 0
    assert by_name[read_cases.OURS_1]["bytes_per_useful_byte"] > 0
    assert by_name["zstd alone"]["cpu_ms"] > 0


def test_missing_peer_is_reported_and_the_others_are_measured(data):
    draw = read_cases.random_offsets((1024, 1024), 256)
    there, missing = (
        read_cases.Contestant(name=name, engine=read_cases.OURS_1, place=str(place), draw=draw)
        for name, place in (("there", data.zstd(128)), ("missing", data.folder / "nothing"))
    )
    case = read_cases.Case(name="missing", what="", size_px=256, contestants=(missing, there))
    first, second = read.run_case(case, 1)["contestants"]
    assert "no such file" in first["not_available"]
    assert second["cpu_ms"] > 0


def test_targets_compare_ours_with_peers_at_equal_threads():
    cases = [
        {
            "case": "jpeg",
            "contestants": [
                {"name": "ats-stream", "cpu_ms": 1.0, "cpu_ms_min": 0.9},
                {"name": "ats-stream, 1 thread", "cpu_ms": 0.5, "cpu_ms_min": 0.4},
                {"name": "cuCIM", "cpu_ms": 2.0, "cpu_ms_min": 1.0},
                {"name": "cuCIM batch", "cpu_ms": 0.8, "cpu_ms_min": 0.9},
                {"name": "OpenSlide", "not_available": "gone"},
                {"name": "OpenSlide, default cache", "cpu_ms": 4.0, "cpu_ms_min": 4.0},
            ],
        }
    ]
    checks = {c["what"]: c for c in read.check_targets({"cases": cases})}
    both = checks["jpeg: cpu_ms of ats-stream over cuCIM batch"]
    assert (both["ratio"], both["ratio_of_minima"], both["holds"]) == (1.25, 1.0, False)
    assert checks["jpeg: cpu_ms of ats-stream, 1 thread over cuCIM"]["ratio"] == 0.25
    openslide = checks["jpeg: cpu_ms of ats-stream over OpenSlide or OpenSlide, default cache"]
    assert openslide["ratio"] == 0.25
    assert checks["jpeg: cpu_ms of ats-stream, the slide over cuCIM batch"]["holds"] is None


def test_hot_spots_are_four_and_stay_inside():
    offsets = read_cases.clustered_offsets((20480, 20480), 256)(np.random.default_rng(0))
    assert offsets.min() >= 0
    assert offsets.max() <= 20480 - 256
    for spot in range(read_cases.NUM_HOT_SPOTS):
        assert offsets[spot :: read_cases.NUM_HOT_SPOTS].std(axis=0).max() < 2 * read_cases.HOT_SPOT_PX
