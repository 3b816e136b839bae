"""Put a training, or predictions, or both, on one page that needs nothing else.

  ats-stream report runs/first
  ats-stream report runs/first predictions --out first.html

RUN is the folder of a training or of predictions. The page has, of a training, learning curves, what
attention drew (sampled mass, effective sample size, staleness), where the time went and what was skipped; of
predictions, figures of merit with bootstrap intervals, ROC, calibration and confusion (or what belongs to the
task), the best and the worst images with attention and drawn patches, and what was read.

It is one HTML file without scripts and without addresses of anything outside: to be read offline, printed, or
sent. A folder that is half-written gives a page that says what is missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from ats_stream.io import StorageOptions
    from ats_stream.report.document import RunParts
    from ats_stream.report.page import Section

USAGE = "RUN [RUN ...] [--out FILE]"
REPORT_NAME = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ats-stream report``."""
    from ats_stream.commands.options import add_storage_options
    from ats_stream.report.slides import NUM_SLIDES

    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a training or of predictions")
    parser.add_argument(
        "--out", metavar="FILE", help=f"the page (default: {REPORT_NAME} in the first folder)"
    )
    parser.add_argument("--title", help="title of the page (default: the names of the folders)")
    parser.add_argument(
        "--slides",
        type=int,
        default=NUM_SLIDES,
        metavar="N",
        help=f"images shown of the best and of the worst, each ({NUM_SLIDES})",
    )
    add_storage_options(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the page."""
    from ats_stream.commands.options import storage_options_from
    from ats_stream.errors import InputError

    if arguments.slides < 0:
        raise InputError(f"--slides must not be negative, got {arguments.slides}")
    folders = [Path(place) for place in arguments.runs]
    page = write_report(
        folders,
        Path(arguments.out) if arguments.out else folders[0] / REPORT_NAME,
        title=arguments.title or ", ".join(folder.name or str(folder) for folder in folders),
        num_slides=arguments.slides,
        options=storage_options_from(arguments),
    )
    print(f"{page}: {page.stat().st_size / 1e6:.1f} MB")
    return {"report": str(page.absolute())}


def write_report(
    folders: list[Path], out: Path, *, title: str, num_slides: int, options: StorageOptions
) -> Path:
    """One page of all folders; InputError or MissingFileError for one that holds neither kind."""
    from ats_stream import __version__
    from ats_stream.report.page import Page, write_page

    sections: list[Section] = []
    for folder in folders:
        sections += _sections(folder, num_slides, options)
    return write_page(out, Page(title=title, sections=tuple(sections), footer=f"ats-stream {__version__}"))


def _sections(folder: Path, num_slides: int, options: StorageOptions) -> tuple[Section, ...]:
    from ats_stream.errors import InputError, MissingFileError
    from ats_stream.predictions.folder import is_prediction
    from ats_stream.report.document import prediction_sections, run_sections

    if not folder.is_dir():
        raise MissingFileError(f"{folder}: no such folder")
    if is_prediction(folder):
        return prediction_sections(folder, num_slides=num_slides, options=options)
    if not any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints")):
        raise InputError(f"{folder}: neither the folder of a training nor of predictions")
    return run_sections(read_run_folder(folder))


def read_run_folder(folder: Path) -> RunParts:
    """What is there of a training, and what is not."""
    from ats_stream.errors import AtsStreamError
    from ats_stream.report.document import RunParts
    from ats_stream.workers.checkpoint import latest_checkpoint
    from ats_stream.workers.ledger import read_ledger
    from ats_stream.workers.metrics import read_metrics

    missing = []
    config = _read_config(folder / "config.yaml")
    if not config:
        missing.append("config.yaml: the settings")
    metrics = read_metrics(folder)
    done = max((one["epoch"] for one in metrics if one.get("phase") == "train"), default=0)
    asked = config.get("trainer", {}).get("num_epochs")
    if not done:
        missing.append("metrics.jsonl: no epoch is done")
    elif isinstance(asked, int) and done < asked:
        missing.append(f"epochs: {done} of {asked} are done")
    if latest_checkpoint(folder) is None:
        missing.append("checkpoints/: there is none to go on from")
    skipped: dict[str, str] = {}
    try:
        for record in read_ledger(folder):
            if record.bad is not None:
                skipped[record.slide] = record.bad
    except AtsStreamError as error:
        missing.append(f"the rest of the ledger: {error}")
    return RunParts(metrics=metrics, config=config, skipped=list(skipped.items()), missing=missing)


def _read_config(path: Path) -> dict[str, Any]:
    """The settings; nothing if there are none, or they are not whole."""
    import yaml

    try:
        found = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
