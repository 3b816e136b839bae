"""The stream of items: beside its peers, with storage far away, and with images of any size.

    .venv/bin/python benchmarks/stream.py                     # all cases, stored in results/stream.json
    .venv/bin/python benchmarks/stream.py --quick             # a small version, written nowhere

Four cases, each in turns, so that what else the machine does hits all alike; numbers are medians over turns:

* **transport**: items of 4 MB, copies of patches that lie in memory, from two processes to one that copies
  them into a batch. Peers: as little as can be around calls of Ray actors, Ray Data (actor pool and
  streaming_split), torch's DataLoader with two workers; the floor is two copies of 4 MB in one process. A
  turn is an epoch of 200 items, and everything an engine does at the begin of an epoch counts.
* **read**: the same with patches read from zstd chunks of 128 px, by the same code in all engines.
* **overlap**: real training on images behind a server of this machine that answers each request after 30 ms,
  with lag 0, 1 and 2: images per second, the share of the time that training waits, and what others had of
  the cores.
* **size**: one process draws from an image, reads, and trains on it, images of 1 to 100 gigapixels, view and
  number of patches the same; the images are stored where patches are drawn.

CPU is that of all processes of the benchmark, those of Ray included, per item. Peak memory is that of the
process that takes items, which maps the shared memory that it reads, and of the largest that makes them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from latency_server import latency_server
from machine import describe_machine, mib, peak_bytes, print_contestants, versions
from simulate_check import Setting, real_run
from stream_cases import GROWING_PATCHES, Growing, OneImage
from stream_engines import ENGINES, NUM_PRODUCERS, WINDOW, Work
from synthetic_slide import SlideConfig, make_slide, write_store
from targets import Target, print_targets
from turns import Process, serve

from ats_stream.demo.assets import fetch_digits
from ats_stream.demo.digits import DigitsConfig, build_archive
from ats_stream.io import read_archive
from ats_stream.models import ModelConfig
from ats_stream.workers import ClusterConfig, RunConfig, SamplerConfig, TrainerConfig
from ats_stream.workers.cluster import ray_cluster

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RESULTS = Path(__file__).parent / "results" / "stream.json"
CASES = ("transport", "read", "overlap", "size")
OURS = "ats-stream"
OBJECT_STORE_BYTES = 1 << 30  # 1 GiB


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured."""

    num_items: int = 200
    """Items of a turn of transport and read."""
    num_patches: int = 21
    """Patches of an item there, 4.1 MB of them."""
    turns: int = 5
    read_turns: int = 2
    slide_px: int = 4096
    overlap_images: int = 16
    overlap_px: int = 4096
    overlap_steps: int = 40
    overlap_turns: int = 1
    samplers: int = 4
    feature_width: int = 96
    """Of the network in overlap: so wide that a rank computes for longer than samplers take for its items."""
    latency_ms: float = 30.0
    view_px: int = 494
    cells_px: tuple[int, ...] = (64, 200, 648)
    """Pixels of full resolution for one of the view: 1, 10 and 100 gigapixels."""
    visits: int = 10


QUICK = Size(
    num_items=6,
    num_patches=2,
    turns=1,
    read_turns=1,
    slide_px=1024,
    overlap_images=8,
    overlap_px=1024,
    overlap_steps=2,
    overlap_turns=1,
    samplers=1,
    feature_width=8,
    latency_ms=2,
    view_px=96,
    cells_px=(32, 64),
    visits=1,
)


def targets(size: Size) -> tuple[Target, ...]:
    """What holds of this package if it is as good as it is meant to be."""
    small, big = (growing_name(Growing(view_px=size.view_px, cell_px=px)) for px in _ends(size.cells_px))
    return (
        *(
            Target(case="transport", metric="items_per_s", ours=OURS, peer=peer, limit=limit)
            for peer, limit in (("bare window", 0.9), ("Ray Data", 5.0), ("DataLoader", 1.0))
        ),
        *(
            Target(case="overlap", metric="wait_share", ours=f"lag {lag}", limit=0.05, at_least=False)
            for lag in (1, 2)
        ),
        *(
            Target(case="size", metric=metric, ours=big, peer=small, limit=1.1, at_least=False)
            for metric in ("wall_ms", "cpu_ms", "peak_mib")
        ),
    )


def _ends(numbers: Sequence[int]) -> tuple[int, int]:
    return numbers[0], numbers[-1]


