"""Converting slides and arrays to pyramids: this package beside its peers, on the same sources, in one run.

    .venv/bin/python benchmarks/convert.py                     # all cases, stored in results/convert.json
    .venv/bin/python benchmarks/convert.py --cases lossless --lossless-side 4096 --out quick.json

Sources are synthetic H&E slides, TIFFs of JPEG tiles (see synthetic_slide.py), of ``--side`` pixels squared
where tiles are copied and of ``--lossless-side`` where they are stored anew (slow peers take minutes); an
array of ``--array-side`` squared in memory; and 16 slides of ``--slide-side`` squared. They stay in
``--data`` for the next run and are in the page cache. Targets go to a folder beside them and are removed.

Every engine runs in a process of its own, a new one for each repetition, and all take turns. Importing
libraries (and, of ours, loading what it has compiled), loading arrays and starting clusters are not measured.
MPix are those of level 0; CPU is user and system time of the process, its threads and the processes it
started (not those of Ray). Peak memory is resident memory of the process and those it started, summed, so
that what they share counts for each; "of it before" is what libraries, and an array, took already. Numbers
are medians over the repetitions. Level 0 of every zarr store must be the source's pixels exactly; that of
libvips, which decodes JPEG in its own way, up to rounding.

Peers: pip install "ats-stream[bench]". What is missing is reported and left out.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import synthetic_slide
from convert_engines import NUM_CORES, serve
from machine import describe_machine, print_contestants, store_result, versions, warm
from synthetic_slide import SlideConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RESULTS = Path(__file__).parent / "results" / "convert.json"
PEERS = (
    "ngff-zarr",
    "ome-zarr",
    "dask",
    "pyvips-binary",
    "tensorstore",
    "zarr",
    "imagecodecs",
    "tifffile",
    "ray",
)
ZARR_PEERS = ("tensorstore", "dask by hand", "ome-zarr-py", "ngff-zarr", "ngff-zarr bin-shrink")
NUM_SLIDES = 16
MAX_SECONDS = 60.0  # measured of one contestant in one case; the first repetition is always whole
NUM_PATCHES, PATCH_PX = 16, 256
# another decoder of JPEG may round otherwise, and upsample colours otherwise: mean of the differences, of 255
JPEG_TOLERANCE = 1.0
OURS, ONE_THREAD, PASS = "ats-stream", "ats-stream, one thread", "ats-stream pass"
FLOOR, COPY = "re-encoding alone", "copy of the file"
PROCESSES, RAY = "ats-stream, processes", "ats-stream, Ray"


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is converted, and by whom."""

    name: str
    what: str
    source: Path
    num_px: int
    engines: tuple[str, ...]
    tolerance: Callable[[str], float | None] = lambda _: 0.0
    """Largest mean difference of an engine's level 0 from the source; None where nothing is compared."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound of a metric of ours, or of its ratio to that of a peer."""

    case: str
    ours: str
    metric: str
    limit: float
    peer: str | None = None
    is_upper: bool = False

    @property
    def what(self) -> str:
        over = f" over {self.peer}" if self.peer else ""
        return f"{self.case}: {self.metric} of {self.ours}{over}, at {'most' if self.is_upper else 'least'}"


TARGETS = (
    Target(case="pass", ours=PASS, metric="mpix_per_s", limit=2000),
    Target(case="pass", ours=PASS, metric="bytes_per_source_byte", limit=1.03, is_upper=True),
    Target(case="pass", ours=PASS, metric="peak_mib", limit=200e6 / 2**20, is_upper=True),
    # the floor is that of one thread, and hyperthreads spend CPU time on waiting for each other
    Target(case="lossless", ours=ONE_THREAD, metric="mpix_per_cpu_s", limit=40),
    Target(case="lossless", ours=ONE_THREAD, metric="mpix_per_cpu_s", limit=0.75, peer=FLOOR),
    Target(case="lossless", ours=OURS, metric="mpix_per_s", limit=5, peer="ngff-zarr"),
    Target(case="lossless", ours=OURS, metric="mpix_per_s", limit=5, peer="ome-zarr-py"),
    Target(case="lossless", ours=OURS, metric="mpix_per_s", limit=2, peer="ngff-zarr bin-shrink"),
    Target(case="array", ours=OURS, metric="mpix_per_s", limit=1.0, peer="tensorstore"),
    Target(case="cluster", ours=RAY, metric="mpix_per_s", limit=0.9, peer=PROCESSES),
)


