"""Large images built from real handwritten digits: the demo's learning task.

Each image is black but for small coloured plates. A few amber plates carry a digit; most of these show the
image's class. Many blue plates carry clutter: digits cut into quarters that are turned and shuffled, so ink
and stroke statistics stay and the digit is gone. The low-resolution view shows the colour of every plate,
that is which objects are digits, but a plate covers about one of its pixels and has the same mean colour
whatever it shows: which digits they are can only be read at full resolution.

Shapes: C = 3 channels; Y X pixels at full resolution; V the view's side in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ats_stream.errors import InputError
from ats_stream.io import PyramidWriter, write_archive

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float64]

GLYPH_PX = 28
AMBER = (120.0, 72.0, 24.0)
BLUE = (30.0, 66.0, 114.0)
INK = 250.0
# mean brightness that ink adds to a plate; the ground is lowered where a glyph holds more than that
MEAN_INK = 12.0
PRIOR_LABEL = "foreground"
TABLE_NAME = "archive.csv"
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """What the images hold."""

    num_train: int = 480
    """Images to train on."""
    num_val: int = 40
    """Images to watch the training with."""
    num_test: int = 160
    """Images of digits that were never trained on."""
    classes: tuple[int, ...] = (0, 1, 2, 3)
    """The digits that occur, and the classes of images."""
    num_matching: int = 5
    """Digits of the image's class in each image."""
    num_other: int = 1
    """Digits of other classes in each image."""
    num_clutter: int = 19
    """Plates of clutter in each image."""
    side_px: int = 8192
    """Side of an image at full resolution."""
    view_downsample: int = 32
    """Downsampling factor of the low-resolution level."""
    plate_px: int = 36
    """Side of a plate."""
    gap_px: int = 96
    """Least distance between plates along either axis, so that a patch shows one."""
    seed: int = 0
    """Seed of everything."""

    def __post_init__(self) -> None:
        if self.side_px % self.view_downsample or self.plate_px < GLYPH_PX:
            raise ValueError(
                f"side_px {self.side_px} must be a multiple of view_downsample {self.view_downsample} "
                f"and plate_px {self.plate_px} at least {GLYPH_PX}"
            )
        if len(self.classes) < 2 or not set(self.classes) <= set(range(10)):
            raise ValueError(f"classes must be at least two digits, got {self.classes}")

    @property
    def num_plates(self) -> int:
        """Objects in each image."""
        return self.num_matching + self.num_other + self.num_clutter


@dataclass(frozen=True)
class Scene:
    """One image as a list of plates."""

    label: int
    corner_P2: npt.NDArray[np.int64]
    """First pixel (y, x) of each plate."""
    plates_PCYX: UInt8Array
    """The plates' pixels."""