def growing_name(image: Growing) -> str:
    return f"{image.gigapixels:.3g} gigapixels"


class Counters:
    """Processor time and memory of the processes below this one."""

    def __init__(self) -> None:
        self._before = self._seconds()

    def cpu_s(self) -> float:
        """Processor time since it was made, of the processes that are still there."""
        return sum(now - self._before.get(pid, 0.0) for pid, now in self._seconds().items())

    @staticmethod
    def _seconds() -> dict[int, float]:
        found = {}
        for process in psutil.Process().children(recursive=True):
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue
            found[process.pid] = times.user + times.system
        return found


def producer_mib(name: str, worker: Process) -> float:
    """Peak memory of the largest process that makes items for an engine."""
    titles = ENGINES[name].producers
    if not titles:
        below = psutil.Process(worker.process.pid).children(recursive=True)
    else:
        below = [p for p in psutil.Process().children(recursive=True) if _title(p).startswith(titles)]
    return mib(max((peak_bytes(process.pid) for process in below), default=0))


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def items_case(
    name: str, what: str, work: Work, *, num_items: int, turns: int, engines: Sequence[str] = tuple(ENGINES)
) -> dict[str, Any]:
    """Items from two processes to one, by the engines in turns."""
    workers = {engine: Process.begin(serve, ENGINES[engine], (work,)) for engine in engines}
    contestants, sums = [], {}
    try:
        for turn in range(-1, turns):
            for engine, worker in workers.items():
                counters = Counters()
                sample = worker.ask("epoch", num_items)
                if sample is None or turn < 0:
                    continue
                if engine != "two copies":
                    sums[engine] = sample["sum"]
                worker.samples.append({**sample, "cpu_s": counters.cpu_s()})
        for engine, worker in workers.items():
            memory = worker.ask("memory")
            found = {"name": engine}
            if memory is None:
                contestants.append({**found, "not_available": worker.problem})
            else:
                memory["producer_mib"] = producer_mib(engine, worker)
                contestants.append({**found, **summary(worker.samples), **memory})
    finally:
        for worker in workers.values():
            worker.stop()
    differ = [engine for engine, total in sums.items() if total != sums.get(OURS)]
    return {"case": name, "what": what, "contestants": contestants, "pixels_differ": differ}


