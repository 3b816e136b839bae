"""Run a trained model over pyramids or slides: tables, attention images, drawn patches, pictures.

  ats-stream predict runs/first archive.csv --split test --out predictions
  ats-stream predict runs/first pyramids/*.ome.zarr --out predictions --draws 8

RUN is a run folder (its newest checkpoint is taken) or a checkpoint file; INPUT an archive table, pyramids,
or slides with levels of their own, read in place.
DIR is made and holds, when all is done,

  predictions.parquet       one row an image: probabilities of the classes, their standard errors, the drawn
                            positions with attention and weight, bytes read, seconds, why an image was bad
  predictions.csv           the same without the positions
  attention/NAME.ome.zarr   attention as a multiscale image that lies over the slide
  patches/NAME.geojson      the drawn patches as boxes, for QuPath
  embeddings/NAME.parquet   the features of the drawn patches
  pictures/NAME.png         thumbnail, attention, and the drawn patches with what each counts for
  report.html               how good they are, the best and the worst, in one file; see ats-stream report

A run that was cut off goes on where it was when the same command is given again. An image that cannot be
read gets a row with the reason, the others go on, and the exit code is 1; the same command tries it again.

The same run and images give the same predictions every time. --scheme top takes the most probable positions
instead of drawing; --draws R is the mean over R independent draws, with its standard error.
"""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ats_stream.io import ArchiveRow, StorageOptions
    from ats_stream.predictions.folder import PredictionFolder
    from ats_stream.predictions.record import SlideRecord
    from ats_stream.workers.config import ClusterConfig, RunConfig
    from ats_stream.workers.predict import Predicted, Unreadable

USAGE = "RUN INPUT [INPUT ...] --out DIR [options]"
MAX_BAD_LINES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ats-stream predict``."""
    from ats_stream.commands.options import add_column_options, add_ray_options, add_storage_options
    from ats_stream.sampling import SCHEMES

    parser.add_argument("run_folder", metavar="RUN", help="run folder or checkpoint file")
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="one archive table (.csv, .parquet), or pyramids, or slides",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the results, made or taken up"
    )
    parser.add_argument("--split", metavar="NAME", help="only the rows of this split of the table")
    parser.add_argument(
        "--scheme",
        choices=SCHEMES,
        help="how positions are drawn; top takes the most probable (default: as trained)",
    )
    parser.add_argument(
        "--draws",
        type=int,
        default=1,
        metavar="R",
        help="mean over so many independent draws, with its standard error (1)",
    )
    parser.add_argument(
        "--pixel-size",
        type=float,
        metavar="UM",
        help="pixel size of the images at level 0 in micrometres, in place of what they say, but for those "
        "that the table gives one; a model that was trained at a known size reads the level nearest to that, "
        "and refuses images without one",
    )
    parser.add_argument(
        "--pictures", type=int, metavar="N", help="draw pictures of the first N images only (default: all)"
    )
    add_column_options(parser)
    add_storage_options(parser)
    add_ray_options(parser, ranks=False)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Predict, with a progress bar; what an earlier run has done stays."""
    from ats_stream.commands.options import check_out, cluster_from, progress, storage_options_from
    from ats_stream.commands.report import REPORT_NAME, write_report
    from ats_stream.predictions.folder import taken
    from ats_stream.predictions.names import unique_names
    from ats_stream.report.slides import NUM_SLIDES
    from ats_stream.workers.allocator import keep_freed_memory
    from ats_stream.workers.predict import Predictor

    out = Path(arguments.out)
    check_out(out, empty=False)
    _check_numbers(arguments)
    keep_freed_memory()
    cluster = cluster_from(arguments, num_ranks=1)
    predictor = Predictor.load(arguments.run_folder)
    if arguments.pixel_size is not None:
        predictor = predictor.with_pixel_size(arguments.pixel_size)
    options = storage_options_from(arguments)
    rows = _rows(arguments, predictor.config, options)
    how = {"scheme": arguments.scheme, "draws": arguments.draws}
    names = unique_names([row.name for row in rows])
    with taken(out, predictor.info(rows, **how), names) as folder:
        todo = folder.undone()
        if len(todo) < len(rows):
            print(f"{len(rows) - len(todo)} of {len(rows)} images were done before", flush=True)
        if todo:
            with _running(cluster):
                found = predictor.predict_each(rows, cluster, only=todo, storage_options=options, **how)
                for one in progress(found, total=len(todo), unit="image"):
                    with_picture = arguments.pictures is None or one.row < arguments.pictures
                    write_slide(folder, one, with_picture=with_picture, options=options)
        folder.finish()
        records = list(folder.records())
        write_report(
            [out],
            out / REPORT_NAME,
            title=f"Predictions of {arguments.run_folder}",
            num_slides=NUM_SLIDES,
            options=options,
        )
    return _outcome(out, records)


def write_slide(
    folder: PredictionFolder, one: Predicted | Unreadable, *, with_picture: bool, options: StorageOptions
) -> None:
    """Write all files of a slide, its record last; of one that cannot be read the reason."""
    from dataclasses import replace

    from ats_stream.errors import SlideError
    from ats_stream.workers.predict import Unreadable

    one = replace(one, name=folder.names[one.row])
    if not isinstance(one, Unreadable):
        try:
            _write_files(folder, one, with_picture=with_picture, options=options)
        except SlideError as error:
            one = Unreadable(
                row=one.row, slide=one.slide, name=one.name, split=one.split, label=one.label, error=error
            )
    folder.commit(one.record())