def build_archive(
    folder: Path,
    digits: tuple[UInt8Array, UInt8Array],
    config: DigitsConfig,
    *,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Path:
    """Write all images as OME-Zarr pyramids and the archive table; returns the table's path.

    ``digits`` are glyphs (n, 28, 28) uint8 and their labels (n,). Glyphs of the test images occur in no other
    image. Raises TargetExistsError where an image exists already, StorageError when the disk refuses.
    """
    counts = {"train": config.num_train, "val": config.num_val, "test": config.num_test}
    pools = _split_glyphs(digits, config)
    rows: list[tuple[Path, str, str]] = []
    for number, split in enumerate(SPLITS):
        rng = np.random.Generator(np.random.Philox(key=np.array([config.seed, number], np.uint64)))
        for index in range(counts[split]):
            scene = make_scene(pools[split], config, config.classes[index % len(config.classes)], rng)
            target = folder / split / f"{split}-{index:04d}.ome.zarr"
            write_scene(target, scene, config)
            rows.append((target, str(scene.label), split))
            progress(len(rows), sum(counts.values()))
    table = folder / TABLE_NAME
    write_archive(table, rows)
    return table


Glyphs = tuple[UInt8Array, UInt8Array]


def _split_glyphs(digits: Glyphs, config: DigitsConfig) -> dict[str, Glyphs]:
    glyphs, labels = digits
    if glyphs.shape[1:] != (GLYPH_PX, GLYPH_PX) or len(glyphs) != len(labels):
        raise InputError(f"digits must be (n, 28, 28) with n labels, got {glyphs.shape} and {labels.shape}")
    order = np.random.Generator(np.random.Philox(key=config.seed)).permutation(len(glyphs))
    parts = dict(zip(SPLITS, np.split(order, [len(order) * 7 // 10, len(order) * 8 // 10]), strict=True))
    for split, part in parts.items():
        missing = set(config.classes) - set(labels[part].tolist())
        if missing:
            raise InputError(
                f"no glyph of digit {min(missing)} for split {split}: {len(glyphs)} glyphs are too few"
            )
    return {split: (glyphs[part], labels[part]) for split, part in parts.items()}


def make_scene(pool: Glyphs, config: DigitsConfig, label: int, rng: np.random.Generator) -> Scene:
    """Draw the plates of one image of class ``label``."""
    glyphs, labels = pool
    others = [digit for digit in config.classes if digit != label]
    shown = [label] * config.num_matching + [int(rng.choice(others)) for _ in range(config.num_other)]
    plates = [_plate(glyphs[rng.choice(np.flatnonzero(labels == digit))], AMBER, config) for digit in shown]
    plates += [
        _plate(_shuffled(glyphs[rng.integers(len(glyphs))], rng), BLUE, config)
        for _ in range(config.num_clutter)
    ]
    return Scene(label, _corners(config, rng), np.stack(plates))


def _plate(glyph: UInt8Array, colour: tuple[float, float, float], config: DigitsConfig) -> UInt8Array:
    """A glyph in white ink on a coloured plate whose mean colour does not depend on the glyph."""
    border = config.plate_px - GLYPH_PX
    around = (border // 2, border - border // 2)
    ink_YX = np.pad(glyph / 255.0, (around, around))
    # a glyph with more ink than the ground can make up for is drawn paler
    most_ink = (min(colour) + MEAN_INK - 1) / (INK - 1)
    ink_YX *= min(1.0, most_ink / max(ink_YX.mean(), most_ink / 2))
    ground_C = np.array(colour)[:, None, None]
    plate: FloatArray = ground_C + ink_YX * (INK - ground_C)
    excess = plate.mean(axis=(1, 2), keepdims=True) - (ground_C + MEAN_INK)
    plate -= excess * (1 - ink_YX) / (1 - ink_YX).mean()
    # never 0: a plate stands out from the absent ground everywhere
    return np.clip(np.rint(plate), 1, 255).astype(np.uint8)


def _shuffled(glyph: UInt8Array, rng: np.random.Generator) -> UInt8Array:
    half = GLYPH_PX // 2
    quarters = [glyph[y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
    turned = [np.rot90(quarters[i], int(rng.integers(4))) for i in rng.permutation(4)]
    return np.block([turned[:2], turned[2:]])


def _corners(config: DigitsConfig, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    distance = config.plate_px + config.gap_px
    corners: list[npt.NDArray[np.int64]] = []
    for _ in range(1000 * config.num_plates):
        corner = rng.integers(0, config.side_px - config.plate_px + 1, 2)
        if all(np.abs(corner - other).max() >= distance for other in corners):
            corners.append(corner)
        if len(corners) == config.num_plates:
            return np.stack(corners)
    raise InputError(f"{config.num_plates} plates do not fit into {config.side_px} x {config.side_px} pixels")


def write_scene(target: Path, scene: Scene, config: DigitsConfig) -> None:
    """Write one image: the touched chunks of full resolution, the low-resolution level, the foreground."""
    view_px = config.side_px // config.view_downsample
    view_CVV = render_view(scene, config)
    with PyramidWriter(
        target,
        level_shapes=[(3, config.side_px, config.side_px), (3, view_px, view_px)],
        dtype="uint8",
        channels=("red", "green", "blue"),
    ) as writer:
        writer.write_chunks(0, render_chunks(scene, config, writer.chunk_px))
        writer.write_shard(1, (0, 0), view_CVV)
        foreground_VV = (view_CVV.max(axis=0) > 0).astype(np.uint8)
        writer.write_label(PRIOR_LABEL, foreground_VV, downsample=config.view_downsample)


def render_chunks(scene: Scene, config: DigitsConfig, chunk_px: int) -> dict[tuple[int, int], UInt8Array]:
    """The chunks (row, column) of full resolution that any plate touches."""
    chunks: dict[tuple[int, int], UInt8Array] = {}
    for (top, left), plate in zip(scene.corner_P2.tolist(), scene.plates_PCYX, strict=True):
        bottom, right = top + config.plate_px, left + config.plate_px
        for row in range(top // chunk_px, -(-bottom // chunk_px)):
            for column in range(left // chunk_px, -(-right // chunk_px)):
                y0, x0 = row * chunk_px, column * chunk_px
                height = min(chunk_px, config.side_px - y0)
                width = min(chunk_px, config.side_px - x0)
                chunk = chunks.setdefault((row, column), np.zeros((3, height, width), np.uint8))
                ya, yb = max(top, y0), min(bottom, y0 + chunk_px)
                xa, xb = max(left, x0), min(right, x0 + chunk_px)
                chunk[:, ya - y0 : yb - y0, xa - x0 : xb - x0] = plate[
                    :, ya - top : yb - top, xa - left : xb - left
                ]
    return chunks


def render_view(scene: Scene, config: DigitsConfig) -> UInt8Array:
    """The low-resolution level: the exact mean of each block of full resolution, halves to even."""
    factor = config.view_downsample
    view_px = config.side_px // factor
    sums = np.zeros((3, view_px, view_px), np.int64)
    cells = -(-config.plate_px // factor) + 1
    for corner, plate in zip(scene.corner_P2, scene.plates_PCYX, strict=True):
        row, column = (corner // factor).tolist()
        top, left = (corner % factor).tolist()
        block = np.zeros((3, cells * factor, cells * factor), np.int64)
        block[:, top : top + config.plate_px, left : left + config.plate_px] = plate
        share = block.reshape(3, cells, factor, cells, factor).sum(axis=(2, 4))
        inside = sums[:, row : row + cells, column : column + cells]
        inside += share[:, : inside.shape[1], : inside.shape[2]]
    return np.rint(sums / factor**2).astype(np.uint8)
