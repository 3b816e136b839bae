"""Prediction over an archive, and the report about it.

    .venv/bin/python benchmarks/predict.py             # stored in results/predict.json
    .venv/bin/python benchmarks/predict.py --quick     # a small version without Ray, written nowhere

Cases, each in a process of its own:

* **synthetic**: images of one gigapixel of which only squares are stored, the same 16 patches of 96 px from
  each, drawn inside of the squares; everything that ``ats-stream predict`` writes of an image is written.
  With sampler actors too, which read while this process computes and writes.
* **real**: the slides of the test data ($ATS_STREAM_TEST_DATA), where there are some, converted first.
* **report**: the page about 1,000 images with labels, with 1,000 resamples, from the records on.

Memory is that of the process that computes and writes: how much it holds after a quarter of the images and
at the end, and its peak. The share read is that of the bytes of level 0 that were decoded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import synthetic_slide
import torch
from machine import describe_machine, mib, peak_bytes
from targets import Target, print_targets

from ats_stream.commands.predict import write_slide
from ats_stream.commands.report import write_report
from ats_stream.io import ArchiveRow, ConvertConfig, PyramidWriter, StorageOptions, convert
from ats_stream.models import ModelConfig, PatchClassifier
from ats_stream.predictions.folder import PredictionFolder, attention_path, taken
from ats_stream.predictions.names import unique_names
from ats_stream.workers import ClusterConfig, RunConfig, SamplerConfig, TrainerConfig
from ats_stream.workers.allocator import keep_freed_memory
from ats_stream.workers.cluster import ray_cluster
from ats_stream.workers.predict import Predictor

RESULTS = Path(__file__).parent / "results" / "predict.json"
CLASSES = ("normal", "tumor")
PATCH_PX, NUM_PATCHES = 96, 16
VIEW_DOWNSAMPLE = 32
REAL_SLIDES = ("aperio/CMU-1-Small-Region.svs", "tiff/CMU-1-Small-Region.jpeg.tiff")
NUM_SAMPLERS = 2
OBJECT_STORE_BYTES = 256 << 20  # 256 MiB


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few small images, nothing is stored")
    parser.add_argument(
        "--data", type=Path, help="folder for images and predictions (default: a temporary one)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child](arguments.data)))
        return 0
    with tempfile.TemporaryDirectory() if arguments.data is None else nullcontext(arguments.data) as folder:
        result = measure(Path(folder), is_quick=arguments.quick)
    print_targets(result["targets"])
    if not arguments.quick:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(data: Path, *, is_quick: bool) -> dict[str, Any]:
    """Make the images, run the cases, check the targets."""
    num_images, side_px, num_reported = (4, 8192, 50) if is_quick else (64, 32768, 1000)
    images = data / "images"
    for number in range(num_images):
        write_image(images / f"i{number:03}.ome.zarr", side_px, seed=number)
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "load_before": os.getloadavg()[0],
        "parameters": {
            "images": num_images,
            "side_px": side_px,
            "patches": NUM_PATCHES,
            "patch_px": PATCH_PX,
            "images_reported": num_reported,
        },
    }
    contestants = [{"name": "serial", **_child("serial", data)}]
    if not is_quick:
        contestants.append({"name": f"{NUM_SAMPLERS} samplers", **_child("ray", data)})
    cases = [{"case": "synthetic", "contestants": contestants}]
    if _real_slides(data / "real", is_quick=is_quick):
        cases.append({"case": "real", "contestants": [{"name": "serial", **_child("real", data)}]})
    (data / "num_reported").write_text(str(num_reported))
    cases.append({"case": "report", "contestants": [{"name": "page", **_child("report", data)}]})
    for case in cases:
        for one in case["contestants"]:
            print(case["case"], json.dumps(one), flush=True)
    result["cases"] = cases
    result["targets"] = [target.check(cases) for target in TARGETS]
    return result


TARGETS = (
    Target(case="report", metric="seconds", ours="page", limit=60, at_least=False),
    Target(case="report", metric="megabytes", ours="page", limit=30, at_least=False),
    Target(case="synthetic", metric="memory_growth", ours="serial", limit=1.1, at_least=False),
    Target(
        case="synthetic", metric="memory_growth", ours=f"{NUM_SAMPLERS} samplers", limit=1.1, at_least=False
    ),
)


def write_image(path: Path, side_px: int, *, seed: int) -> None:
    """A pyramid of two levels: squares of tissue on absent glass, a view, and the mask of the squares."""
    if path.exists():
        return
    chunk_px, site_px = 128, synthetic_slide.SITE_PX
    pixels = synthetic_slide.tissue_block(seed, 0, 0)[:site_px, :site_px].transpose(2, 0, 1)
    view_px = side_px // VIEW_DOWNSAMPLE
    view = np.full((3, view_px, view_px), 255, np.uint8)
    mask = np.zeros((view_px, view_px), bool)
    small = np.ascontiguousarray(pixels[:, ::VIEW_DOWNSAMPLE, ::VIEW_DOWNSAMPLE])
    with PyramidWriter(
        path,
        level_shapes=[(3, side_px, side_px), view.shape],
        dtype="uint8",
        fill_value=255,
        pixel_size_um=synthetic_slide.PIXEL_UM,
    ) as writer:
        for y, x in synthetic_slide.sites(side_px).tolist():
            blocks = {
                ((y + i) // chunk_px, (x + j) // chunk_px): pixels[:, i : i + chunk_px, j : j + chunk_px]
                for i in range(0, site_px, chunk_px)
                for j in range(0, site_px, chunk_px)
            }
            writer.write_chunks(0, blocks)
            box = np.s_[
                y // VIEW_DOWNSAMPLE : (y + site_px) // VIEW_DOWNSAMPLE,
                x // VIEW_DOWNSAMPLE : (x + site_px) // VIEW_DOWNSAMPLE,
            ]
            view[:, *box], mask[box] = small, True
        writer.write_shard(1, (0, 0), view)
        writer.write_label("tissue", mask, downsample=VIEW_DOWNSAMPLE)


def predictor(view_downsample: float = VIEW_DOWNSAMPLE) -> Predictor:
    """A model as it is before training: its attention is flat, so patches lie anywhere in the tissue."""
    torch.manual_seed(0)
    model = ModelConfig(num_classes=len(CLASSES))
    sampler = SamplerConfig(
        num_patches=NUM_PATCHES, patch_px=PATCH_PX, view_downsample=view_downsample, prior_label="tissue"
    )
    config = RunConfig(model=model, sampler=sampler, trainer=TrainerConfig(), classes=CLASSES)
    return Predictor(PatchClassifier(model).eval().requires_grad_(False), config)


def rows_of(folder: Path) -> list[ArchiveRow]:
    """The images of a folder, half of them of each class."""
    places = sorted(folder.glob("*.ome.zarr"))
    return [
        ArchiveRow(slide=str(place), label=CLASSES[n % 2], split="test", line=n)
        for n, place in enumerate(places)
    ]


def predict_all(out: Path, rows: list[ArchiveRow], of: Predictor, cluster: ClusterConfig) -> dict[str, Any]:
    """What ``ats-stream predict`` does of each image, and what it took."""
    keep_freed_memory()
    held: list[int] = []
    names = unique_names([row.name for row in rows])
    with taken(out, of.info(rows), names) as folder:
        start_s, cpu_s = time.perf_counter(), time.process_time()
        for one in of.predict_each(rows, cluster):
            write_slide(folder, one, with_picture=True, options=StorageOptions.of(None))
            held.append(psutil.Process().memory_info().rss)
        folder.finish()
        seconds, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_s
        records = list(folder.records())
    assert not any(record.is_bad for record in records)
    quarter = held[len(held) // 4]
    return {
        "images": len(rows),
        "images_per_minute": round(60 * len(rows) / seconds, 1),
        "cpu_s_per_image": round(cpu_s / len(rows), 3),
        "share_read": round(float(np.mean([record.read_share for record in records])), 6),
        "stored_kb_per_image": round(float(np.mean([r.stored_bytes for r in records])) / 1e3, 1),
        "memory_mib": mib(held[-1]),
        "memory_growth": round(held[-1] / quarter, 3),
        "peak_mib": mib(peak_bytes()),
    }


def run_serial(data: Path) -> dict[str, Any]:
    return predict_all(data / "serial", rows_of(data / "images"), predictor(), ClusterConfig())


def run_ray(data: Path) -> dict[str, Any]:
    cluster = ClusterConfig(
        executor="ray",
        num_ranks=1,
        samplers_per_rank=NUM_SAMPLERS,
        cpus_per_sampler=0.5,
        object_store_bytes=OBJECT_STORE_BYTES,
    )
    with ray_cluster(cluster, cpus_needed=1):
        return predict_all(data / "ray", rows_of(data / "images"), predictor(), cluster)


def run_real(data: Path) -> dict[str, Any]:
    return predict_all(data / "real-out", rows_of(data / "real"), predictor(8), ClusterConfig())


def run_report(data: Path) -> dict[str, Any]:
    """Many records, made of those of the synthetic images with other values, and the page about them."""
    num = int((data / "num_reported").read_text())
    rows = rows_of(data / "images")
    with taken(data / "serial", predictor().info(rows), [row.name for row in rows]) as before:
        known = list(before.records())
    rng = np.random.default_rng(0)
    names = [f"r{number:05}" for number in range(num)]
    info = replace(before.info, images="made up", num_images=num)
    with taken(data / "many", info, names) as folder:
        for number, name in enumerate(names):
            one, p = known[number % len(known)], float(rng.random())
            label, answer = CLASSES[int(rng.random() < p)], CLASSES[int(p > 0.5)]
            facts = {"value_K": (1 - p, p), "label": label, "predicted": answer, "right": label == answer}
            folder.commit(replace(one, name=name, **facts))
            place = attention_path(folder.path, name)
            place.parent.mkdir(exist_ok=True)
            if not place.exists():
                place.symlink_to(attention_path(before.path, one.name), target_is_directory=True)
    return report_on(folder)


def report_on(folder: PredictionFolder) -> dict[str, Any]:
    """Time and size of tables and page."""
    start_s = time.perf_counter()
    folder.finish()
    tables_s = time.perf_counter() - start_s
    page = write_report(
        [folder.path],
        folder.path / "report.html",
        title="report",
        num_slides=6,
        options=StorageOptions.of(None),
    )
    return {
        "images": len(folder.names),
        "tables_s": round(tables_s, 2),
        "seconds": round(time.perf_counter() - start_s, 2),
        "megabytes": round(page.stat().st_size / 1e6, 2),
        "peak_mib": mib(peak_bytes()),
    }


CHILDREN = {"serial": run_serial, "ray": run_ray, "real": run_real, "report": run_report}


def _child(name: str, data: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", name, "--data", str(data)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _real_slides(folder: Path, *, is_quick: bool) -> bool:
    """Convert the slides of the test data; whether there are some."""
    given = os.environ.get("ATS_STREAM_TEST_DATA")
    slides = [Path(given, "wsi", slide) for slide in REAL_SLIDES] if given and not is_quick else []
    for number, slide in enumerate(slide for slide in slides if slide.is_file()):
        target = folder / f"real{number}.ome.zarr"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            convert(slide, target, ConvertConfig(), progress=False)
    return any(folder.glob("*.ome.zarr"))


if __name__ == "__main__":
    sys.exit(main())
