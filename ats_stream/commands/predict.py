"""Run a trained model over pyramids or slides: a table of probabilities and a picture of each image.

  ats-stream predict runs/first archive.csv --split test --out predictions
  ats-stream predict runs/first pyramids/*.ome.zarr --out predictions

RUN is a run folder (its newest checkpoint is taken) or a checkpoint file; INPUT an archive table, pyramids,
or slides with levels of their own, read in place.
DIR appears when all is done and holds

  predictions.csv   one row an image: probabilities of the classes, and how much of the image was read
  pictures/         thumbnail, attention, and the drawn patches with what each counts for
  report.html       accuracy, confusion table and the first pictures, in one file

The same run and images give the same predictions every time.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Sequence

    from ats_stream.io import ArchiveRow, StorageOptions
    from ats_stream.workers.config import ClusterConfig, RunConfig
    from ats_stream.workers.predict import Predicted

USAGE = "RUN INPUT [INPUT ...] --out DIR [options]"
MAX_PICTURES_IN_REPORT = 24
REPORT_NAME = "report.html"


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
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make for the results")
    parser.add_argument("--split", metavar="NAME", help="only the rows of this split of the table")
    parser.add_argument(
        "--scheme",
        choices=SCHEMES,
        help="how positions are drawn; top takes the most probable (default: as trained)",
    )
    parser.add_argument(
        "--pictures", type=int, metavar="N", help="draw pictures of the first N images only (default: all)"
    )
    add_column_options(parser)
    add_storage_options(parser)
    add_ray_options(parser, ranks=False)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Predict, with a progress bar, into a folder that gets its name when all is done."""
    from ats_stream.commands.options import check_out, cluster_from, progress, storage_options_from
    from ats_stream.errors import InputError
    from ats_stream.report.predictions import TABLE_NAME, accuracy
    from ats_stream.workers.predict import Predictor

    out = Path(arguments.out)
    check_out(out, empty=True)
    if arguments.pictures is not None and arguments.pictures < 0:
        raise InputError(f"--pictures must not be negative, got {arguments.pictures}")
    cluster = cluster_from(arguments, num_ranks=1)
    predictor = Predictor.load(arguments.run_folder)
    storage_options = storage_options_from(arguments)
    rows = _rows(arguments, predictor.config, storage_options)
    with _appearing(out) as folder, _running(cluster):
        found = predictor.predict(rows, cluster, scheme=arguments.scheme, storage_options=storage_options)
        named = _with_own_names(progress(found, total=len(rows), unit="image"), rows)
        predictions = write_results(
            folder,
            named,
            title=f"Predictions of {arguments.run_folder}",
            max_pictures=arguments.pictures,
            storage_options=storage_options,
        )
    share = accuracy(predictions)
    score = "" if share is None else f", accuracy {share:.3f}"
    images = f"{len(predictions)} image{'s' * (len(predictions) != 1)}"
    print(f"{images}{score}; {out / TABLE_NAME}, {out / REPORT_NAME}")
    result = out.absolute()
    return {"table": str(result / TABLE_NAME), "report": str(result / REPORT_NAME), "accuracy": share}


def write_results(
    folder: Path,
    found: Iterable[Predicted],
    *,
    title: str,
    max_pictures: int | None,
    storage_options: StorageOptions | None = None,
) -> list[Predicted]:
    """Write pictures as predictions come, then the table and the report.

    Returns the predictions without their arrays, which only pictures need: an archive may hold any number.
    """
    import numpy as np

    from ats_stream.io import StorageOptions
    from ats_stream.report.page import Page, write_page
    from ats_stream.report.predictions import (
        PICTURES_FOLDER,
        TABLE_NAME,
        THUMBNAIL_PX,
        predictions_section,
        write_picture,
        write_table,
    )

    options = StorageOptions.of(storage_options)
    predictions: list[Predicted] = []
    shown: list[tuple[Predicted, Any]] = []
    for one in found:
        if max_pictures is None or len(predictions) < max_pictures:
            thumbnail = options.open(one.slide).thumbnail(THUMBNAIL_PX)
            write_picture(folder / PICTURES_FOLDER, one, thumbnail)
            if len(shown) < MAX_PICTURES_IN_REPORT:
                shown.append((one, thumbnail))
        nothing = np.empty(0)
        predictions.append(dataclasses.replace(one, attention_YX=nothing, crops_NCPP=nothing))
    write_table(folder / TABLE_NAME, predictions)
    page = Page(title=title, sections=(predictions_section(predictions, shown),))
    write_page(folder / REPORT_NAME, page)
    return predictions


def _rows(
    arguments: argparse.Namespace, config: RunConfig, storage_options: StorageOptions
) -> tuple[ArchiveRow, ...]:
    from ats_stream.commands.options import archive_from
    from ats_stream.errors import InputError
    from ats_stream.io import ArchiveRow
    from ats_stream.io.archive import is_table
    from ats_stream.io.remote import has_login

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
        storage_options.open(place)
    places = dict.fromkeys(arguments.inputs)
    return tuple(ArchiveRow(slide=place, label="", split="", line=0) for place in places)


def _with_own_names(found: Iterable[Predicted], rows: Sequence[ArchiveRow]) -> Iterator[Predicted]:
    """Slides of one name in different folders get pictures of their own: the row's number is added."""
    often = Counter(row.name for row in rows)
    for number, one in enumerate(found, start=1):
        yield one if often[one.name] == 1 else dataclasses.replace(one, name=f"{one.name}-{number}")


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its name at the end, and is gone after any exception."""
    from ats_stream.errors import StorageError

    partial = out.absolute().with_name(f"{out.absolute().name}.partial-{os.getpid()}")
    try:
        yield partial
        try:
            partial.rename(out)
        except OSError as error:
            raise StorageError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _running(cluster: ClusterConfig) -> Any:
    """Ray for as long as it is needed, or nothing."""
    if cluster.executor != "ray":
        return nullcontext()
    from ats_stream.workers.cluster import ray_cluster

    return ray_cluster(cluster, cpus_needed=cluster.samplers_per_rank * cluster.cpus_per_sampler)
