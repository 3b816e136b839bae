"""Verify that pyramids are whole: metadata, every object, every chunk, every level.

  ats-stream verify pyramids/*.ome.zarr
  ats-stream verify pyramids --quick
  ats-stream verify s3://bucket/a.ome.zarr --source slides

TARGET is an OME-Zarr folder, a zip file of one, a URL, or a folder of several. With the manifest that
conversion leaves beside a pyramid, any byte that changed is found; without one, as for stores of other
programs, whatever breaks metadata, indices, chunks, or how levels follow from each other.
Each finding is a line: the object and the reason. The exit code is 0 when all is well, 1 when not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ats_stream.errors import EXIT_FAILED

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from ats_stream.io.verification.report import Finding

GROUP_FILES = ("zarr.json", ".zgroup", ".zattrs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ats-stream verify``."""
    from ats_stream.commands.options import add_storage_options

    parser.add_argument("targets", nargs="+", metavar="TARGET", help="OME-Zarr folder, zip file or URL")
    parser.add_argument(
        "--source",
        metavar="SLIDE",
        help="the slide that it was made from, or a folder that holds it under the manifest's name: size, "
        "pixel size and some patches are compared (default: such a slide beside the pyramid)",
    )
    parser.add_argument("--quick", action="store_true", help="compare metadata and sizes alone")
    parser.add_argument(
        "--threads", type=int, dest="num_threads", metavar="N", help="threads (one per core, at most 8)"
    )
    add_storage_options(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Verify the targets one after another; one that cannot be opened is reported and the rest goes on."""
    from ats_stream.commands.options import storage_options_from
    from ats_stream.errors import AtsStreamError, InputError
    from ats_stream.io import verify

    storage_options = storage_options_from(arguments)
    if arguments.num_threads is not None and arguments.num_threads < 1:
        raise InputError(f"--threads must be at least 1, got {arguments.num_threads}")
    targets = list(expand(arguments.targets))
    bad: list[str] = []
    code = 0
    for target in targets:
        try:
            report = verify(
                target,
                source=arguments.source,
                storage_options=storage_options.values_for(target),
                quick=arguments.quick,
                num_threads=arguments.num_threads,
                on_finding=_printer(target),
            )
        except AtsStreamError as error:
            print(f"ats-stream: error: {error}", file=sys.stderr, flush=True)
            code = code or error.exit_code
            bad.append(target)
            continue
        print(report, flush=True)
        if not report.ok:
            code = EXIT_FAILED
            bad.append(target)
    if len(targets) > 1:
        print(f"{len(targets) - len(bad)} of {len(targets)} are whole")
    return {"targets": targets, "bad": bad, "exit_code": code}


def _printer(target: str) -> Any:
    from ats_stream.io.storage.remote import shown

    place = (shown(target) if "://" in target else target).rstrip("/")

    def tell(finding: Finding) -> None:
        print(f"{place}: {finding}", flush=True)

    return tell


def expand(targets: Iterable[str]) -> Iterable[str]:
    """The targets; of a folder that is no store, the stores in it."""
    for target in targets:
        folder = Path(target)
        inside: list[Path] = []
        if "://" not in target and folder.is_dir() and not any((folder / n).is_file() for n in GROUP_FILES):
            inside += sorted([*folder.glob("*.zarr"), *folder.glob("*.zarr.zip")])
        yield from [str(one) for one in inside] or [target]
