"""The attention of a slide as a float32 multiscale image (OME-Zarr 0.5) that lies over the slide.

Shape letters: Y, X positions of the map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ats_stream.io import Channel, PyramidWriter
from ats_stream.io.reduce import halve

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

COARSEST_PX = 256
CHUNK_PX = 256


def write_attention(
    path: Path,
    attention_YX: npt.NDArray[Any],
    *,
    downsample: Sequence[float],
    pixel_size_um: Sequence[float] | None,
    name: str,
) -> Path:
    """Write a map (y, x) of attention as an image (c, y, x); one that is there is replaced.

    ``downsample`` is the number of level-0 pixels of the slide under one position, ``pixel_size_um`` the size
    of these. Scale and translation put the centre of the first position on the centre of the pixels under
    it, so the image overlays the slide. Coarser levels are means of 2 x 2. The channel's window reaches from
    0 to the greatest value. Raises StorageError if the disk refuses.
    """
    levels = [np.ascontiguousarray(attention_YX, np.float32)[None]]
    while max(levels[-1].shape[1:]) > COARSEST_PX:
        levels.append(halve(levels[-1]))
    factors = [[f * 2**number for f in downsample] for number in range(len(levels))]
    channel = Channel(label="attention", color="FF8C00", window=(0.0, float(levels[0].max())))
    with PyramidWriter(
        path,
        level_shapes=[level.shape for level in levels],
        dtype=np.float32,
        downsamples=factors,
        pixel_size_um=pixel_size_um,
        chunk_px=CHUNK_PX,
        name=name,
        channels=[channel],
        overwrite=True,
        num_threads=1,
    ) as writer:
        for number, level in enumerate(levels):
            _, height, width = writer.shard_shape(number)
            for row in range(-(-level.shape[1] // height)):
                for column in range(-(-level.shape[2] // width)):
                    box = np.s_[:, row * height : (row + 1) * height, column * width : (column + 1) * width]
                    writer.write_shard(number, (row, column), level[box])
    return path