def summary(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians over the turns; the best turn beside them."""
    rates = [sample["items"] / sample["wall_s"] for sample in samples]
    return {
        "items_per_s": round(statistics.median(rates), 2),
        "items_per_s_best": round(max(rates), 2),
        "wall_ms": round(1e3 / statistics.median(rates), 3),
        "cpu_ms": round(statistics.median(1e3 * s["cpu_s"] / s["items"] for s in samples), 3),
        "turns": len(samples),
    }


def overlap_case(folder: Path, size: Size) -> dict[str, Any]:
    """Training with lag 0, 1 and 2 on images behind a server that takes its time."""
    torch.set_num_threads(1)
    digits = DigitsConfig(num_train=size.overlap_images, num_val=1, num_test=1, side_px=size.overlap_px)
    archive = read_archive(build_archive(folder, fetch_digits(), digits))
    rows = [row for row in archive if row.split == "train"]
    config = RunConfig(
        model=ModelConfig(num_classes=len(archive.classes), feature_width=size.feature_width),
        sampler=SamplerConfig(num_patches=12, patch_px=64),
        trainer=TrainerConfig(batch_size=8),
        classes=archive.classes,
    )
    labels = [archive.class_index(row) for row in rows]
    samples: dict[str, list[dict[str, float]]] = {}
    with latency_server(folder, size.latency_ms) as url:
        slides = [f"{url}/{Path(row.slide).relative_to(folder)}" for row in rows]
        setting = Setting(slides, labels, config, size.overlap_steps)
        for _ in range(size.overlap_turns):
            for lag in (0, 1, 2):
                found = real_run(setting, samplers=size.samplers, lag=lag)
                samples.setdefault(f"lag {lag}", []).append(found)
    contestants = [
        {"name": name, **{key: round(statistics.median(s[key] for s in turns), 4) for key in turns[0]}}
        for name, turns in samples.items()
    ]
    return {
        "case": "overlap",
        "what": f"training, {size.samplers} samplers, {size.latency_ms:g} ms for each request",
        "contestants": contestants,
    }


def size_case(folder: Path, size: Size) -> dict[str, Any]:
    """One image, of several sizes: drawing, reading and training."""
    workers = {}
    for cell_px in size.cells_px:
        image = Growing(view_px=size.view_px, cell_px=cell_px)
        place = folder / f"{cell_px}.ome.zarr"
        image.write(place)
        workers[growing_name(image)] = Process.begin(serve, OneImage, (str(place), cell_px))
    try:
        for turn in range(-1, size.turns):
            for worker in workers.values():
                sample = worker.ask("measure", size.visits)
                if sample is not None and turn >= 0:
                    worker.samples.append(sample)
        contestants = [
            {"name": name, "not_available": worker.problem}
            if worker.problem is not None
            else {"name": name, **summary(worker.samples), **_read(worker), **worker.ask("memory")}
            for name, worker in workers.items()
        ]
    finally:
        for worker in workers.values():
            worker.stop()
    return {
        "case": "size",
        "what": f"training on {GROWING_PATCHES} patches of one image, its view {size.view_px} px wide",
        "contestants": contestants,
    }


def _read(worker: Process) -> dict[str, float]:
    decoded = [sample["decoded_bytes"] / sample["items"] for sample in worker.samples]
    return {"decoded_mib": mib(statistics.median(decoded))}


def read_work(folder: Path, size: Size, address: str, config: SamplerConfig) -> Work:
    """A pyramid of zstd chunks of a synthetic slide, once for each item, so that each draws anew."""
    place = folder / "slide.ome.zarr"
    write_store(make_slide(folder, SlideConfig(side_px=size.slide_px)), place, 128)
    # its coarsest level
    config = replace(config, view_downsample=size.slide_px / 256)
    return Work(config=config, slides=(str(place),) * size.num_items, address=address)


def measure(names: Sequence[str], size: Size, folder: Path) -> Iterator[dict[str, Any]]:
    """The cases that are named, one after the other."""
    import ray

    config = SamplerConfig(num_patches=size.num_patches, patch_px=256)
    mb = size.num_patches * 3 * 256**2 / 1e6
    about = f"items of {mb:.1f} MB from {NUM_PRODUCERS} processes, at most {WINDOW} on order"
    with ray_cluster(ClusterConfig(executor="ray", object_store_bytes=OBJECT_STORE_BYTES), cpus_needed=8):
        address = ray.get_runtime_context().gcs_address
        if "transport" in names:
            work, turns = Work(config=config, address=address), size.turns
            yield items_case("transport", f"{about}, copied", work, num_items=size.num_items, turns=turns)
        if "read" in names:
            work, turns = read_work(folder / "read", size, address, config), size.read_turns
            yield items_case("read", f"{about}, read", work, num_items=size.num_items, turns=turns)
        if "overlap" in names:
            yield overlap_case(folder / "overlap", size)
    if "size" in names:
        yield size_case(folder / "size", size)


def run(names: Sequence[str], size: Size, folder: Path) -> dict[str, Any]:
    """Measure, printing as results come."""
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "peers": versions(("ray", "torch")),
        "load_before": [round(n, 1) for n in os.getloadavg()],
        "parameters": asdict(size),
        "cases": [],
    }
    for found in measure(names, size, folder):
        print_case(found)
        result["cases"].append(found)
    result["load_after"] = [round(n, 1) for n in os.getloadavg()]
    result["targets"] = [target.check(result["cases"]) for target in targets(size)]
    return result


HEADS = ("items_per_s", "items_per_s_best", "wall_ms", "cpu_ms", "decoded_mib", "peak_mib", "producer_mib")
OVERLAP_HEADS = ("images_per_s", "wait_share", "others_share")


def print_case(found: dict[str, Any]) -> None:
    print(f"\n{found['what']}")
    heads = OVERLAP_HEADS if found["case"] == "overlap" else HEADS
    shown = {head: head.replace("_", " ") for head in heads}
    print_contestants(found["contestants"], shown, name_width=18, width=18)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE")
    parser.add_argument("--quick", action="store_true", help="a small version, written nowhere")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="ats-stream-") as folder:
        result = run(options.cases, QUICK if options.quick else Size(), Path(folder))
    print_targets(result["targets"])
    if not options.quick:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    differ = [name for case in result["cases"] for name in case.get("pixels_differ", [])]
    if differ:
        print(f"pixels differ: {', '.join(differ)}", file=sys.stderr)
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
