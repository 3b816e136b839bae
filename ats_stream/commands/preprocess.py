"""Convert slides to OME-Zarr 0.5 pyramids: zarr v3, small chunks in big shards, pixel size kept.

  ats-stream preprocess slides/*.svs --out pyramids

Each slide becomes OUT/<name>.ome.zarr with the levels of a pyramid and its tissue mask (labels/tissue). Label
and macro pictures and patient tags stay behind unless --keep-associated. A slide that cannot be read is
reported and the rest goes on; the exit code is then 1.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ats-stream preprocess``."""
    from ats_stream.io import ConvertConfig

    default = ConvertConfig()
    parser.add_argument("slides", nargs="+", metavar="SLIDE", help="slide file: SVS, tiled TIFF, ...")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder that the pyramids go to")
    parser.add_argument(
        "--chunk-px", type=int, default=default.chunk_px, metavar="PX", help="side of a chunk (%(default)s)"
    )
    parser.add_argument(
        "--shard-px", type=int, default=default.shard_px, metavar="PX", help="side of a shard (%(default)s)"
    )
    parser.add_argument(
        "--codec", choices=("zstd", "raw"), default=default.codec, help="compression (%(default)s)"
    )
    parser.add_argument(
        "--pixel-size-um", type=float, metavar="UM", help="overrides the pixel size that the slide states"
    )
    parser.add_argument("--no-tissue", dest="tissue", action="store_false", help="leave the tissue mask out")
    parser.add_argument(
        "--keep-associated",
        action="store_true",
        help="copy label and macro pictures, which may show names",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace pyramids that exist")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Convert the slides, one line each."""
    from ats_stream.io import ConvertConfig, ConvertSummary, preprocess

    names = {field.name for field in dataclasses.fields(ConvertConfig)}
    config = ConvertConfig(**{name: value for name, value in vars(arguments).items() if name in names})
    done, failed = [], []
    for summary in preprocess(arguments.slides, arguments.out, config):
        if isinstance(summary, ConvertSummary):
            print(summary, flush=True)
            done.append(str(summary.target))
        else:
            print(f"ats-stream: failed: {summary}", file=sys.stderr, flush=True)
            failed.append(summary.source)
    if len(arguments.slides) > 1:
        print(f"{len(done)} of {len(arguments.slides)} slides converted, {len(failed)} failed")
    return {"pyramids": done, "failed": failed}
