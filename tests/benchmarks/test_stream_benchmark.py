"""The benchmark of the stream: its images are what they claim, its engines agree, it judges rightly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import stream
import stream_engines
from stream_cases import CHUNK_PX, GROWING_PATCH_PX, SPOTS, Growing
from targets import Target

from ats_stream.io import open_pyramid
from ats_stream.workers import SamplerConfig

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

FEW = ("ats-stream", "bare window", "DataLoader")


def test_every_target_is_of_a_case_and_engine_that_there_is() -> None:
    lags, sizes = {f"lag {lag}" for lag in (0, 1, 2)}, set()
    for cell_px in stream.Size().cells_px:
        sizes.add(stream.growing_name(Growing(view_px=stream.Size().view_px, cell_px=cell_px)))
    assert sizes == {"1 gigapixels", "9.76 gigapixels", "102 gigapixels"}
    names = {
        "transport": set(stream_engines.ENGINES),
        "overlap": lags,
        "size": sizes,
    }
    for target in stream.targets(stream.Size()):
        assert {target.ours, target.peer or target.ours} <= names[target.case]


def test_targets_compare_what_was_measured() -> None:
    cases = [{"case": "a", "contestants": [{"name": "x", "n": 3.0}, {"name": "y", "n": 2.0}, {"name": "z"}]}]
    more = Target(case="a", metric="n", ours="x", peer="y", limit=1.5)
    assert (more.check(cases)["measured"], more.check(cases)["holds"]) == (1.5, True)
    assert (
        Target(case="a", metric="n", ours="x", peer="y", limit=1.4, at_least=False).check(cases)["holds"]
        is False
    )
    assert Target(case="a", metric="n", ours="x", limit=3.1).check(cases)["holds"] is False
    for peer, case in (("z", "a"), ("nobody", "a"), ("y", "b")):
        assert Target(case=case, metric="n", ours="x", peer=peer, limit=1).check(cases)["holds"] is None


def test_growing_images_are_stored_where_patches_are_drawn(tmp_path: Path) -> None:
    image = Growing(view_px=96, cell_px=200)
    image.write(tmp_path / "image.ome.zarr")
    pyramid = open_pyramid(tmp_path / "image.ome.zarr")
    assert pyramid.levels[0].shape == (3, 19200, 19200)
    spots_S2 = image.spots()
    assert len(spots_S2) == len({tuple(spot) for spot in spots_S2.tolist()}) == 64
    offsets_S2 = image.offsets(spots_S2)
    # every patch lies on 2 x 2 chunks, all of them stored
    assert (offsets_S2 % CHUNK_PX > CHUNK_PX - GROWING_PATCH_PX).all()
    patches = pyramid.read_patches(0, offsets_S2, (GROWING_PATCH_PX,) * 2)
    assert (patches.reshape(len(patches), -1).std(axis=1) > 0).all()
    assert int((pyramid.label(SPOTS).read(0) > 0).sum()) == 64


@pytest.mark.torture
def test_images_of_any_size_cost_the_same_chunks(tmp_path: Path) -> None:
    size = stream.QUICK
    found = stream.size_case(tmp_path, size)
    assert [one["name"] for one in found["contestants"]] == [
        stream.growing_name(Growing(view_px=size.view_px, cell_px=px)) for px in size.cells_px
    ]
    assert [one["decoded_mib"] for one in found["contestants"]] == [16 * 4 * 3 * CHUNK_PX**2 / 2**20] * 2
    assert all(
        one["wall_ms"] > 0 and one["cpu_ms"] > 0 and one["peak_mib"] > 0 for one in found["contestants"]
    )


@pytest.mark.torture
def test_engines_take_the_same_items(ray_local: ModuleType) -> None:
    work = stream.Work(
        config=SamplerConfig(num_patches=2, patch_px=32), address=ray_local.get_runtime_context().gcs_address
    )
    found: Any = stream.items_case("transport", "", work, num_items=5, turns=1, engines=FEW)
    assert found["pixels_differ"] == []
    by_name = {one["name"]: one for one in found["contestants"]}
    assert set(by_name) == set(FEW)
    assert all(one["items_per_s"] > 0 and one["peak_mib"] > 0 for one in by_name.values())
    assert by_name["ats-stream"]["producer_mib"] > 0
    assert by_name["DataLoader"]["producer_mib"] > 0


def test_canned_patches_are_new_copies_of_the_same_ones() -> None:
    canned = stream_engines.Canned(SamplerConfig(num_patches=2, patch_px=32))
    first, second = (canned.sample(visit, None) for visit in stream_engines.visits(1, 2))
    assert np.array_equal(first.crops_NCPP, second.crops_NCPP)
    assert not np.shares_memory(first.crops_NCPP, second.crops_NCPP)
    assert [item.visit.step for item in (first, second)] == [0, 1]


def test_items_that_are_read_are_the_same_however_they_are_asked_for(tmp_path: Path) -> None:
    size = stream.QUICK
    config = SamplerConfig(num_patches=2, patch_px=64)
    work = stream.read_work(tmp_path, size, "", config)
    wanted = stream_engines.visits(work.num_images, size.num_items)
    plan = stream_engines.plan_of(work, size.num_items)
    planned = [visit for step in range(plan.num_steps) for visit in plan.visits(step)]
    assert [(v.image, v.stream_id) for v in planned] == [(v.image, v.stream_id) for v in wanted]
    sampler, weights = work.sampler(), stream_engines.attention_weights()
    dataset = stream_engines.Images(work, size.num_items)
    crops = [sampler.sample(visit, weights).crops_NCPP for visit in wanted]
    assert all(np.array_equal(dataset[n].numpy(), crops[n]) for n in range(len(dataset)))
    assert len({array.tobytes() for array in crops}) == len(crops)


@pytest.mark.torture
def test_the_whole_script_at_a_small_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert stream.main(["--quick"]) == 0
    said = capsys.readouterr().out
    assert "not available" not in said
    assert "not measured" not in said