def _write_files(
    folder: PredictionFolder, one: Predicted, *, with_picture: bool, options: StorageOptions
) -> None:
    from ats_stream.files import write_atomic
    from ats_stream.predictions import folder as places
    from ats_stream.predictions.attention_image import write_attention
    from ats_stream.predictions.embeddings import write_embeddings
    from ats_stream.predictions.geojson import patches_geojson
    from ats_stream.report.predictions import THUMBNAIL_PX, Pixels, write_picture

    path, record = folder.path, one.record()
    if with_picture:
        thumbnail = options.open(one.slide).thumbnail(THUMBNAIL_PX)
        pixels = Pixels(thumbnail_CYX=thumbnail, attention_YX=one.attention_YX, crops_NCPP=one.crops_NCPP)
        write_picture(places.picture_path(path, one.name), folder.info, record, pixels)
    write_attention(
        places.attention_path(path, one.name),
        one.attention_YX,
        downsample=one.view_downsample,
        pixel_size_um=one.pixel_size_um,
        name=one.name,
    )
    write_embeddings(places.embeddings_path(path, one.name), record, one.features_NF)
    write_atomic(places.patches_path(path, one.name), patches_geojson(record))


def _outcome(out: Path, records: Sequence[SlideRecord]) -> dict[str, Any]:
    """Say how it went, bad images by name; the result of the job."""
    from ats_stream.commands.report import REPORT_NAME
    from ats_stream.errors import EXIT_FAILED, EXIT_USAGE
    from ats_stream.predictions.table import CSV_NAME, PARQUET_NAME
    from ats_stream.report.predictions import accuracy

    bad = [record for record in records if record.is_bad]
    for record in bad[:MAX_BAD_LINES]:
        print(f"ats-stream: failed: {record.slide}: {record.error}", file=sys.stderr, flush=True)
    if len(bad) > MAX_BAD_LINES:
        print(f"ats-stream: and {len(bad) - MAX_BAD_LINES} more, see {CSV_NAME}", file=sys.stderr, flush=True)
    good = len(records) - len(bad)
    share = accuracy(record.right for record in records)
    score = "" if share is None else f", accuracy {share:.3f}"
    failed = f", {len(bad)} failed" if bad else ""
    print(f"{good} image{'s' * (good != 1)}{score}{failed}; {out / CSV_NAME}, {out / REPORT_NAME}")
    result = out.absolute()
    return {
        "table": str(result / CSV_NAME),
        "parquet": str(result / PARQUET_NAME),
        "report": str(result / REPORT_NAME),
        "accuracy": share,
        "failed": [record.slide for record in bad],
        "exit_code": 0 if not bad else EXIT_FAILED if good else EXIT_USAGE,
    }


def _check_numbers(arguments: argparse.Namespace) -> None:
    from ats_stream.errors import InputError

    if arguments.pictures is not None and arguments.pictures < 0:
        raise InputError(f"--pictures must not be negative, got {arguments.pictures}")
    if arguments.pixel_size is not None and not 0 < arguments.pixel_size < math.inf:
        raise InputError(f"--pixel-size must be positive, got {arguments.pixel_size}")


def _rows(
    arguments: argparse.Namespace, config: RunConfig, storage_options: StorageOptions
) -> tuple[ArchiveRow, ...]:
    from ats_stream.commands.options import archive_from
    from ats_stream.errors import InputError, MissingFileError
    from ats_stream.io import ArchiveRow
    from ats_stream.io.archive import is_table
    from ats_stream.io.storage.remote import has_login

    tables = [place for place in arguments.inputs if is_table(place)]
    if tables:
        if len(arguments.inputs) > 1:
            raise InputError(f"{tables[0]}: a table must be the only input, got {len(arguments.inputs)}")
        # labels of other tasks are numbers, or several classes
        known = config.classes if config.trainer.task == "classification" else None
        archive = archive_from(arguments, tables[0], classes=known)
        return (archive if arguments.split is None else archive.split(arguments.split)).rows
    if arguments.split is not None:
        raise InputError("--split needs an archive table (.csv or .parquet) as input")
    for place in arguments.inputs:
        if has_login(place):  # it would be written with the results
            raise InputError("a user or password stands in a URL: give both as storage options")
        if "://" not in place and not Path(place).exists():
            raise MissingFileError(f"{place}: no such file or folder")
    if len(arguments.inputs) == 1:  # of many, one that cannot be read must not stop the others
        storage_options.open(arguments.inputs[0])
    places = dict.fromkeys(arguments.inputs)
    return tuple(ArchiveRow(slide=place, label="", split="", line=0) for place in places)


def _running(cluster: ClusterConfig) -> Any:
    """Ray for as long as it is needed, or nothing."""
    if cluster.executor != "ray":
        return nullcontext()
    from ats_stream.workers.cluster import ray_cluster

    samplers = cluster.samplers_per_rank
    return ray_cluster(
        cluster,
        cpus_needed=samplers * cluster.cpus_per_sampler,
        gpus_needed=samplers * cluster.gpus_per_sampler,
    )
