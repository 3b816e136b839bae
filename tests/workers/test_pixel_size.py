"""Which level is read: that of the pixel size of the training, or none, and patches lie where they should."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import yaml
from tiny import MODEL, assert_same_item, attention, visit, weights

from ats_stream.cli import main
from ats_stream.errors import SlideError
from ats_stream.io import ArchiveRow, ConvertConfig, open_pyramid, write_pyramid
from ats_stream.models import PatchClassifier
from ats_stream.workers import PatchSampler, RunConfig, SamplerConfig, TrainerConfig
from ats_stream.workers.executors import SerialExecutor
from ats_stream.workers.pixel_size import full_level, level_0_um
from ats_stream.workers.predict import Predicted, Predictor, Unreadable
from ats_stream.workers.probe import probe
from ats_stream.workers.ray_executor import RayExecutor

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

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


def rows_of(slides: dict[str, Path], sizes: dict[str, float | None]) -> list[ArchiveRow]:
    return [
        ArchiveRow(slide=str(slides[name]), label="", split="", line=0, pixel_size_um=size)
        for name, size in sizes.items()
    ]


GIVEN = {"fine": None, "unknown": 0.25, "odd": 0.25, "half": None, "coarse": 0.25}


@pytest.mark.parametrize("assumed_um", [0.0, 0.26, 7.0])
def test_a_size_of_the_table_is_that_of_its_image_alone(slides: dict[str, Path], assumed_um: float) -> None:
    """Before what the image says, and before what is said of all images."""
    of = predictor().with_pixel_size(assumed_um)
    found = dict(zip(GIVEN, of.predict_each(rows_of(slides, GIVEN)), strict=True))
    # draws are keyed by the number of the row: each is held against the image at its number
    alike = dict.fromkeys(GIVEN, 0.25)
    fine = predictor().predict_each(rows_of(dict.fromkeys(GIVEN, slides["fine"]), alike))
    for name, like in zip(GIVEN, fine, strict=True):
        one = found[name]
        if GIVEN[name] is not None:
            assert isinstance(one, Predicted)
            assert isinstance(like, Predicted)
            for field in ("probability_K", "attention_YX", "offsets_ND", "crops_NCPP", "view_downsample"):
                np.testing.assert_array_equal(getattr(one, field), getattr(like, field))
            assert (one.pixel_size_um, one.patch_px) == ((0.25, 0.25), 64)
            assert one.record().pixel_size_um == 0.25
        elif assumed_um == 7.0:
            assert isinstance(one, Unreadable)
        else:
            assert isinstance(one, Predicted)
            own_um = 0.25 if name == "fine" else 0.5
            assert one.pixel_size_um == pytest.approx((assumed_um or own_um,) * 2)


def test_predictions_with_other_sizes_of_the_table_are_others(slides: dict[str, Path]) -> None:
    given = [{"odd": None}, {"odd": 0.25}, {"odd": 0.35}]
    assert len({predictor().info(rows_of(slides, sizes)).images for sizes in given}) == 3


@pytest.mark.slow
def test_actors_read_at_the_sizes_of_the_table_as_one_process_does(
    slides: dict[str, Path], ray_local: ModuleType
) -> None:
    # the first can be read at its own word as well, at another level: a size that does not travel shows
    given = GIVEN | {"fine": 0.5}
    paths, sizes = [str(slides[name]) for name in given], dict(enumerate(given.values()))
    table = (paths, [0] * len(paths), MODEL, SAMPLER)
    serial = SerialExecutor(PatchSampler(*table, pixel_sizes=sizes))
    actors = RayExecutor(*table, num_samplers=1, cpus_per_sampler=0.1, pixel_sizes=sizes)
    drawn_by, visits = weights(), [visit(image) for image in range(len(paths))]
    try:
        actors.read_ahead(visits[::2])  # of these the view is there before the call that draws
        ray_local.get(actors._last_ahead)
        ray_local.get([actor.come_to_rest.remote() for actor in actors._actors])
        items = [actors.submit(one, drawn_by).result() for one in visits]
    finally:
        actors.close()
    assert items[0].view_CYX.shape == (3, 128, 128)
    fine = PatchSampler([paths[0]] * len(paths), *table[1:])
    for one, mine in zip(visits, items, strict=True):
        assert_same_item(mine, serial.submit(one, drawn_by).result())
        if sizes[one.image] == 0.25:
            np.testing.assert_array_equal(mine.crops_NCPP, fine.sample(one, drawn_by).crops_NCPP)


def test_a_plan_looks_at_images_at_their_sizes(slides: dict[str, Path]) -> None:
    (fine,) = probe(
        rows_of(slides, {"fine": None}), predictor().config, images_per_rank=1, on_cpu=False
    ).images
    (odd,) = probe(rows_of(slides, {"odd": 0.25}), predictor().config, images_per_rank=1, on_cpu=False).images
    assert odd.view_shape == fine.view_shape == (3, 64, 64)


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


def test_training_takes_the_size_of_its_first_image_from_the_table(
    slides: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "t.csv"
    sizes = {"--patches": 4, "--patch-px": 32, "--view-downsample": 8, "--epochs": 1, "--batch-size": 3}
    words = [str(word) for pair in sizes.items() for word in pair]

    def train(first: str, third: str) -> int:
        rows = [("odd", "a", first), ("half", "b", ""), ("unknown", "a", third)]
        lines = [f"{slides[name]},{label},train,{size}\n" for name, label, size in rows]
        table.write_text("slide,label,split,um\n" + "".join(lines))
        options = ["--out", str(tmp_path / "run"), "--pixel-size-um-column", "um"]
        return main(["train", str(table), *options, *words])

    assert train("0.5", "") == 2
    assert "unknown.ome.zarr: its pixel size is unknown, and the model reads 0.5" in capsys.readouterr().err
    assert train("0.5", "0.25") == 0
    assert "view 128 x 128 px at 1/8" in capsys.readouterr().out
    sampler = yaml.safe_load((tmp_path / "run" / "config.yaml").read_bytes())["sampler"]
    assert (sampler["pixel_size_um"], sampler["assumed_pixel_um"]) == (0.5, 0.0)
    assert train("0.5", "0.5") == 2  # the same run, were it not for the third image
    assert "splits or pixel sizes of the table have changed" in capsys.readouterr().err
