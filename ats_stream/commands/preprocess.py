"""Convert slides to OME-Zarr 0.5 pyramids: zarr v3, small chunks in big shards, pixel size kept.

  ats-stream preprocess slides/*.svs --out pyramids

Each slide becomes DIR/<name>.ome.zarr, whole or not at all: the levels of a pyramid and a mask of the
tissue (labels/tissue). Patient tags stay behind, and label and macro pictures unless --keep-associated.
A slide that cannot be converted is reported and the rest goes on; the exit code is then 1, or 2 if none
could be converted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ats_stream.errors import EXIT_FAILED, EXIT_USAGE

if TYPE_CHECKING:
    import argparse

USAGE = "SLIDE [SLIDE ...] --out DIR [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ats-stream preprocess``."""
    from ats_stream.commands.options import add_field
    from ats_stream.io import ConvertConfig

    default = ConvertConfig()
    parser.add_argument(
        "slides",
        nargs="+",
        metavar="SLIDE",
        help="slide file: SVS, NDPI, DICOM, TIFF, OME-TIFF, PNG ...",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder that the pyramids go to")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--skip-existing", action="store_true", help="leave pyramids that exist as they are")
    either.add_argument("--overwrite", action="store_true", help="replace pyramids that exist")
    group = parser.add_argument_group("what is written")
    add_field(group, default, "chunk_px", "--chunk-px", "side of a chunk in pixels: what is decoded at once")
    add_field(group, default, "shard_px", "--shard-px", "side of a shard in pixels: one file")
    group.add_argument(
        "--codec", choices=("zstd", "raw"), default=default.codec, help="compression (%(default)s)"
    )
    group.add_argument(
        "--pixel-size-um",
        type=float,
        metavar="UM",
        help="micrometres per pixel (default: what the slide states)",
    )
    group.add_argument("--no-tissue", dest="tissue", action="store_false", help="leave the tissue mask out")
    group.add_argument(
        "--keep-associated",
        action="store_true",
        help="copy label and macro pictures, which may show names",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Convert the slides, one line each."""
    from ats_stream.commands.options import check_out, config_from
    from ats_stream.io import ConvertConfig, ConvertSummary, preprocess, target_path

    out = Path(arguments.out)
    check_out(out, empty=False)
    config = config_from(arguments, ConvertConfig)
    # pyramids appear whole, so one that exists is done
    skipped = [s for s in arguments.slides if arguments.skip_existing and target_path(s, out).is_dir()]
    slides = [slide for slide in arguments.slides if slide not in skipped]
    done: list[str] = []
    failed: list[str] = []
    for summary in preprocess(slides, out, config):
        if isinstance(summary, ConvertSummary):
            print(summary, flush=True)
            done.append(str(summary.target.absolute()))
        else:
            print(f"ats-stream: {summary}", file=sys.stderr, flush=True)
            failed.append(summary.source)
    if len(arguments.slides) > 1:
        more = f", {len(skipped)} there already" if skipped else ""
        print(f"{len(done)} of {len(arguments.slides)} slides converted, {len(failed)} failed{more}")
    code = 0 if not failed else EXIT_FAILED if done or skipped else EXIT_USAGE
    return {"pyramids": done, "failed": failed, "skipped": skipped, "exit_code": code}
