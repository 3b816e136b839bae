"""A slide from SVS to heatmap: convert, train, predict, look.

    python examples/slide_to_heatmap.py --out heatmap [--slide a.svs]

One slide has no labels to learn from, so it becomes a task of its own: which tissue is in focus? Both
halves of the slide are stored once as they are and once blurred, which the small view cannot tell apart;
the left half trains, the right half validates. All steps are commands of ``ats-stream``, printed as they
run. At the end: the attention over the whole slide, as a picture and as an OME-Zarr image.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ats_stream import cli
from ats_stream.demo.assets import fetch_slide
from ats_stream.io import open_pyramid, write_pyramid

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> Path:
    """Run all of it; returns the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("heatmap"))
    parser.add_argument("--slide", type=Path, help="a slide of your own; by default a small one is fetched")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--small", action="store_true", help="two epochs, for a quick look")
    arguments = parser.parse_args(argv)
    slide, out = fetch_slide(local=arguments.slide), arguments.out
    epochs = 2 if arguments.small else arguments.epochs

    command("preprocess", slide, "--out", out / "pyramids", "--skip-existing")
    pyramid = out / "pyramids" / f"{slide.stem}.ome.zarr"
    command("info", pyramid, "--no-thumbnail")

    table = write_task(pyramid, out)
    # 8 patches of 96 px, drawn by attention over a view of 1/8
    sampler = ("--patches", 8, "--patch-px", 96, "--view-downsample", 8)
    command("train", table, "--out", out / "run", "--epochs", epochs, "--batch-size", 2, *sampler)
    command("predict", out / "run", pyramid, "--out", out / "predictions")

    (picture,) = (out / "predictions" / "pictures").glob("*.png")
    attention = open_pyramid(next((out / "predictions" / "attention").glob("*.zarr")))
    peak = np.unravel_index(attention.read(0)[0].argmax(), attention.levels[0].shape[1:])
    print(f"attention {attention.levels[0].shape[1:]} cells, most at row {peak[0]}, column {peak[1]}")
    print(f"picture: {picture}")
    return picture


def command(*words: object) -> None:
    """Run a command as the shell would."""
    line = [str(word) for word in words]
    print(f"\n$ ats-stream {' '.join(line)}")
    if code := cli.main(line):
        raise SystemExit(code)


def write_task(pyramid: Path, out: Path) -> Path:
    """Four images and their table: the left and the right half, in focus and blurred."""
    image = open_pyramid(pyramid)
    pixels_CYX, size_um = image.read(0), image.levels[0].pixel_size_um
    middle = pixels_CYX.shape[2] // 2
    rows = []
    for split, half_CYX in (("train", pixels_CYX[..., :middle]), ("val", pixels_CYX[..., middle:])):
        for label, shown_CYX in (("sharp", half_CYX), ("blurred", blurred(half_CYX))):
            target = out / "task" / f"{split}-{label}.ome.zarr"
            if not target.exists():
                write_pyramid(shown_CYX, target, pixel_size_um=size_um)
            rows.append((target, label, split))
    table = out / "task.csv"
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows([("slide", "label", "split"), *rows])
    return table


def blurred(pixels_CYX: np.ndarray, radius: int = 3) -> np.ndarray:
    """Means over squares of 2 radius + 1 pixels, by sums along both axes."""
    found = pixels_CYX.astype(np.float32)
    for axis in (1, 2):
        ends = [(radius, radius) if one == axis else (0, 0) for one in range(3)]
        padded = np.pad(found, ends, mode="edge")
        length = found.shape[axis]
        found = sum(padded.take(range(start, start + length), axis) for start in range(2 * radius + 1))
        found /= 2 * radius + 1
    return np.rint(found).astype(pixels_CYX.dtype)


if __name__ == "__main__":
    main()
