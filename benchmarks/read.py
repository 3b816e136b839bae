"""Reading patches: this package beside its peers, on the same stores, in one run.

    .venv/bin/python benchmarks/read.py                        # all cases, stored in results/read.json
    .venv/bin/python benchmarks/read.py --side 4096 --repetitions 3 --out quick.json --cases random clustered

The data are a synthetic H&E slide of ``--side`` pixels squared (see synthetic_slide.py) and what is made from
it; they stay in ``--data`` for the next run. With ATS_STREAM_TEST_DATA set to a folder that holds wsi/, real
slides are read as well. Stores are local and in the page cache, or behind a loopback HTTP server that answers
each request after 30 ms.

Every engine runs in a process of its own, and all take turns at the same patches, which are new in each
repetition, so that what else the machine does hits all alike. CPU is user and system time of the engine's
process with all its threads, per patch; wall time is that of the batch, per patch; both are medians (and
minima) over the repetitions. Bytes are what the process asked of the file system, or of the HTTP server, per
byte of the patches; memory maps do not show in it. Peak memory is that of the process since it started. All
engines must give the same pixels: exactly so from zstd, up to the rounding of the decoder from JPEG.

Peers: pip install "ats-stream[bench]"; then cuCIM, without what it needs for GPUs, as
pip install --no-deps cucim-cu12 and pip install lazy-loader. What is missing is reported and left out.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import synthetic_slide
from latency_server import COUNTS
from machine import describe_machine, versions, warm
from read_engines import FLOORS, serve
from synthetic_slide import SITE_PX, SlideConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection

Array = npt.NDArray[Any]
RESULTS = Path(__file__).parent / "results" / "read.json"
PEERS = (
    "tensorstore",
    "zarr",
    "obstore",
    "dask",
    "cucim-cu12",
    "openslide-bin",
    "pyvips-binary",
    "imagecodecs",
)
OURS = "ats-stream"
OURS_1 = "ats-stream, 1 thread"
NUM_PATCHES = 64
NUM_HOT_SPOTS = 4
HOT_SPOT_PX = 500.0  # deviation of the patches around a hot spot
DELAY_MS = 30.0
GIGAPIXELS = (1, 10, 100)
REAL_SLIDES = {
    "Aperio SVS": "aperio/CMU-1-Small-Region.svs",
    "JPEG TIFF": "tiff/CMU-1-Small-Region.jpeg.tiff",
}
WARM_UPS = 2
MAX_SECONDS = 40.0  # of one contestant in one case, once it has been measured twice

ZARR = ("tensorstore", "tensorstore, cache of 64 MiB", "zarr-python loop", "zarr-python gather")
SLIDE = ("cuCIM", "cuCIM batch", "OpenSlide", "OpenSlide, default cache", "libvips")
CUCIM, OPENSLIDE = ("cuCIM", "cuCIM batch"), ("OpenSlide", "OpenSlide, default cache")
# a decoder of JPEG may round otherwise, and upsample colours otherwise: mean of the differences, of 255
JPEG_TOLERANCE = 1.0


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """An engine at a place, under a name."""

    name: str
    engine: str
    place: str
    draw: Callable[[np.random.Generator], Array]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is read, and who reads it."""

    name: str
    what: str
    size_px: int
    contestants: tuple[Contestant, ...]
    tolerance: float = 0.0
    """Largest mean difference of pixels from the first contestant's; 0 means none at all."""
    server: str | None = None
    """Address of the HTTP server behind the places."""
    with_same_pixels: bool = True


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound of ours over the best of the others."""

    case: str
    metric: str
    limit: float
    peers: tuple[str, ...]
    ours: str = OURS


def _growth(metric: str) -> Target:
    small, big = (f"{OURS}, {n} gigapixels" for n in (GIGAPIXELS[0], GIGAPIXELS[-1]))
    return Target(case="size", metric=metric, limit=1.1, peers=(small,), ours=big)


TARGETS = (
    Target(case="random", metric="cpu_ms", limit=1.1, peers=("tensorstore",)),
    Target(case="random", metric="cpu_ms", limit=0.28, peers=("zarr-python loop",)),
    Target(case="random", metric="wall_ms", limit=0.16, peers=("zarr-python loop",)),
    Target(case="random 100", metric="cpu_ms", limit=0.2, peers=("zarr-python loop",)),
    Target(case="random 100", metric="cpu_ms", limit=1.25, peers=("tensorstore",)),
    Target(case="clustered", metric="cpu_ms", limit=0.9, peers=("tensorstore",)),
    Target(case="jpeg", metric="cpu_ms", limit=1.1, peers=CUCIM),
    Target(case="jpeg", metric="cpu_ms", limit=0.5, peers=OPENSLIDE),
    Target(case="latency", metric="wall_ms", limit=0.95, peers=("tensorstore",)),
    Target(case="latency", metric="wall_ms", limit=0.4, peers=("zarr-python gather",)),
    Target(case="latency", metric="wall_ms", limit=0.01, peers=("zarr-python loop",)),
    *(_growth(metric) for metric in ("cpu_ms", "wall_ms", "batch_mib", "peak_mib")),
)


def random_offsets(shape: Sequence[int], size_px: int) -> Callable[[np.random.Generator], Array]:
    """Patches anywhere inside of the image."""
    high = [n - size_px + 1 for n in shape]
    return lambda rng: rng.integers(0, high, (NUM_PATCHES, 2))


def clustered_offsets(shape: Sequence[int], size_px: int) -> Callable[[np.random.Generator], Array]:
    """Patches around a few hot spots, as attention draws them."""
    high = np.array([n - size_px for n in shape])

    def draw(rng: np.random.Generator) -> Array:
        centres = rng.integers(0, high + 1, (NUM_HOT_SPOTS, 2))
        spread = rng.normal(0, HOT_SPOT_PX, (NUM_PATCHES, 2)).round().astype(np.int64)
        return np.clip(centres[np.arange(NUM_PATCHES) % NUM_HOT_SPOTS] + spread, 0, high)

    return draw


def site_offsets(side_px: int, size_px: int) -> Callable[[np.random.Generator], Array]:
    """One patch inside of each written square; for every image size at the same places in their squares."""
    first = synthetic_slide.sites(side_px)
    return lambda rng: first + rng.integers(0, SITE_PX - size_px + 1, first.shape)


@dataclass
class Worker:
    """The process of a contestant, and what was measured of it."""

    contestant: Contestant
    process: Any
    connection: Connection
    problem: str | None = None
    samples: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, contestant: Contestant, size_px: int) -> Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (theirs, contestant.engine, contestant.place, size_px)
        process = context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        worker = cls(contestant, process, ours)
        worker.problem = worker._receive()
        return worker

    def ask(self, what: str, offsets_N2: Array) -> Any:
        """The reply, None when there is none any more; then ``problem`` says why."""
        if self.problem is not None:
            return None
        self.connection.send((what, offsets_N2))
        reply = self._receive()
        if isinstance(reply, str):
            self.problem = reply
            return None
        return reply

    def _receive(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            return f"its process ended with code {self.process.exitcode}"

    def is_done(self) -> bool:
        return len(self.samples) >= 2 and sum(s["wall_s"] for s in self.samples) > MAX_SECONDS

    def stop(self) -> None:
        self.connection.close()
        self.process.join()


def run_case(case: Case, repetitions: int) -> dict[str, Any]:
    """Measure all contestants in turns; check that they agree."""
    workers = [Worker.start(contestant, case.size_px) for contestant in case.contestants]
    try:
        for repetition in range(-WARM_UPS if case.server is None else -1, repetitions):
            turn = repetition % len(workers)
            for worker in workers[turn:] + workers[:turn]:
                if worker.is_done():
                    continue
                before = _counts(case.server)
                sample = worker.ask("measure", _offsets(case, worker, repetition))
                if sample is None or repetition < 0:
                    continue
                if case.server is not None:
                    after = _counts(case.server)
                    sample["bytes"] = after["bytes"] - before["bytes"]
                    sample["requests"] = after["requests"] - before["requests"]
                worker.samples.append(sample)
        for worker in workers:
            if worker.contestant.engine not in FLOORS and not worker.is_done():
                worker.memory = worker.ask("memory", _offsets(case, worker, repetitions)) or {}
        pixels = _compare(case, workers, repetitions)
    finally:
        for worker in workers:
            worker.stop()
    useful = NUM_PATCHES * 3 * case.size_px**2
    return {
        "case": case.name,
        "what": case.what,
        "contestants": [{**_summary(w, useful), **pixels.get(w.contestant.name, {})} for w in workers],
    }


def _offsets(case: Case, worker: Worker, repetition: int) -> Array:
    """New ones in each repetition, the same for all contestants."""
    rng = np.random.default_rng((zlib.crc32(case.name.encode()), repetition + WARM_UPS))
    return worker.contestant.draw(rng)


def _counts(server: str | None) -> dict[str, int]:
    if server is None:
        return {}
    with urllib.request.urlopen(server + COUNTS) as reply:
        counts: dict[str, int] = json.load(reply)
        return counts


def _summary(worker: Worker, useful_bytes: int) -> dict[str, Any]:
    found: dict[str, Any] = {"name": worker.contestant.name}
    if worker.problem is not None:
        return {**found, "not_available": worker.problem}
    for metric, key in (("cpu_ms", "cpu_s"), ("wall_ms", "wall_s")):
        values = [sample[key] * 1e3 / NUM_PATCHES for sample in worker.samples]
        found[metric] = round(statistics.median(values), 4)
        found[f"{metric}_min"] = round(min(values), 4)
    if worker.contestant.engine not in FLOORS:
        read = statistics.median(sample["bytes"] for sample in worker.samples)
        found["bytes_per_useful_byte"] = round(read / useful_bytes, 3)
    if "requests" in worker.samples[0]:
        found["requests"] = statistics.median(sample["requests"] for sample in worker.samples)
    return {**found, **worker.memory, "repetitions": len(worker.samples)}


def _compare(case: Case, workers: list[Worker], repetition: int) -> dict[str, dict[str, float]]:
    """Differences of the pixels from those of the first that could read."""
    if not case.with_same_pixels:
        return {}
    first: Array | None = None
    found = {}
    for worker in workers:
        if worker.contestant.engine in FLOORS or worker.is_done():
            continue
        batch = worker.ask("pixels", _offsets(case, worker, repetition))
        if batch is None:
            continue
        first = batch if first is None else first
        if batch.shape != first.shape:
            found[worker.contestant.name] = {"mean_difference": math.inf, "max_difference": math.inf}
            continue
        difference = np.abs(batch.astype(np.int16) - first)
        found[worker.contestant.name] = {
            "mean_difference": round(float(difference.mean()), 4),
            "max_difference": int(difference.max()),
        }
    return found


def differing(case: Case, result: dict[str, Any]) -> list[str]:
    """Names of the contestants whose pixels are not those of the first."""
    return [c["name"] for c in result["contestants"] if c.get("mean_difference", 0) > case.tolerance]


def check_targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target with the ratio that was measured; without one where a side is missing."""
    checks = []
    for target in TARGETS:
        found = {c["name"]: c for r in result["cases"] if r["case"] == target.case for c in r["contestants"]}
        check: dict[str, Any] = {
            "what": f"{target.case}: {target.metric} of {target.ours} over {' or '.join(target.peers)}",
            "limit": target.limit,
        }
        for suffix, key in (("", "ratio"), ("_min", "ratio_of_minima")):
            metric = target.metric + suffix
            peers = [found[peer][metric] for peer in target.peers if metric in found.get(peer, {})]
            if peers and metric in found.get(target.ours, {}):
                check[key] = round(found[target.ours][metric] / min(peers), 4)
        checks.append({**check, "holds": check["ratio"] <= target.limit if "ratio" in check else None})
    return checks


