"""The demo's images: the view is the exact mean, plates lie apart, and colour alone tells nothing.

Shapes: C = 3 channels, Y X pixels, V the view's side, P plates.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaozarrs

from ats_stream.demo.digits import (
    AMBER,
    BLUE,
    DigitsConfig,
    Scene,
    build_archive,
    make_scene,
    render_chunks,
    render_view,
)
from ats_stream.errors import InputError, TargetExistsError
from ats_stream.io import open_pyramid, read_archive

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from ats_stream.io import Archive

Digits = tuple["NDArray[np.uint8]", "NDArray[np.uint8]"]

CONFIG = DigitsConfig(
    num_train=4,
    num_val=2,
    num_test=3,
    classes=(0, 1, 7),
    num_matching=3,
    num_other=1,
    num_clutter=4,
    side_px=800,
    view_downsample=16,
    gap_px=20,
)


@pytest.fixture(scope="module")
def built(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return read_archive(build_archive(tmp_path_factory.mktemp("digits"), digits, CONFIG))


def scenes(digits: Digits, config: DigitsConfig = CONFIG, num: int = 4) -> list[Scene]:
    rng = np.random.default_rng(3)
    return [make_scene(digits, config, config.classes[i % len(config.classes)], rng) for i in range(num)]


def full_size(scene: Scene, config: DigitsConfig = CONFIG) -> NDArray[np.uint8]:
    """The whole image, painted plate by plate."""
    image_CYX = np.zeros((3, config.side_px, config.side_px), np.uint8)
    for (y, x), plate_CYX in zip(scene.corner_P2.tolist(), scene.plates_PCYX, strict=True):
        image_CYX[:, y : y + config.plate_px, x : x + config.plate_px] = plate_CYX
    return image_CYX


def test_the_table_lists_every_image_with_its_class_and_split(built: Archive) -> None:
    assert [(row.split, row.label) for row in built] == [
        *(("train", label) for label in "0170"),
        *(("val", label) for label in "01"),
        *(("test", label) for label in "017"),
    ]


def test_images_are_valid_pyramids_whose_view_is_the_exact_mean_of_full_size(built: Archive) -> None:
    for row in built:
        yaozarrs.validate_zarr_store(row.slide)
        pyramid = open_pyramid(row.slide)
        full_CYX, view_CVV = pyramid.read(0), pyramid.read(1)
        assert (full_CYX.shape, view_CVV.shape) == ((3, 800, 800), (3, 50, 50))
        blocks = full_CYX.reshape(3, 50, 16, 50, 16).astype(np.float64)
        np.testing.assert_array_equal(view_CVV, np.rint(blocks.mean(axis=(2, 4))))
        np.testing.assert_array_equal(pyramid.label("foreground").read(0)[0], view_CVV.max(axis=0) > 0)


def test_the_same_seed_gives_the_same_images_and_another_one_others(
    digits: Digits, built: Archive, tmp_path: Path
) -> None:
    again = read_archive(build_archive(tmp_path / "again", digits, CONFIG))
    other = read_archive(build_archive(tmp_path / "other", digits, dataclasses.replace(CONFIG, seed=1)))
    for row, same, differs in zip(built, again, other, strict=True):
        image_CYX = open_pyramid(row.slide).read(0)
        np.testing.assert_array_equal(open_pyramid(same.slide).read(0), image_CYX)
        assert (open_pyramid(differs.slide).read(0) != image_CYX).any()


@pytest.mark.parametrize("chunk_px", [64, 100, 128, 999])
def test_chunks_put_together_are_the_whole_image(digits: Digits, chunk_px: int) -> None:
    for scene in scenes(digits):
        image_CYX = np.zeros((3, 800, 800), np.uint8)
        for (row, column), chunk_CYX in render_chunks(scene, CONFIG, chunk_px).items():
            box = image_CYX[:, row * chunk_px :, column * chunk_px :][:, :chunk_px, :chunk_px]
            assert chunk_CYX.shape == box.shape
            assert chunk_CYX.any()  # chunks that no plate touches are left out
            box[...] = chunk_CYX
        np.testing.assert_array_equal(image_CYX, full_size(scene))


@pytest.mark.parametrize("view_downsample", [1, 5, 16, 32, 50, 200])
def test_the_view_is_the_exact_mean_at_any_factor(digits: Digits, view_downsample: int) -> None:
    config = dataclasses.replace(CONFIG, view_downsample=view_downsample)
    for scene in scenes(digits, config, 2):
        side = 800 // view_downsample
        blocks = full_size(scene).reshape(3, side, view_downsample, side, view_downsample)
        np.testing.assert_array_equal(
            render_view(scene, config), np.rint(blocks.astype(np.float64).mean(axis=(2, 4)))
        )


def test_plates_lie_inside_and_apart(digits: Digits) -> None:
    for scene in scenes(digits, num=12):
        assert scene.corner_P2.min() >= 0
        assert scene.corner_P2.max() <= 800 - 36
        distance = np.abs(scene.corner_P2[:, None] - scene.corner_P2[None]).max(axis=2)
        np.fill_diagonal(distance, 9999)
        assert distance.min() >= 36 + 20


def test_an_image_shows_digits_of_its_class_on_amber_and_clutter_on_blue(digits: Digits) -> None:
    glyphs, labels = digits
    for scene in scenes(digits, num=3):
        assert len(scene.plates_PCYX) == CONFIG.num_plates == 8
        found = [label_on(plate, glyphs, labels) for plate in scene.plates_PCYX]
        assert [label == scene.label for label in found[:3]] == [True] * 3
        assert found[3] in set(CONFIG.classes) - {scene.label}
        is_amber = [plate[0].astype(int).min() > plate[2].astype(int).min() for plate in scene.plates_PCYX]
        assert is_amber == [True] * 4 + [False] * 4


def label_on(plate_CYX: NDArray[np.uint8], glyphs: NDArray[np.uint8], labels: NDArray[np.uint8]) -> int:
    """The label of the glyph that correlates best with the ink of a plate."""
    ink = plate_CYX.sum(axis=0)[4:-4, 4:-4].astype(np.float64).ravel()
    each = glyphs.reshape(len(glyphs), -1).astype(np.float64)
    each -= each.mean(axis=1, keepdims=True)
    score = each @ (ink - ink.mean()) / np.linalg.norm(each, axis=1)
    return int(labels[score.argmax()])


@pytest.mark.parametrize("colour", [AMBER, BLUE])
def test_plates_of_one_kind_have_one_mean_colour_whatever_they_show(
    digits: Digits, colour: tuple[float, float, float]
) -> None:
    from ats_stream.demo.digits import MEAN_INK, _plate

    for glyph in digits[0][:5000:3]:
        mean_C = _plate(glyph, colour, CONFIG).mean(axis=(1, 2))
        # each of 1296 pixels is rounded, the ground to the same side
        assert np.abs(mean_C - np.array(colour) - MEAN_INK).max() <= 0.5


def test_glyphs_of_one_split_occur_in_no_other(digits: Digits) -> None:
    from ats_stream.demo.digits import _split_glyphs

    glyphs, labels = digits
    numbered = np.zeros((len(glyphs), 28, 28), np.uint8)
    numbered[:, 0, 0], numbered[:, 0, 1] = np.divmod(np.arange(len(glyphs)), 251)
    pools = _split_glyphs((numbered, labels), CONFIG)
    seen = [set((part[:, 0, 0].astype(int) * 251 + part[:, 0, 1]).tolist()) for part, _ in pools.values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == len(glyphs)
    for part, part_labels in pools.values():
        index = part[:, 0, 0].astype(int) * 251 + part[:, 0, 1]
        np.testing.assert_array_equal(part_labels, labels[index])


def test_progress_counts_every_image(digits: Digits, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, num_train=2, num_val=0, num_test=1)
    steps: list[tuple[int, int]] = []
    build_archive(tmp_path, digits, config, progress=lambda done, whole: steps.append((done, whole)))
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_images_that_are_there_are_not_overwritten(digits: Digits, built: Archive, tmp_path: Path) -> None:
    build_archive(tmp_path, digits, CONFIG)
    with pytest.raises(TargetExistsError, match=r"train-0000\.ome\.zarr"):
        build_archive(tmp_path, digits, CONFIG)


def test_too_many_plates_are_refused(digits: Digits) -> None:
    with pytest.raises(InputError, match="8 plates do not fit into 800 x 800 pixels"):
        scenes(digits, dataclasses.replace(CONFIG, gap_px=500))


def test_glyphs_that_do_not_fit_are_refused(digits: Digits, tmp_path: Path) -> None:
    glyphs, labels = digits
    with pytest.raises(InputError, match=r"digits must be \(n, 28, 28\) with n labels"):
        build_archive(tmp_path, (glyphs[:, :27], labels), CONFIG)
    with pytest.raises(InputError, match="no glyph of digit 7 for split"):
        build_archive(tmp_path, (glyphs[labels < 2], labels[labels < 2]), CONFIG)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"side_px": 801}, "side_px 801 must be a multiple of view_downsample 16"),
        ({"plate_px": 27}, "plate_px 27 at least 28"),
        ({"classes": (3,)}, r"classes must be at least two digits, got \(3,\)"),
        ({"classes": (3, 10)}, r"classes must be at least two digits, got \(3, 10\)"),
    ],
)
def test_impossible_configurations_name_what_is_wrong(changed: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changed)