class Data:
    """The sources in a folder, made when they are asked for."""

    def __init__(
        self, folder: Path, *, side_px: int, lossless_side_px: int, array_side_px: int, slide_side_px: int
    ) -> None:
        self.folder = folder
        self.side_px, self.lossless_side_px = side_px, lossless_side_px
        self.array_side_px, self.slide_side_px = array_side_px, slide_side_px

    def slide(self, side_px: int) -> Path:
        """A slide."""
        path = synthetic_slide.make_slide(self.folder / str(side_px), SlideConfig(side_px=side_px))
        warm(path)
        return path

    def array(self) -> Path:
        """Pixels (3, side, side) of a slide as they were before they became JPEG."""
        side, block = self.array_side_px, synthetic_slide.BLOCK_PX

        def make(path: Path) -> None:
            pixels = np.empty((3, side, side), np.uint8)
            for y, x in np.ndindex(side // block, side // block):
                tile = synthetic_slide.tissue_block(0, y, x)
                pixels[:, y * block : (y + 1) * block, x * block : (x + 1) * block] = tile.transpose(2, 0, 1)
            np.save(path, pixels)

        made_from = {"version": synthetic_slide.VERSION, "side_px": side}
        path = synthetic_slide.keep(self.folder / f"array-{side}.npy", made_from, make)
        warm(path)
        return path

    def slides(self) -> Path:
        """A folder of slides: one under many names."""
        slide = self.slide(self.slide_side_px)
        folder = slide.parent / "slides"
        folder.mkdir(exist_ok=True)
        for number in range(NUM_SLIDES):
            name = folder / f"slide-{number:02}.tiff"
            name.unlink(missing_ok=True)
            os.link(slide, name)
        return folder


def pass_case(data: Data) -> Case:
    return Case(
        name="pass",
        what=f"the JPEG tiles of a slide of {data.side_px}^2 copied, beside a copy of the file",
        source=data.slide(data.side_px),
        num_px=data.side_px**2,
        engines=(PASS, COPY),
        tolerance=lambda engine: 0.0 if engine == PASS else None,
    )


def lossless_case(data: Data) -> Case:
    tolerances = {"libvips": JPEG_TOLERANCE, FLOOR: None}
    return Case(
        name="lossless",
        what=f"a slide of {data.lossless_side_px}^2 decoded and stored as zstd",
        source=data.slide(data.lossless_side_px),
        num_px=data.lossless_side_px**2,
        engines=(OURS, ONE_THREAD, *ZARR_PEERS, "libvips", FLOOR),
        tolerance=lambda engine: tolerances.get(engine, 0.0),
    )


def array_case(data: Data) -> Case:
    return Case(
        name="array",
        what=f"an array of {data.array_side_px}^2 in memory",
        source=data.array(),
        num_px=data.array_side_px**2,
        engines=(OURS, *ZARR_PEERS, "libvips"),
    )


def cluster_case(data: Data) -> Case:
    return Case(
        name="cluster",
        what=f"{NUM_SLIDES} slides of {data.slide_side_px}^2 by {NUM_CORES} workers",
        source=data.slides(),
        num_px=NUM_SLIDES * data.slide_side_px**2,
        engines=(PROCESSES, RAY),
        tolerance=lambda _: None,
    )


MAKERS = {"pass": pass_case, "lossless": lossless_case, "array": array_case, "cluster": cluster_case}


@dataclass
class Contestant:
    """An engine in a case, and what was measured of it."""

    engine: str
    problem: str | None = None
    samples: list[dict[str, float]] = field(default_factory=list)
    difference: float | None = None

    @property
    def is_done(self) -> bool:
        return self.problem is not None or sum(s["wall_s"] for s in self.samples) > MAX_SECONDS


def run_case(case: Case, repetitions: int, scratch: Path) -> dict[str, Any]:
    """Let all engines convert in turns, and compare what the first conversion of each gave."""
    contestants = [Contestant(engine) for engine in case.engines]
    for repetition in range(repetitions):
        turn = repetition % len(contestants)
        for one in contestants[turn:] + contestants[:turn]:
            if one.is_done:
                continue
            target = scratch / "target"
            # what was written before does not have to reach the disk in another's time
            os.sync()
            sample = _convert(one.engine, case.source, target)
            if isinstance(sample, str):
                one.problem = sample
            else:
                if repetition == 0 and case.tolerance(one.engine) is not None:
                    one.difference = _difference(case.source, target)
                one.samples.append(sample)
            shutil.rmtree(target, ignore_errors=True)
            for note in scratch.glob("target.*"):  # manifests, and what was not finished
                shutil.rmtree(note) if note.is_dir() else note.unlink()
    source_bytes = case.source.stat().st_size if case.source.suffix == ".tiff" else None
    return {
        "case": case.name,
        "what": case.what,
        "source_bytes": source_bytes,
        "contestants": [_summary(one, case, source_bytes) for one in contestants],
    }


def _convert(engine: str, source: Path, target: Path) -> dict[str, float] | str:
    """One conversion in a process of its own: the sample, or why there is none."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # no daemon: it may start processes itself
    process = context.Process(target=serve, args=(theirs, engine, str(source), str(target)))
    process.start()
    theirs.close()
    try:
        problem = ours.recv()
        if problem is None:
            ours.send("go")
            sample: dict[str, float] | str = ours.recv()
            return sample
        return str(problem)
    except EOFError:
        process.join()
        return f"its process ended with code {process.exitcode}"
    finally:
        ours.close()
        process.join()


def _difference(source: Path, target: Path) -> float:
    """Mean difference of some patches of level 0 from those of the source."""
    from ats_stream.io import open_pyramid

    made = open_pyramid(target / "image.tiff" if (target / "image.tiff").exists() else target)
    given = open_pyramid(np.load(source, mmap_mode="r") if source.suffix == ".npy" else source)
    if made.levels[0].shape != given.levels[0].shape:
        return math.inf
    size = tuple(min(PATCH_PX, n) for n in given.levels[0].shape[1:])
    high = [n - s + 1 for n, s in zip(given.levels[0].shape[1:], size, strict=True)]
    offsets = np.random.default_rng(0).integers(0, high, (NUM_PATCHES, 2))
    ours, theirs = (one.read_patches(0, offsets, size).astype(np.int16) for one in (made, given))
    return round(float(np.abs(ours - theirs).mean()), 4)


def _summary(one: Contestant, case: Case, source_bytes: int | None) -> dict[str, Any]:
    found: dict[str, Any] = {"name": one.engine}
    if not one.samples:
        return {**found, "not_available": one.problem}

    def median(values: list[float], digits: int = 2) -> float:
        return round(statistics.median(values), digits)

    mpix = [sample.get("num_px", case.num_px) / 1e6 for sample in one.samples]
    found["mpix_per_s"] = median([n / s["wall_s"] for n, s in zip(mpix, one.samples, strict=True)])
    found["mpix_per_s_best"] = round(max(n / s["wall_s"] for n, s in zip(mpix, one.samples, strict=True)), 2)
    if one.engine != RAY:
        found["mpix_per_cpu_s"] = median([n / s["cpu_s"] for n, s in zip(mpix, one.samples, strict=True)])
    found["wall_s"] = median([s["wall_s"] for s in one.samples], 3)
    found["peak_mib"] = max(s["peak_mib"] for s in one.samples)
    found["opened_mib"] = max(s["opened_mib"] for s in one.samples)
    if one.engine != FLOOR:
        found["bytes"] = median([s["bytes"] for s in one.samples], 0)
        found["files"] = median([s["files"] for s in one.samples], 0)
        if source_bytes is not None:
            found["bytes_per_source_byte"] = round(found["bytes"] / source_bytes, 4)
    if one.difference is not None:
        found["mean_difference"] = one.difference
    if one.problem is not None:
        found["failed_later"] = one.problem
    return {**found, "repetitions": len(one.samples)}


def differing(case: Case, result: dict[str, Any]) -> list[str]:
    """Names of the contestants whose level 0 is not the source."""
    return [
        c["name"]
        for c in result["contestants"]
        if "mean_difference" in c and c["mean_difference"] > (case.tolerance(c["name"]) or 0.0)
    ]


def check_targets(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target with what was measured; without a value where a side is missing."""
    checks = []
    for target in TARGETS:
        found = {c["name"]: c for case in cases if case["case"] == target.case for c in case["contestants"]}
        check: dict[str, Any] = {"what": target.what, "limit": round(target.limit, 3), "holds": None}
        ours = found.get(target.ours, {}).get(target.metric)
        peer = found.get(target.peer, {}).get(target.metric) if target.peer else 1.0
        if ours is not None and peer:
            value = ours / peer
            check["value"] = round(value, 4)
            check["holds"] = value <= target.limit if target.is_upper else value >= target.limit
        checks.append(check)
    return checks


def run(data: Data, names: Sequence[str], repetitions: int) -> dict[str, Any]:
    """Measure the cases named, printing as they come."""
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "peers": versions(PEERS),
        "load_before": [round(n, 1) for n in os.getloadavg()],
        "parameters": {
            "side_px": data.side_px,
            "lossless_side_px": data.lossless_side_px,
            "array_side_px": data.array_side_px,
            "slide_side_px": data.slide_side_px,
            "repetitions": repetitions,
        },
        "cases": [],
        "pixels_differ": [],
    }
    for name in names:
        case = MAKERS[name](data)
        with tempfile.TemporaryDirectory(prefix="convert-", dir=data.folder) as scratch:
            found = run_case(case, repetitions * MORE_OFTEN.get(name, 1), Path(scratch))
        print_case(found)
        result["cases"].append(found)
        result["pixels_differ"] += [f"{name}: {engine}" for engine in differing(case, found)]
    result["load_after"] = [round(n, 1) for n in os.getloadavg()]
    result["targets"] = check_targets(result["cases"])
    return result