@contextmanager
def latency_server(folder: Path, delay_ms: float) -> Iterator[str]:
    """Address of a server of the folder, which runs in a process of its own."""
    script = Path(__file__).with_name("latency_server.py")
    command = [sys.executable, str(script), str(folder), str(delay_ms)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


class Data:
    """The slide and its stores in a folder, made when they are asked for."""

    def __init__(self, folder: Path, config: SlideConfig, real: Path | None) -> None:
        self.folder, self.config, self.real = folder / str(config.side_px), config, real
        self.slide = synthetic_slide.make_slide(self.folder, config)

    def _keep(self, name: str, make: Callable[[Path], None], **parameters: Any) -> Path:
        made_from = {"version": self.config.version, "seed": self.config.seed, **parameters}
        path = synthetic_slide.keep(self.folder / name, made_from, make)
        warm(path)
        return path

    def zstd(self, chunk_px: int, slide: Path | None = None) -> Path:
        """Chunks of zstd in shards, of the synthetic slide or of another."""
        source = slide or self.slide
        return self._keep(
            f"{source.stem}-zstd-{chunk_px}.ome.zarr",
            lambda path: synthetic_slide.write_store(source, path, chunk_px),
            chunk_px=chunk_px,
        )

    def jpeg(self) -> Path:
        """The slide's tiles in shards."""
        return self._keep(
            "slide-jpeg.ome.zarr", lambda path: synthetic_slide.write_jpeg_store(self.slide, path)
        )

    def sparse(self, gigapixels: int) -> Path:
        """An image of so many gigapixels, mostly absent."""
        side = sparse_side(gigapixels)
        return self._keep(
            f"sparse-{gigapixels}.ome.zarr",
            lambda path: synthetic_slide.write_sparse_store(path, side, 128, self.config.seed),
            side_px=side,
        )


def sparse_side(gigapixels: int) -> int:
    """Side of a square image in pixels."""
    return math.isqrt(gigapixels * 10**9)


def _contestants(
    names: Sequence[str], place: Path | str, draw: Callable[[np.random.Generator], Array]
) -> tuple[Contestant, ...]:
    return tuple(Contestant(name=n, engine=n, place=str(place), draw=draw) for n in names)


def random_case(data: Data) -> Case:
    side = data.config.side_px
    return Case(
        name="random",
        what="64 random patches of 256 x 256, zstd chunks of 128 in shards of 4096, local",
        size_px=256,
        contestants=_contestants(
            (OURS, OURS_1, *ZARR, "dask", "zstd alone"), data.zstd(128), random_offsets((side, side), 256)
        ),
    )


def random_100_case(data: Data) -> Case:
    side = data.config.side_px
    return Case(
        name="random 100",
        what="64 random patches of 100 x 100, zstd chunks of 64 in shards of 4096, local",
        size_px=100,
        contestants=_contestants(
            (OURS, OURS_1, *ZARR, "zstd alone"), data.zstd(64), random_offsets((side, side), 100)
        ),
    )


def clustered_case(data: Data) -> Case:
    side = data.config.side_px
    return Case(
        name="clustered",
        what="64 patches of 256 x 256 around 4 hot spots, zstd chunks of 128 in shards of 4096, local",
        size_px=256,
        contestants=_contestants(
            (OURS, OURS_1, *ZARR, "zstd alone"), data.zstd(128), clustered_offsets((side, side), 256)
        ),
    )


def jpeg_case(data: Data) -> Case:
    side = data.config.side_px
    draw = random_offsets((side, side), 256)
    warm(data.slide)
    in_place = {"ats-stream, the slide": OURS, "ats-stream, the slide, 1 thread": OURS_1}
    return Case(
        name="jpeg",
        what="64 random patches of 256 x 256 of JPEG tiles of 256: ours from shards and from the slide, "
        "the others from the slide",
        size_px=256,
        contestants=(
            *_contestants((OURS, OURS_1), data.jpeg(), draw),
            *(
                Contestant(name=name, engine=engine, place=str(data.slide), draw=draw)
                for name, engine in in_place.items()
            ),
            *_contestants((*SLIDE, "JPEG alone"), data.slide, draw),
        ),
        tolerance=JPEG_TOLERANCE,
    )


def real_cases(data: Data) -> list[Case]:
    """Small real slides, in place, and one of them converted; patches share many of the few tiles."""
    if data.real is None:
        return []
    cases = []
    for name, place in REAL_SLIDES.items():
        slide = data.real / place
        draw = random_offsets(_slide_shape(slide), 256)
        cases.append(
            Case(
                name=f"real {name}",
                what=f"64 random patches of 256 x 256 of the real slide {slide.name}, in place",
                size_px=256,
                contestants=_contestants((OURS, OURS_1, *SLIDE, "JPEG alone"), slide, draw),
                tolerance=JPEG_TOLERANCE,
            )
        )
    slide = data.real / REAL_SLIDES["Aperio SVS"]
    draw = random_offsets(_slide_shape(slide), 256)
    cases.append(
        Case(
            name="real zstd",
            what=f"64 random patches of 256 x 256 of {slide.name}, converted to zstd chunks of 128",
            size_px=256,
            contestants=_contestants((OURS, OURS_1, *ZARR, "zstd alone"), data.zstd(128, slide), draw),
        )
    )
    return cases


def _slide_shape(slide: Path) -> tuple[int, int]:
    from ats_stream.io import open_slide

    with open_slide(slide) as source:
        return source.shape[1], source.shape[2]


def latency_case(data: Data, server: str) -> Case:
    side = data.config.side_px
    place = f"{server}/{data.zstd(128).name}"
    return Case(
        name="latency",
        what="64 random patches of 256 x 256, zstd chunks of 128 in shards of 4096, "
        f"HTTP with {DELAY_MS:g} ms per request",
        size_px=256,
        contestants=_contestants((OURS, OURS_1, *ZARR), place, random_offsets((side, side), 256)),
        server=server,
    )


def size_case(data: Data) -> Case:
    contestants = [
        Contestant(
            name=f"{engine}, {n} gigapixels",
            engine=engine,
            place=str(data.sparse(n)),
            draw=site_offsets(sparse_side(n), 256),
        )
        for engine in (OURS, "tensorstore")
        for n in GIGAPIXELS
    ]
    return Case(
        name="size",
        what="64 patches of 256 x 256 inside of the written chunks of sparse images, one per written square",
        size_px=256,
        contestants=tuple(contestants),
    )


CASES = ("random", "random 100", "clustered", "jpeg", "real", "latency", "size")


def run(data: Data, names: Sequence[str], repetitions: int) -> dict[str, Any]:
    """Measure the cases named, printing as they come."""
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "peers": versions(PEERS),
        "load_before": [round(n, 1) for n in os.getloadavg()],
        "parameters": {"side_px": data.config.side_px, "repetitions": repetitions, "patches": NUM_PATCHES},
        "bytes_per_pixel": _compressed_sizes(data),
        "cases": [],
        "pixels_differ": [],
    }
    print(json.dumps(result["bytes_per_pixel"]))
    makers = {"random": random_case, "random 100": random_100_case, "clustered": clustered_case}
    makers |= {"jpeg": jpeg_case, "size": size_case}

    def measure(case: Case) -> None:
        found = run_case(case, repetitions)
        print_case(found)
        result["cases"].append(found)
        result["pixels_differ"] += [f"{case.name}: {name}" for name in differing(case, found)]

    for name in names:
        if name in makers:
            measure(makers[name](data))
        elif name == "real":
            for case in real_cases(data):
                measure(case)
        else:
            with latency_server(data.folder, DELAY_MS) as server:
                measure(latency_case(data, server))
    result["load_after"] = [round(n, 1) for n in os.getloadavg()]
    result["targets"] = check_targets(result)
    return result


