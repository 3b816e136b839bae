"""Convert slides to OME-Zarr 0.5 pyramids: zarr v3, small chunks in big shards, pixel size kept.

  ats-stream preprocess slides/*.svs --out pyramids
  ats-stream preprocess archive.csv --out s3://bucket/pyramids --workers 8

Each slide becomes DIR/<name>.ome.zarr, whole or not at all: the levels of a pyramid and a mask of the
tissue (labels/tissue). Patient tags stay behind, and label and macro pictures unless --keep-associated.
A slide that cannot be converted is reported and the rest goes on; the exit code is then 1, or 2 if none
could be converted. Interrupted, killed or out of space, the same command again goes on where it stood.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ats_stream.errors import EXIT_FAILED, EXIT_USAGE, InputError, StorageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ats_stream.io import ConvertConfig, ConvertFailure, ConvertSummary

USAGE = "SLIDE [SLIDE ...] --out DIR [options]"
RESUMABLE = "what is unfinished stays (*.partial): the same command again goes on from there"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ats-stream preprocess``."""
    from ats_stream.commands.options import add_field, add_storage_options
    from ats_stream.io import PROFILES, ConvertConfig

    default = ConvertConfig()
    parser.add_argument(
        "slides",
        nargs="+",
        metavar="SLIDE",
        help="slide (SVS, NDPI, DICOM, TIFF, OME-TIFF, PNG ...), video or OME-Zarr store; a folder of them; "
        "a CSV table with a column 'slide'; a URL of one, or of a prefix",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder or URL that the pyramids go to")
    add_storage_options(parser)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--skip-existing", action="store_true", help="leave pyramids that exist as they are")
    either.add_argument("--overwrite", action="store_true", help="replace pyramids that exist")
    parser.add_argument("--strict", action="store_true", help="stop at the first slide that fails")
    group = parser.add_argument_group("what is written")
    group.add_argument(
        "--profile",
        choices=PROFILES,
        default=default.profile,
        help="pass: the slide's own JPEG tiles, bit for bit; lossless: zstd; lz4; raw (%(default)s)",
    )
    _add_number(group, "--tile", "--chunk-px", "chunk_px", "side of a chunk, decoded at once (128)")
    _add_number(group, "--shard-px", "shard_px", "side of a shard in pixels: one file (4096)")
    _add_number(group, "--shard-bytes", "shard_bytes", "size of a file, instead of --shard-px")
    _add_number(group, "--levels", "levels", "levels at most (until they fit in 256 pixels)")
    add_field(group, default, "codec_level", "--codec-level", "effort of zstd, 1 to 22")
    group.add_argument(
        "--pixel-size-um",
        type=float,
        metavar="UM",
        help="micrometres per pixel of all slides (default: what each states)",
    )
    group.add_argument(
        "--pixel-size",
        metavar="TABLE",
        help="CSV table with columns slide and pixel_size_um, for slides that state none or a wrong one",
    )
    group.add_argument("--no-tissue", dest="tissue", action="store_false", help="leave the tissue mask out")
    add_field(
        group, default, "tissue_method", "--tissue-method", "how the mask is found: otsu or MODULE:FUNCTION"
    )
    group.add_argument(
        "--keep-associated",
        action="store_true",
        help="copy label and macro pictures, which may show names",
    )
    where = parser.add_argument_group("where it runs")
    where.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes, or tasks of Ray (%(default)s)"
    )
    where.add_argument("--ray", action="store_true", help="tasks on a Ray cluster, spread over its nodes")
    where.add_argument(
        "--address", help="a running Ray cluster (default: $RAY_ADDRESS, else one is started on this machine)"
    )
    where.add_argument(
        "--slide-column", default="slide", metavar="NAME", help="column of tables that names slides (slide)"
    )


