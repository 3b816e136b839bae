"""The examples run, at small size, and what they print of themselves holds."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path

import megapixel_digits
import numpy as np
import pytest
import satellite_coast
import slide_to_heatmap
import timm_features
import volume_and_video
from PIL import Image

from ats_stream.io import open_pyramid

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def test_every_script_is_listed_and_tested() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    tests = Path(__file__).read_text()
    for name in SCRIPTS:
        assert f"({name}.py)" in listed
        assert f"{name}.main(" in tests


def test_a_slide_becomes_a_heatmap(
    slide_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = slide_to_heatmap.main(["--small", "--slide", str(slide_path), "--out", str(tmp_path)])
    with Image.open(picture) as shown:
        assert min(shown.size) > 200
    (attention,) = (tmp_path / "predictions" / "attention").glob("*.zarr")
    assert float(open_pyramid(attention).read(0).sum()) == pytest.approx(1.0, abs=1e-4)
    printed = capsys.readouterr().out
    assert all(f"$ ats-stream {name}" in printed for name in ("preprocess", "info", "train", "predict"))


def test_a_mean_over_squares_is_one() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 9, 11), dtype=np.uint8)
    got = slide_to_heatmap.blurred(image, radius=2)
    padded = np.pad(image[0].astype(float), 2, mode="edge")
    expected = [[padded[y : y + 5, x : x + 5].mean() for x in range(11)] for y in range(9)]
    assert got.dtype == np.uint8
    assert np.abs(got[0] - np.array(expected)).max() <= 0.51


@pytest.mark.usefixtures("digits")  # fetched, if need be
def test_megapixel_mnist() -> None:
    folder = os.environ.get("ATS_STREAM_TEST_DATA")
    local = ["--digits", f"{folder}/mnist"] if folder else []
    mass = megapixel_digits.main(["--small", *local])
    assert 10 / 1600 < mass < 1  # 10 of the 40 x 40 cells hold at least their share


def test_the_coast_is_estimated_without_bias(capsys: pytest.CaptureFixture[str]) -> None:
    result = satellite_coast.main(["--small", "--repeat", "20"])
    assert result.exact > 10_000
    for found in (result.by_map, result.evenly):
        error = np.std(found, ddof=1) / math.sqrt(len(found))
        assert abs(np.mean(found) - result.exact) < 4 * error
    assert np.std(result.by_map) < 0.2 * np.std(result.evenly)
    assert "each estimate read 16.7% of the scene" in capsys.readouterr().out


def test_the_coast_of_a_geotiff(test_data: Path) -> None:
    scene = test_data / "geotiff" / "cog_world.tif"
    result = satellite_coast.main(
        ["--scene", str(scene), "--threshold", "0", "--patches", "8", "--repeat", "2"]
    )
    assert result.exact is None  # 648 megapixels are not read to compare
    assert all(found > 0 for found in result.by_map)


def test_volumes_and_videos(test_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--volume", str(test_data / "nd/filament.tif"), "--video", str(test_data / "nd/bikes.mp4")]
    volume_and_video.main(["--small", *files])
    printed = capsys.readouterr().out
    assert "volume: axes czyx" in printed
    assert "video: axes ctyx" in printed


def test_volumes_and_videos_are_made_without_files(capsys: pytest.CaptureFixture[str]) -> None:
    volume_and_video.main(["--small"])
    printed = capsys.readouterr().out
    assert "volume: axes czyx, shape (1, 32, 32, 32)" in printed
    assert "video: axes ctyx, shape (1, 32, 96, 128)" in printed


@pytest.mark.usefixtures("timm")
def test_timm_features(capsys: pytest.CaptureFixture[str]) -> None:
    assert timm_features.main(["--small"]) > 0
    assert "resnet18: 512 features of patches of (64, 64) pixels" in capsys.readouterr().out


def test_a_lightning_module(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning_utilities")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning uses what its own dependencies deprecate
        import lightning_module

        logged = lightning_module.main(["--small"])
    assert math.isfinite(logged["loss"])
    assert "patches (16, 4, 1, 24, 24)" in capsys.readouterr().out
