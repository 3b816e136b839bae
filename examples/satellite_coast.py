"""The estimator alone: how long is the coast, from a few patches of a scene?

    python examples/satellite_coast.py --scene land_mask.tif --threshold 0

No training here. A map over a small view says where coast may be; positions are drawn from it without
replacement, their patches are read at full resolution, the pixels on the coast counted, and the weights R
make of it an unbiased estimate for the whole scene. With a good map most of the scene need not be read:
drawing evenly, with the same number of patches, is shown beside it.

``--scene`` is anything that ``open_pyramid`` reads: a GeoTIFF, however large, a picture, an OME-Zarr
pyramid. A pixel is land if its first channel is above ``--threshold``. Without a scene an archipelago is
made.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from ats_stream.io import open_pyramid
from ats_stream.sampling import draw, expectation, log_attention, patch_offsets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ats_stream.io import Pyramid

PATCH_PX = 128
MAX_EXACT_PX = 1 << 26  # a scene that is counted whole, to compare


class Result(NamedTuple):
    """Pixels on the coast."""

    by_map: list[float]
    evenly: list[float]
    exact: float | None


def main(argv: Sequence[str] | None = None) -> Result:
    """Estimate several times, each time with other draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scene", type=Path)
    parser.add_argument("--threshold", type=float, default=127)
    parser.add_argument("--patches", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="fewer patches and a smaller archipelago")
    arguments = parser.parse_args(argv)
    num_patches = 24 if arguments.small else arguments.patches
    if arguments.scene is None:
        scene = open_pyramid(archipelago(1536 if arguments.small else 6144))
    else:
        scene = open_pyramid(arguments.scene)
    height, width = scene.levels[0].shape[1:]
    # cells of one patch each: together they are the scene
    map_shape = (math.ceil(height / PATCH_PX), math.ceil(width / PATCH_PX))
    print(f"scene of {height} x {width} pixels, {math.prod(map_shape)} cells, {num_patches} patches drawn")

    log_map_M = log_attention(coast_map(scene, map_shape, arguments.threshold).log().flatten()[None])
    log_even_M = log_attention(torch.zeros(1, math.prod(map_shape)))
    even = 1 / math.prod(map_shape)
    results = {}
    for name, log_q_BM in (("by the map", log_map_M), ("evenly", log_even_M)):
        found = []
        for seed in range(arguments.repeat):
            drawn = draw(log_q_BM, num_patches, seed=seed)
            counts_N = coast_pixels(scene, drawn.index[0], map_shape, arguments.threshold)
            # the mean over cells is a sum of a_i f_i with a_i = 1 / cells; R undoes that q is not a
            attention_BN = torch.full_like(drawn.weight, even)
            mean = expectation(counts_N[None, :, None].to(drawn.weight.dtype), attention_BN, drawn.weight)
            found.append(float(mean) / even)
        results[name] = found
        print(
            f"{name:>10}: {np.mean(found):10.0f} pixels of coast, one estimate +- {np.std(found, ddof=1):.0f}"
        )
    exact = None
    if height * width <= MAX_EXACT_PX:
        everywhere = torch.arange(math.prod(map_shape))
        exact = float(coast_pixels(scene, everywhere, map_shape, arguments.threshold).sum())
        print(f"{'counted':>10}: {exact:10.0f}, reading all of it")
    share = num_patches * PATCH_PX**2 / (height * width)
    print(f"each estimate read {share:.1%} of the scene at full resolution")
    return Result(results["by the map"], results["evenly"], exact)


def coast_map(scene: Pyramid, map_shape: tuple[int, int], threshold: float) -> torch.Tensor:
    """How much coast a cell may hold, from the level with about 8 pixels per cell; never 0, so unbiased."""
    level = scene.level_for(downsample=PATCH_PX / 8)
    view = torch.from_numpy(scene.read(level)[0].astype(np.float32))
    land_YX = (view > threshold).float()[None, None]
    edge_YX = F.max_pool2d(land_YX, 3, 1, 1) + F.max_pool2d(-land_YX, 3, 1, 1)
    return F.adaptive_avg_pool2d(edge_YX, map_shape)[0, 0] + 0.002


def coast_pixels(
    scene: Pyramid, index_N: torch.Tensor, map_shape: tuple[int, int], threshold: float
) -> torch.Tensor:
    """Pixels of each cell whose neighbour to the right or below is of the other kind."""
    whole = tuple(cells * PATCH_PX for cells in map_shape)
    offsets_ND = patch_offsets(index_N[None], map_shape, whole, (PATCH_PX, PATCH_PX))[0]
    counts = []
    for some_ND in offsets_ND.split(256):
        # one pixel more each way, so that neighbours in the next cell are seen; outside there is water
        patches = scene.read_patches(0, some_ND.numpy(), (PATCH_PX + 1, PATCH_PX + 1))[:, 0]
        land = torch.from_numpy(patches.astype(np.float32)) > threshold
        here = land[:, :-1, :-1]
        counts.append(((here != land[:, 1:, :-1]) | (here != land[:, :-1, 1:])).sum(dim=(1, 2)))
    return torch.cat(counts)


def archipelago(side_px: int) -> np.ndarray:
    """Islands, (1, side, side) uint8: smooth noise above a level."""
    noise = torch.randn(1, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    fine = torch.randn(1, 1, 96, 96, generator=torch.Generator().manual_seed(1))
    size = (side_px, side_px)
    height = sum(
        share * F.interpolate(one, size, mode="bicubic", align_corners=False)
        for share, one in ((1.0, noise), (0.2, fine))
    )
    return ((height[0] > 1.0).to(torch.uint8) * 255).numpy()


if __name__ == "__main__":
    main()