def _add_number(group: Any, *flags_field_text: str) -> None:
    """A number that is left to the conversion by default."""
    import argparse

    *flags, field, text = flags_field_text
    group.add_argument(*flags, dest=field, type=int, default=argparse.SUPPRESS, metavar="N", help=text)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Convert the slides, one line each."""
    from ats_stream.commands.options import check_out, config_from, storage_options_from
    from ats_stream.io import ConvertConfig, is_done, preprocess, target_path
    from ats_stream.io.conversion.inputs import expand_inputs, pixel_sizes

    if "://" not in arguments.out:
        check_out(Path(arguments.out), empty=False)
    if arguments.workers < 1:
        raise InputError(f"--workers must be positive, got {arguments.workers}")
    if arguments.address is not None and not arguments.ray:
        raise InputError("--address needs --ray")
    config = config_from(arguments, ConvertConfig)
    options = storage_options_from(arguments).values_for("://")
    slides = expand_inputs(
        arguments.slides,
        slide_column=arguments.slide_column,
        storage_options=options,
        out_dir=None if "://" in arguments.out else arguments.out,
    )
    sizes = pixel_sizes(arguments.pixel_size, slides) if arguments.pixel_size is not None else {}
    # pyramids appear whole, so one that exists is done
    target_options = options if "://" in arguments.out else None
    skipped = []
    if arguments.skip_existing:
        targets = {slide: target_path(slide, arguments.out) for slide in slides}
        skipped = [s for s, place in targets.items() if is_done(place, target_options=target_options)]
    results: list[ConvertSummary | ConvertFailure] = []
    with ExitStack() as stack:
        if arguments.ray:
            from ats_stream.workers import ClusterConfig
            from ats_stream.workers.cluster import ray_cluster

            cluster = ClusterConfig(executor="ray", address=arguments.address)
            stack.enter_context(ray_cluster(cluster, cpus_needed=arguments.workers))
        try:
            for result in preprocess(
                [slide for slide in slides if slide not in skipped],
                arguments.out,
                config,
                workers=arguments.workers,
                on_ray=arguments.ray,
                is_strict=arguments.strict,
                storage_options=options,
                target_options=target_options,
                configs={slide: replace(config, pixel_size_um=size) for slide, size in sizes.items()},
            ):
                _tell(result)
                results.append(result)
        except (KeyboardInterrupt, StorageError):
            print(f"ats-stream: {RESUMABLE}", file=sys.stderr, flush=True)
            raise
    return _outcome(results, slides, skipped, config)


def _tell(result: ConvertSummary | ConvertFailure) -> None:
    from ats_stream.io import ConvertFailure

    if isinstance(result, ConvertFailure):
        print(f"ats-stream: {result}", file=sys.stderr, flush=True)
        return
    print(result, flush=True)
    for note in result.notes:
        print(f"  {note}", flush=True)


def _outcome(
    results: Sequence[ConvertSummary | ConvertFailure],
    slides: Sequence[str],
    skipped: Sequence[str],
    config: ConvertConfig,
) -> dict[str, Any]:
    from ats_stream.io import ConvertFailure, ConvertSummary

    done = [result for result in results if isinstance(result, ConvertSummary)]
    failed = [result.source for result in results if isinstance(result, ConvertFailure)]
    if len(slides) > 1:
        more = f", {len(skipped)} there already" if skipped else ""
        if done:
            num_bytes = [sum(getattr(r, f) for r in done) / 1e6 for f in ("source_bytes", "stored_bytes")]
            print(f"profile {config.profile}: {num_bytes[0]:.1f} -> {num_bytes[1]:.1f} MB in all")
        print(f"{len(done)} of {len(slides)} slides converted, {len(failed)} failed{more}")
    code = 0 if not failed else EXIT_FAILED if done or skipped else EXIT_USAGE
    targets = [r.target if "://" in r.target else os.path.abspath(r.target) for r in done]  # noqa: PTH100
    return {"pyramids": targets, "failed": failed, "skipped": list(skipped), "exit_code": code}
