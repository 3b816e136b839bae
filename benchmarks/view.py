"""How long the viewer takes for a tile, and how much memory it holds.

    .venv/bin/python benchmarks/view.py               # stored in results/view.json
    .venv/bin/python benchmarks/view.py --quick       # a small version, written nowhere

`ats-stream view` runs in a process of its own, as users start it; this one asks it for tiles over kept
connections. Sources: a synthetic slide (tiled TIFF, three levels a factor of four apart) read in place, its
zstd pyramid, and an image of 10 gigapixels that is stored where sites are. Files are in the page cache.

* **cold**: the first tiles of a fresh process, one after another: imports, opening, compiled code.
* **warm**: tiles that were never asked for, at random places of all resolutions, read and encoded anew.
* **again**: the same tiles once more, which the server still holds.
* **six**: other tiles that were never asked for, over six connections at once, as browsers do.

Latency is from sending the request to the last byte, in milliseconds. Memory is the server's largest, over
5,000 requests for tiles at random places, and what it was after the first 500.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from machine import describe_machine, mib, print_contestants, versions
from read_cases import Data
from synthetic_slide import SlideConfig
from targets import Target, print_targets

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RESULTS = Path(__file__).parent / "results" / "view.json"
SOURCES = ("pyramid", "slide", "sparse")
CONNECTIONS = 6
COLD, WARM, MEMORY, EARLY = 8, 300, 5000, 500  # tiles asked for
GIGAPIXELS = 10
# what the caches may hold, and room for tiles in the making and the allocator
MAX_GROWTH_MIB = 128 + 32 + 200
COLUMNS = {
    "num": "tiles",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "worst_ms": "worst ms",
    "kb": "kB a tile",
    "cpu_ms": "CPU ms",
}
LIMITS_MS = {"p50_ms": 30.0, "p99_ms": 200.0}
TARGETS = (
    *(
        Target(case=source, metric=metric, ours=ours, limit=limit, at_least=False)
        for source in SOURCES
        for ours in ("warm", "again")
        for metric, limit in LIMITS_MS.items()
    ),
    Target(case="memory", metric="growth_mib", ours="pyramid", limit=MAX_GROWTH_MIB, at_least=False),
)


class Server:
    """`ats-stream view` of one image in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        address = urlsplit(process.stdout.readline().split(" at ")[1].split()[0])
        self.host, self.port, self.root = address.hostname, address.port, address.path
        connection = self.connection()
        info = json.loads(self.get(connection, "images/0/info.json"))
        connection.close()
        self.tiles = [
            (number, column, row)
            for number, one in enumerate(info["resolutions"])
            for column in range(one["columns"])
            for row in range(one["rows"])
        ]
        self.finest = len(info["resolutions"]) - 1

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=600)

    def get(self, connection: http.client.HTTPConnection, path: str) -> bytes:
        connection.request("GET", self.root + path)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {body.decode()}")
        return body

    def ask(self, tiles: Sequence[tuple[int, int, int]]) -> tuple[list[float], int]:
        """Seconds of each tile over one connection, and bytes of all."""
        connection, seconds, num_bytes = self.connection(), [], 0
        for number, column, row in tiles:
            begin = time.perf_counter()
            num_bytes += len(self.get(connection, f"images/0/tiles/{number}/{column}/{row}.jpeg"))
            seconds.append(time.perf_counter() - begin)
        connection.close()
        return seconds, num_bytes

    def cpu_s(self) -> float:
        user, system = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def memory_bytes(self, field: str) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))

    def measure(
        self, name: str, tiles: Sequence[tuple[int, int, int]], connections: int = 1
    ) -> dict[str, Any]:
        """A row of the table: latencies of the tiles over so many connections at once."""
        before = self.cpu_s()
        with ThreadPoolExecutor(connections) as pool:
            parts = list(pool.map(self.ask, (tiles[i::connections] for i in range(connections))))
        seconds = [one for part, _ in parts for one in part]
        p50, p99 = (float(value) for value in np.percentile(seconds, (50, 99)))
        return {
            "name": name,
            "num": len(seconds),
            "p50_ms": round(1e3 * p50, 2),
            "p99_ms": round(1e3 * p99, 2),
            "worst_ms": round(1e3 * max(seconds), 1),
            "kb": round(sum(size for _, size in parts) / len(seconds) / 1e3, 1),
            "cpu_ms": round(1e3 * (self.cpu_s() - before) / len(seconds), 2),
        }


