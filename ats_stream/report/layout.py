"""Where things go on a picture: pure arithmetic on pixels, no drawing.

Boxes are (top, left, bottom, right) in pixels, bottom and right exclusive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid of equal square cells, each with a caption below."""

    num_columns: int
    """Cells in a row."""
    num_rows: int
    """Rows."""
    side_px: int
    """Width and height of a cell without its caption."""
    gap_px: int
    """Space between cells."""
    caption_px: int
    """Height of the caption below each cell."""

    @property
    def width_px(self) -> int:
        """Width of the whole grid."""
        return self.num_columns * (self.side_px + self.gap_px) - self.gap_px

    @property
    def height_px(self) -> int:
        """Height of the whole grid, captions included."""
        return self.num_rows * (self.side_px + self.caption_px + self.gap_px) - self.gap_px

    def corner(self, index: int) -> tuple[int, int]:
        """Top and left of cell `index`, counted along the rows."""
        row, column = divmod(index, self.num_columns)
        return row * (self.side_px + self.caption_px + self.gap_px), column * (self.side_px + self.gap_px)


def fit_within(shape: tuple[int, int], limit: tuple[int, int]) -> tuple[int, int]:
    """The largest (height, width) of the same aspect as `shape` that fits into `limit`, at least 1 x 1.

    >>> fit_within((2967, 2220), (480, 480))
    (480, 359)
    >>> fit_within((10, 1000), (480, 480))
    (5, 480)
    """
    scale = min(limit[0] / shape[0], limit[1] / shape[1])
    height, width = (max(1, min(side, round(size * scale))) for size, side in zip(shape, limit, strict=True))
    return height, width


def patch_boxes(
    offsets_N2: NDArray[Any],
    patch_size: tuple[float, float],
    image_shape: tuple[int, int],
    display_shape: tuple[int, int],
    min_side_px: int,
) -> NDArray[np.int64]:
    """Boxes (N, 4) of patches on a display of the whole image.

    A patch that starts at `offsets_N2` (y, x), in pixels of an image of `image_shape`, covers on the display
    round(offset * s) to round((offset + size) * s) with s = display / image per axis. A box over
    the border is cut; one then smaller than `min_side_px` grows about its centre, staying on the display.

    >>> patch_boxes(np.array([[100, 200]]), (50, 50), (1000, 1000), (100, 100), 4).tolist()
    [[10, 20, 15, 25]]
    """
    display = np.array(display_shape, dtype=np.float64)
    scale = display / np.array(image_shape, dtype=np.float64)
    offsets = np.asarray(offsets_N2, dtype=np.float64).reshape(-1, 2)
    start = np.rint(offsets * scale)
    stop = np.rint((offsets + np.array(patch_size, dtype=np.float64)) * scale)
    start, stop = np.clip(start, 0, display), np.clip(stop, 0, display)
    length = np.maximum(stop - start, np.minimum(min_side_px, display))
    start = np.clip(start - np.floor((length - (stop - start)) / 2), 0, display - length)
    return np.concatenate([start, start + length], axis=1).astype(np.int64)


def grid_for(
    num_cells: int, *, height_px: int, max_width_px: int, max_side_px: int, gap_px: int, caption_px: int
) -> Grid:
    """The grid of `num_cells` with the largest cells that fit into `height_px` by `max_width_px`."""
    best: Grid | None = None
    for num_columns in range(1, max(num_cells, 1) + 1):
        num_rows = math.ceil(max(num_cells, 1) / num_columns)
        by_height = (height_px + gap_px) // num_rows - gap_px - caption_px
        by_width = (max_width_px + gap_px) // num_columns - gap_px
        side = max(1, min(by_height, by_width, max_side_px))
        if best is None or side > best.side_px:
            best = Grid(
                num_columns=num_columns, num_rows=num_rows, side_px=side, gap_px=gap_px, caption_px=caption_px
            )
    assert best is not None  # the loop runs at least once
    return best
