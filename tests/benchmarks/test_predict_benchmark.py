"""The benchmark of prediction: its images are what they claim to be, and a small version runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import predict
import pytest
import synthetic_slide

from ats_stream.io import open_pyramid

if TYPE_CHECKING:
    from pathlib import Path


def test_patches_can_be_drawn_only_where_pixels_are_stored(tmp_path: Path) -> None:
    predict.write_image(tmp_path / "a.ome.zarr", 4096, seed=1)
    image = open_pyramid(tmp_path / "a.ome.zarr")
    assert [level.shape for level in image.levels] == [(3, 4096, 4096), (3, 128, 128)]
    mask = image.label("tissue").read(0)[0] != 0
    cell = predict.VIEW_DOWNSAMPLE
    wanted = np.zeros((128, 128), bool)
    for y, x in synthetic_slide.sites(4096) // cell:
        wanted[y : y + 512 // cell, x : x + 512 // cell] = True
    np.testing.assert_array_equal(mask, wanted)


@pytest.mark.torture
def test_a_small_version_runs_and_holds_its_targets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ATS_STREAM_TEST_DATA", raising=False)
    assert predict.main(["--quick", "--data", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "{" in line]
    found = {line.split(" ", 1)[0]: json.loads(line.split(" ", 1)[1]) for line in lines}
    assert found["synthetic"]["images"] == 4
    # 16 patches of 96 px, each in at most 4 chunks of 128 px
    assert 0 < found["synthetic"]["share_read"] <= 16 * 4 * (128 / 8192) ** 2
    assert found["report"]["images"] == 50
    assert (tmp_path / "many" / "report.html").stat().st_size / 1e6 < 30
