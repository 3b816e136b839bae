"""Which level is read: that of the pixel size of the training, or none, and patches lie where they should."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import yaml
from tiny import MODEL, attention

from ats_stream.cli import main
from ats_stream.errors import SlideError
from ats_stream.io import ArchiveRow, ConvertConfig, open_pyramid, write_pyramid
from ats_stream.models import PatchClassifier
from ats_stream.workers import RunConfig, SamplerConfig, TrainerConfig
from ats_stream.workers.pixel_size import full_level, level_0_um
from ats_stream.workers.predict import Predicted, Predictor, Unreadable

if TYPE_CHECKING:
    from pathlib import Path

SIDE = 1024
SAMPLER = SamplerConfig(num_patches=5, patch_px=32, view_downsample=8, seed=1, pixel_size_um=0.5)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One image at 0.25 um per pixel, its half at 0.5, which is its level 1, and others' sizes."""
    folder = tmp_path_factory.mktemp("sizes")
    config = ConvertConfig(coarsest_px=64, tissue=False)
    fine = np.random.default_rng(0).integers(0, 256, (3, SIDE // 32, SIDE // 32), dtype=np.uint8)
    fine = fine.repeat(32, axis=1).repeat(32, axis=2)
    found = {}
    for name, size in (("fine", 0.25), ("unknown", None), ("odd", 0.35), ("coarse", 2.0)):
        found[name] = folder / f"{name}.ome.zarr"
        write_pyramid(fine, found[name], config, pixel_size_um=size)
    found["half"] = folder / "half.ome.zarr"
    write_pyramid(open_pyramid(found["fine"]).read(1), found["half"], config, pixel_size_um=0.5)
    return found


def predictor(sampler: SamplerConfig = SAMPLER) -> Predictor:
    torch.manual_seed(0)
    model = PatchClassifier(MODEL)
    model.attention.load_state_dict(attention().state_dict())
    config = RunConfig(model=MODEL, sampler=sampler, trainer=TrainerConfig(), classes=("0", "1"))
    return Predictor(model.eval().requires_grad_(False), config)


def predict(slide: Path, of: Predictor | None = None) -> Predicted | Unreadable:
    row = ArchiveRow(slide=str(slide), label="", split="", line=0)
    (found,) = (of or predictor()).predict_each([row])
    return found


def test_a_finer_slide_is_read_at_the_level_of_the_training(slides: dict[str, Path]) -> None:
    fine, half = predict(slides["fine"]), predict(slides["half"])
    assert isinstance(fine, Predicted)
    assert isinstance(half, Predicted)
    for name in ("probability_K", "attention_YX", "attention_N", "weight_N", "crops_NCPP", "features_NF"):
        np.testing.assert_array_equal(getattr(fine, name), getattr(half, name))
    # the same places, in pixels of each one's own level 0
    np.testing.assert_array_equal(fine.offsets_ND, 2 * half.offsets_ND)
    assert (fine.patch_px, half.patch_px) == (64, 32)
    assert (fine.view_downsample, half.view_downsample) == ((16, 16), (8, 8))
    assert fine.record().patch_px == 64


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("unknown", "its pixel size is unknown, and the model reads 0.5 um per pixel"),
        ("odd", "no level near 0.5 um per pixel, which the model reads; its levels have 0.35, 0.7, 1.4, 2.8"),
        ("coarse", "no level near 0.5 um per pixel, which the model reads; its levels have 2, 4, 8, 16"),
    ],
)
def test_other_slides_are_refused_by_name(slides: dict[str, Path], name: str, said: str) -> None:
    found = predict(slides[name])
    assert isinstance(found, Unreadable)
    assert found.error.slide == str(slides[name])
    assert said in found.error.reason


def test_a_size_that_is_given_is_taken(slides: dict[str, Path]) -> None:
    fine, of = predict(slides["fine"]), predictor().with_pixel_size(0.25)
    assert isinstance(fine, Predicted)
    for name in ("unknown", "odd", "coarse"):
        found = predict(slides[name], of)
        assert isinstance(found, Predicted)
        np.testing.assert_array_equal(found.probability_K, fine.probability_K)
        np.testing.assert_array_equal(found.offsets_ND, fine.offsets_ND)
        assert found.pixel_size_um == (0.25, 0.25)
    rows = [ArchiveRow(slide="a", label="", split="", line=0)]
    assert of.key == predictor().key
    assert (of.info(rows).pixel_size_um, predictor().info(rows).pixel_size_um) == (0.25, None)


def test_a_model_of_unknown_size_reads_level_0_of_any(slides: dict[str, Path]) -> None:
    of = predictor(dataclasses.replace(SAMPLER, pixel_size_um=0.0))
    for name in ("fine", "unknown", "odd", "coarse"):
        found = predict(slides[name], of)
        assert isinstance(found, Predicted)
        assert found.patch_px == 32


@pytest.mark.parametrize(
    ("wanted", "level"), [(0.25, 0), (0.21, 0), (0.3, 0), (0.42, 1), (0.6, 1), (0.95, 2)]
)
def test_the_nearest_level_is_taken(slides: dict[str, Path], wanted: float, level: int) -> None:
    assert full_level(open_pyramid(slides["fine"]), wanted, 0.0).index == level


@pytest.mark.parametrize("wanted", [0.19, 0.35, 10.0])
def test_none_that_is_far(slides: dict[str, Path], wanted: float) -> None:
    with pytest.raises(SlideError, match="no level near"):
        full_level(open_pyramid(slides["fine"]), wanted, 0.0)


def test_sizes_are_means_of_both_axes(slides: dict[str, Path]) -> None:
    assert level_0_um(open_pyramid(slides["fine"])) == pytest.approx(0.25)
    assert level_0_um(open_pyramid(slides["unknown"])) is None


@pytest.mark.parametrize("name", ["pixel_size_um", "assumed_pixel_um"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_sizes_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must not be negative"):
        SamplerConfig(**{name: value})


def test_training_reads_at_the_size_of_its_first_image(
    slides: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "t.csv"
    table.write_text(f"slide,label,split\n{slides['fine']},a,train\n{slides['half']},b,train\n")
    words = [
        "--patches",
        "4",
        "--patch-px",
        "32",
        "--view-downsample",
        "8",
        "--epochs",
        "1",
        "--batch-size",
        "2",
    ]

    def train(out: str, *more: str) -> int:
        return main(["train", str(table), "--out", str(tmp_path / out), *words, *more])

    assert train("mixed") == 2
    assert "half.ome.zarr: no level near 0.25 um per pixel" in capsys.readouterr().err
    for out, size in (("both", 0.5), ("any", 0.0)):
        assert train(out, "--read-pixel-size", str(size)) == 0
        sampler = yaml.safe_load((tmp_path / out / "config.yaml").read_bytes())["sampler"]
        assert (sampler["pixel_size_um"], sampler["assumed_pixel_um"]) == (size, 0.0)