@contextmanager
def viewing(place: Path) -> Iterator[Server]:
    """A server of one image."""
    command = [sys.executable, "-m", "ats_stream.cli", "view", str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield Server(process)
        finally:
            process.terminate()
            process.wait()


def latency_case(source: str, place: Path, num_cold: int, num_tiles: int) -> dict[str, Any]:
    with viewing(place) as server:
        # without coarse levels a tile of the whole reads up to 8192 x 8192 pixels: no case of interest
        known = [t for t in server.tiles if source != "sparse" or t[0] == server.finest]
        order = np.random.default_rng(0).permutation(len(known))
        tiles = [known[i] for i in order]
        cold, rest = tiles[:num_cold], tiles[num_cold:]
        warm, six = rest[:num_tiles], rest[num_tiles : 2 * num_tiles]
        rows = [
            server.measure("cold", cold),
            server.measure("warm", warm),
            server.measure("again", warm),
            server.measure("six", six, CONNECTIONS),
        ]
    return {"case": source, "contestants": rows}


def memory_case(place: Path, num_requests: int) -> dict[str, Any]:
    """The server's largest memory over many requests, and how much more that is than after the first."""
    with viewing(place) as server:
        chosen = np.random.default_rng(1).integers(0, len(server.tiles), num_requests)
        tiles = [server.tiles[i] for i in chosen]
        early = min(EARLY, num_requests // 2)
        first = server.measure("first", tiles[:early], CONNECTIONS)
        before = server.memory_bytes("VmRSS")
        rest = server.measure("pyramid", tiles[early:], CONNECTIONS)
        peak = server.memory_bytes("VmHWM")
    memory = {"early_mib": mib(before), "peak_mib": mib(peak), "growth_mib": mib(peak - before)}
    return {"case": "memory", "contestants": [{**rest, **memory, "num": first["num"] + rest["num"]}]}


def run(data: Data, *, num_cold: int, num_tiles: int, num_requests: int) -> dict[str, Any]:
    """Measure all cases, printing as they come."""
    places = {"pyramid": data.zstd(128), "slide": data.slide, "sparse": data.sparse(GIGAPIXELS)}
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "versions": versions(("ats-stream", "pillow", "imagecodecs", "openslide-bin")),
        "load_before": [round(n, 1) for n in os.getloadavg()],
        "parameters": {"side_px": data.config.side_px, "tiles": num_tiles, "requests": num_requests},
        "cases": [],
    }
    for source in SOURCES:
        found = latency_case(source, places[source], num_cold, num_tiles)
        print(f"\n{source}")
        print_contestants(found["contestants"], COLUMNS, name_width=10, width=11)
        result["cases"].append(found)
    found = memory_case(places["pyramid"], num_requests)
    print("\nmemory")
    heads = {"num": "tiles", "early_mib": "early MiB", "peak_mib": "peak MiB", "growth_mib": "growth MiB"}
    print_contestants(found["contestants"], heads, name_width=10, width=11)
    result["cases"].append(found)
    result["load_after"] = [round(n, 1) for n in os.getloadavg()]
    result["targets"] = [target.check(result["cases"]) for target in TARGETS]
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--side", type=int, default=20480, help="side of the synthetic slide in pixels")
    parser.add_argument(
        "--data", type=Path, default=Path(tempfile.gettempdir()) / "ats-stream-benchmark-read", help="folder"
    )
    parser.add_argument("--quick", action="store_true", help="a small slide and few tiles, written nowhere")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    side = min(options.side, 4096) if options.quick else options.side
    data = Data(options.data, SlideConfig(side_px=side), None)
    num_tiles, num_requests = (24, 60) if options.quick else (WARM, MEMORY)
    result = run(data, num_cold=COLD, num_tiles=num_tiles, num_requests=num_requests)
    print_targets(result["targets"])
    if not options.quick:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
