"""Run a trained model over pyramids: a table of probabilities and a picture of each image.

  ats-stream predict runs/first archive.csv --split test --out predictions

RUN is a run folder (its newest checkpoint is taken) or a checkpoint file; INPUT an archive table or pyramids.
The output folder receives predictions.csv, pictures/ (thumbnail, attention, the drawn patches with their
weights) and report.html.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from ats_stream.io import ArchiveRow

MAX_PICTURES_IN_REPORT = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ats-stream predict``."""
    from ats_stream.commands.options import add_cluster_options
    from ats_stream.sampling import SCHEMES

    parser.add_argument("run_folder", metavar="RUN", help="run folder or checkpoint file")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="one archive table (.csv), or pyramids")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make for the results")
    parser.add_argument("--split", metavar="NAME", help="only this split of the table")
    parser.add_argument(
        "--scheme", choices=SCHEMES, help="how positions are drawn; top takes the most probable (as trained)"
    )
    parser.add_argument(
        "--pictures", type=int, metavar="N", help="draw pictures of the first N images only (all of them)"
    )
    add_cluster_options(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Predict, with a progress bar."""
    from tqdm import tqdm

    from ats_stream.commands.options import config_from
    from ats_stream.errors import TargetExistsError
    from ats_stream.io import open_pyramid
    from ats_stream.report.page import Page, write_page
    from ats_stream.report.predictions import (
        PICTURES_FOLDER,
        TABLE_NAME,
        THUMBNAIL_PX,
        accuracy,
        predictions_section,
        write_picture,
        write_table,
    )
    from ats_stream.workers import ClusterConfig
    from ats_stream.workers.predict import Predicted, Predictor

    out = Path(arguments.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TargetExistsError(f"{out}: exists already and is not an empty folder")
    predictor = Predictor.load(arguments.run_folder)
    rows = _rows(arguments, predictor.config.classes)
    cluster = config_from(arguments, ClusterConfig)
    num_pictures = len(rows) if arguments.pictures is None else arguments.pictures
    predictions: list[Predicted] = []
    shown: list[tuple[Predicted, Any]] = []
    with _cluster(cluster):
        found = predictor.predict(rows, cluster, scheme=arguments.scheme)
        for one in tqdm(found, total=len(rows), unit="image", disable=not sys.stderr.isatty()):
            if len(predictions) < num_pictures:
                thumbnail = open_pyramid(one.slide).thumbnail(THUMBNAIL_PX)
                write_picture(out / PICTURES_FOLDER, one, thumbnail)
                if len(shown) < MAX_PICTURES_IN_REPORT:
                    shown.append((one, thumbnail))
            predictions.append(one)
    table = write_table(out / TABLE_NAME, predictions)
    section = predictions_section(predictions, shown)
    page = Page(title="Predictions", subtitle=str(arguments.run_folder), sections=(section,))
    report = write_page(out / "report.html", page)
    share = accuracy(predictions)
    score = "" if share is None else f", accuracy {share:.3f}"
    print(f"{len(predictions)} images{score}; table {table}, report {report}")
    return {"table": str(table), "report": str(report), "accuracy": share}


def _rows(arguments: argparse.Namespace, classes: tuple[str, ...]) -> tuple[ArchiveRow, ...]:
    from ats_stream.errors import InputError
    from ats_stream.io import ArchiveRow, open_pyramid, read_archive

    if len(arguments.inputs) == 1 and arguments.inputs[0].endswith(".csv"):
        archive = read_archive(arguments.inputs[0], classes=classes)
        return (archive if arguments.split is None else archive.split(arguments.split)).rows
    if arguments.split is not None:
        raise InputError("--split needs an archive table (.csv) as input")
    for place in arguments.inputs:
        open_pyramid(place)
    return tuple(
        ArchiveRow(slide=place, label="", split="", line=0) for place in dict.fromkeys(arguments.inputs)
    )


def _cluster(cluster: Any) -> Any:
    """Ray for as long as it is needed, or nothing."""
    from contextlib import nullcontext

    if cluster.executor != "ray":
        return nullcontext()
    from ats_stream.workers.cluster import ray_cluster

    num_samplers = cluster.num_ranks * cluster.samplers_per_rank
    return ray_cluster(cluster, cpus_needed=num_samplers * cluster.cpus_per_sampler)
