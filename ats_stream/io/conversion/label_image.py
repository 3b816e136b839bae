"""A mask as a label image of a pyramid: its levels and metadata. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ats_stream.io import ngff
from ats_stream.io.reduce import halve_labels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Array = npt.NDArray[Any]


def label_image(
    name: str,
    mask_YX: Array,
    num_levels: int,
    *,
    factors: Sequence[float],
    pixel_size_um: Sequence[float] | None,
    colors: Mapping[int, Sequence[int]] | None = None,
) -> tuple[list[Array], dict[str, Any]]:
    """The levels of a mask (y, x) and the attributes of its group; bool is stored as uint8.

    ``factors`` are pixels of the image's level 0, of size ``pixel_size_um``, per pixel of the mask. A label
    image has as many levels as its image, as validators ask: each is coarser by two than the one before, a
    pixel being the largest value under it.
    """
    levels = [mask_YX.astype(np.uint8) if mask_YX.dtype == bool else mask_YX]
    while len(levels) < num_levels:
        levels.append(halve_labels(levels[-1]))
    about: dict[str, Any] = {"version": ngff.VERSION, "source": {"image": "../../"}}
    if colors:
        about["colors"] = [{"label-value": int(v), "rgba": list(c)} for v, c in colors.items()]
    attributes = ngff.build_image(
        name=name,
        axes="yx",
        paths=[str(i) for i in range(num_levels)],
        downsamples=[tuple(f * 2**i for f in factors) for i in range(num_levels)],
        pixel_size_um=pixel_size_um,
        image_label=about,
    )
    return levels, attributes
