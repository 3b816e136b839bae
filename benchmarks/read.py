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
minima) over the repetitions. Where cores are hyperthreads, a thread beside another takes more CPU time for
the same work, in every engine; so CPU time is compared at equal numbers of threads: as many as there are
cores, or one ("1 thread" of ours and of tensorstore, "cuCIM" beside "cuCIM batch"). The first read of ours,
a warm-up, loads compiled code. Bytes are what the process asked of the file system, or of the HTTP server,
per byte of the patches; memory maps do not show in it. Peak memory is that of the process since it started.
All engines must give the same pixels: exactly so from zstd, up to the rounding of the decoder from JPEG.

Peers: pip install "ats-stream[bench]"; then cuCIM, without what it needs for GPUs, as
pip install --no-deps cucim-cu12 and pip install lazy-loader. What is missing is reported and left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import sys
import tempfile
import urllib.request
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import synthetic_slide
from latency_server import COUNTS, latency_server
from machine import describe_machine, print_contestants, store_result, versions
from read_cases import (
    CASES,
    DELAY_MS,
    GIGAPIXELS,
    NUM_PATCHES,
    OURS,
    REAL_SLIDES,
    Case,
    Contestant,
    Data,
    latency_case,
    local_cases,
)
from read_engines import FLOORS, serve
from synthetic_slide import SlideConfig
from turns import Process

if TYPE_CHECKING:
    from collections.abc import Sequence

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
WARM_UPS = 2
MAX_SECONDS = 40.0  # of one contestant in one case, once it has been measured twice

OPENSLIDE = ("OpenSlide", "OpenSlide, default cache")


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


def _beside(case: str, limit: float, peer: str, peer_1: str, ours: str = OURS) -> list[Target]:
    """The same bound of CPU time with as many threads as there are cores, and with one on either side."""
    pairs = ((ours, peer), (f"{ours}, 1 thread", peer_1))
    return [Target(case=case, metric="cpu_ms", limit=limit, peers=(p,), ours=o) for o, p in pairs]


TARGETS = (
    *_beside("random", 1.1, "tensorstore", "tensorstore, 1 thread"),
    Target(case="random", metric="cpu_ms", limit=0.28, peers=("zarr-python loop",)),
    Target(case="random", metric="wall_ms", limit=0.16, peers=("zarr-python loop",)),
    Target(case="random 100", metric="cpu_ms", limit=0.2, peers=("zarr-python loop",)),
    *_beside("random 100", 1.25, "tensorstore", "tensorstore, 1 thread"),
    *_beside("clustered", 0.9, "tensorstore", "tensorstore, 1 thread"),
    *_beside("jpeg", 1.1, "cuCIM batch", "cuCIM"),
    *_beside("jpeg", 1.1, "cuCIM batch", "cuCIM", ours=f"{OURS}, the slide"),
    Target(case="jpeg", metric="cpu_ms", limit=0.5, peers=OPENSLIDE),
    Target(case="latency", metric="wall_ms", limit=0.95, peers=("tensorstore",)),
    Target(case="latency", metric="wall_ms", limit=0.4, peers=("zarr-python gather",)),
    Target(case="latency", metric="wall_ms", limit=0.01, peers=("zarr-python loop",)),
    *(_growth(metric) for metric in ("cpu_ms", "wall_ms", "batch_mib", "peak_mib")),
)


@dataclass(kw_only=True)
class Worker(Process):
    """The process of a contestant, and what was measured of it."""

    contestant: Contestant
    memory: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, contestant: Contestant, size_px: int) -> Worker:
        worker: Worker = cls.begin(serve, contestant.engine, contestant.place, size_px, contestant=contestant)
        return worker

    def is_done(self) -> bool:
        return len(self.samples) >= 2 and sum(s["wall_s"] for s in self.samples) > MAX_SECONDS


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

    def measure(case: Case) -> None:
        found = run_case(case, repetitions)
        print_case(found)
        result["cases"].append(found)
        result["pixels_differ"] += [f"{case.name}: {name}" for name in differing(case, found)]

    for name in names:
        if name == "latency":
            with latency_server(data.folder, DELAY_MS) as server:
                measure(latency_case(data, server))
            continue
        for case in local_cases(data, name):
            measure(case)
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
    print_contestants(found["contestants"], {head: _head(head) for head in heads}, name_width=34, width=11)


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
    return store_result(result, options.out)


if __name__ == "__main__":
    sys.exit(main())
