"""The benchmark of a training step: its baselines are exact and equal, its contestants run, it judges."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import train
from synthetic_slide import SlideConfig, make_slide, write_store

from ats_stream.io import open_pyramid


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("train")
    write_store(make_slide(folder, SlideConfig(side_px=train.QUICK.side_px)), folder / "s.ome.zarr", 128)
    return str(folder / "s.ome.zarr")


def test_every_patch_is_every_pixel_and_all_of_the_attention(place: str) -> None:
    engine = train.EveryPatch(place, train.QUICK)
    patches = torch.cat([engine.read(part) for part in engine.parts()]).numpy()
    assert patches.astype(np.int64).sum() == open_pyramid(place).read(0).astype(np.int64).sum()
    attention_P = engine.attention().detach()
    assert attention_P.shape == (len(patches),)
    assert float(attention_P.sum()) == pytest.approx(1, abs=1e-5)


def test_both_baselines_have_the_same_gradient(place: str) -> None:
    kept = train.EveryPatch(place, train.QUICK).gradients()
    twice = train.ComputedTwice(place, dataclasses.replace(train.QUICK, part=77)).gradients()
    assert len(kept) == len(twice) > 4
    for mine, theirs in zip(kept, twice, strict=True):
        assert np.abs(mine).max() > 0
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.torture
def test_contestants_make_steps_and_are_judged(place: str) -> None:
    few = (train.OURS, train.WHOLE)
    found = train.run_case(place, dataclasses.replace(train.QUICK, steps=1), few)
    by_name = {one["name"]: one for one in found["contestants"]}
    assert set(by_name) == set(few)
    assert all(one["wall_ms"] > 0 and one["cpu_ms"] > 0 and one["peak_mib"] > 0 for one in by_name.values())
    checks = [target.check([found]) for target in train.TARGETS]
    assert [check["holds"] is None for check in checks] == [False] * 3 + [True] * 2


@pytest.mark.torture
def test_the_whole_script_at_a_small_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--quick"]) == 0
    said = capsys.readouterr().out
    assert "not available" not in said
    assert "not measured" not in said