# a case of a fifth of a second says little in a few repetitions
MORE_OFTEN = {"pass": 4}

HEADS = {
    "mpix_per_s": "MPix/s",
    "mpix_per_s_best": "best",
    "mpix_per_cpu_s": "MPix/CPU s",
    "peak_mib": "peak MiB",
    "opened_mib": "of it before",
    "bytes": "bytes out",
    "bytes_per_source_byte": "of source",
    "files": "files",
}


def print_case(found: dict[str, Any]) -> None:
    print(f"\n{found['what']}")
    print_contestants(found["contestants"], HEADS, name_width=24, width=14)


def print_targets(checks: Sequence[dict[str, Any]]) -> None:
    print()
    for check in checks:
        verdict = {True: "holds", False: "MISSED", None: "not measured"}[check["holds"]]
        print(f"{verdict:12} {check.get('value', '-'):>10}  {check['what']} {check['limit']}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--side", type=int, default=20480, help="side of the slide that is copied")
    parser.add_argument(
        "--lossless-side", type=int, default=8192, help="side of the slide that is decoded and stored anew"
    )
    parser.add_argument("--array-side", type=int, default=8192, help="side of the array in pixels")
    parser.add_argument(
        "--slide-side", type=int, default=4096, help="side of each of the 16 slides in pixels"
    )
    parser.add_argument(
        "--data", type=Path, default=Path(tempfile.gettempdir()) / "ats-stream-benchmark-read", help="folder"
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--cases", nargs="+", choices=MAKERS, default=list(MAKERS), metavar="CASE", help=", ".join(MAKERS)
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.data.mkdir(parents=True, exist_ok=True)
    data = Data(
        options.data,
        side_px=options.side,
        lossless_side_px=options.lossless_side,
        array_side_px=options.array_side,
        slide_side_px=options.slide_side,
    )
    result = run(data, options.cases, options.repetitions)
    print_targets(result["targets"])
    return store_result(result, options.out)


if __name__ == "__main__":
    sys.exit(main())
