"""Show what a pyramid or slide holds: levels, chunks, pixel size, labels, and the bytes on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from ats_stream.io import Pyramid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ats-stream info``."""
    parser.add_argument("pyramids", nargs="+", metavar="PYRAMID", help="OME-Zarr folder")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print a description of each pyramid."""
    from ats_stream.io import open_pyramid

    for place in arguments.pyramids:
        print(describe(open_pyramid(place), place))
    return {"pyramids": arguments.pyramids}


def describe(pyramid: Pyramid, place: str) -> str:
    """Some lines about a pyramid, for a terminal."""
    top = pyramid.levels[0]
    size = ", ".join(f"{um:g}" for um in dict.fromkeys(top.pixel_size_um or ()))
    lines = [
        f"{pyramid.name}  ({place})",
        f"  axes        {', '.join(pyramid.axes)}   {top.dtype}",
        f"  pixel size  {size + ' um' if size else 'unknown'}",
        f"  channels    {', '.join(channel.label for channel in pyramid.channels) or 'not named'}",
        f"  labels      {', '.join(pyramid.label_names) or 'none'}",
    ]
    lines += [f"  {name:<11} {value}" for name, value in sorted(pyramid.metadata.items())]
    lines.append("  level  shape (c, y, x)         downsample  chunk")
    for level in pyramid.levels:
        shape = " x ".join(str(n) for n in level.shape)
        chunk = " x ".join(str(n) for n in level.chunk_shape)
        lines.append(f"  {level.index:<5}  {shape:<23} {max(level.downsample):<10.4g}  {chunk}")
    path = Path(place)
    if path.is_dir():
        sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
        lines.append(f"  on disk     {sum(sizes) / 1e6:.1f} MB in {len(sizes)} files")
    return "\n".join(lines)