def _compressed_sizes(data: Data) -> dict[str, dict[str, float]]:
    sizes = {"synthetic": synthetic_slide.compressed_sizes(data.slide)}
    if data.real is not None:
        for name, place in REAL_SLIDES.items():
            sizes[name] = synthetic_slide.compressed_sizes(data.real / place)
    return sizes


def print_case(found: dict[str, Any]) -> None:
    print(f"\n{found['what']}")
    heads = (
        "cpu_ms",
        "cpu_ms_min",
        "wall_ms",
        "wall_ms_min",
        "bytes_per_useful_byte",
        "requests",
        "peak_mib",
    )
    print(f"{'':34}" + "".join(f"{_head(head):>11}" for head in heads))
    for one in found["contestants"]:
        if "not_available" in one:
            print(f"{one['name']:34}  not available: {one['not_available'][:160]}")
        else:
            print(f"{one['name']:34}" + "".join(f"{one.get(head, '-'):>11}" for head in heads), flush=True)


def _head(name: str) -> str:
    return {"bytes_per_useful_byte": "bytes/byte"}.get(name, re.sub("_", " ", name))


def print_targets(checks: list[dict[str, Any]]) -> None:
    print()
    for check in checks:
        verdict = {True: "holds", False: "MISSED", None: "not measured"}[check["holds"]]
        ratio = f"{check['ratio']:.3f}" if "ratio" in check else "-"
        least = f"{check['ratio_of_minima']:.3f}" if "ratio_of_minima" in check else "-"
        print(f"{verdict:12} {ratio:>7} (of minima {least:>6}), at most {check['limit']:<5} {check['what']}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--side", type=int, default=20480, help="side of the synthetic slide in pixels")
    parser.add_argument(
        "--data", type=Path, default=Path(tempfile.gettempdir()) / "ats-stream-benchmark-read", help="folder"
    )
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES)
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    root = os.environ.get("ATS_STREAM_TEST_DATA")
    real = Path(root) / "wsi" if root else None
    data = Data(options.data, SlideConfig(side_px=options.side), real if real and real.is_dir() else None)
    result = run(data, options.cases, options.repetitions)
    print_targets(result["targets"])
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if result["pixels_differ"]:
        print(f"pixels differ: {', '.join(result['pixels_differ'])}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
