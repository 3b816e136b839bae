"""What it costs on a CPU to draw 64 positions from attention maps and to weigh them.

    python benchmarks/sampling.py            all cases, a few minutes; writes benchmarks/results/sampling.json
    python benchmarks/sampling.py --quick    the smallest maps alone, nothing written

Each case runs in a process of its own: the least wall and CPU time of several calls, and the growth of the
largest resident size over those calls, in copies of the logits. The methods:

    gumbel       log_softmax, Gumbel noise, topk in torch: float32 noise, no weights
    multinomial  softmax and torch.multinomial without replacement: at most 2^24 positions, no weights
    compiled     draw(), positions and weights, through compiled code
    torch        draw(), the same bits, through torch
    balanced     draw(scheme="balanced")
    floor        one read of the logits and one exponential of each, in blocks that stay in the cache
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from machine import describe_machine

from ats_stream.kernels.sample_cpu import compiled_path
from ats_stream.sampling import draw, estimator_weights

if TYPE_CHECKING:
    from collections.abc import Callable

RESULT = Path(__file__).parent / "results" / "sampling.json"
NUM_SAMPLES = 64
METHODS = ["gumbel", "multinomial", "compiled", "torch", "balanced", "floor"]
CASES = [
    (16, 10_000, 1, METHODS),
    (16, 65_536, 1, METHODS),
    (16, 1_000_000, 1, METHODS),
    (16, 1_000_000, 2, ["gumbel", "multinomial", "compiled", "torch", "floor"]),
    (1, 100_000_000, 1, ["gumbel", "compiled", "torch", "floor"]),
]
MANY_VALUES = 1 << 26  # from here on, one call has to be enough
BLOCK = 1 << 14
FIRST_CALL = """
import time
import torch
from ats_stream.sampling import draw
start = time.process_time()
draw(torch.zeros(16, 4096), 64)
print(time.process_time() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", nargs=4, metavar=("METHOD", "ROWS", "POSITIONS", "THREADS"))
    arguments = parser.parse_args()
    if arguments.case:
        method, *numbers = arguments.case
        print(json.dumps(measure(method, *map(int, numbers))))
        return
    cases = []
    for num_rows, num_positions, num_threads, methods in CASES[: 1 if arguments.quick else None]:
        results = {name: run_case(name, num_rows, num_positions, num_threads) for name in methods}
        case = {"rows": num_rows, "positions": num_positions, "threads": num_threads, "methods": results}
        cases.append(case)
        report(case)
    weights = measure_weights()
    first_call = {"with_numba_cache_cpu_s": first_call_s(None)}
    with tempfile.TemporaryDirectory() as folder:
        first_call["without_cpu_s"] = first_call_s(folder)
    print(f"weights (16, {NUM_SAMPLES}):", weights, " first call:", first_call)
    if not arguments.quick:
        result = {
            "machine": describe_machine(),
            "num_samples": NUM_SAMPLES,
            "cases": cases,
            "murthy_weights_16x64": weights,
            "first_compiled_call": first_call,
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


def run_case(method: str, num_rows: int, num_positions: int, num_threads: int) -> dict[str, float]:
    case = ["--case", method, str(num_rows), str(num_positions), str(num_threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    command = [sys.executable, __file__, *case]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def measure(method: str, num_rows: int, num_positions: int, num_threads: int) -> dict[str, float]:
    torch.set_num_threads(num_threads)
    logits_BM = torch.empty(num_rows, num_positions)
    generator = torch.Generator().manual_seed(0)
    for part in logits_BM.view(-1).split(1 << 20):
        part.normal_(generator=generator)
    call = method_of(method)
    call(logits_BM[:1, :20_000].contiguous())  # loads code; does not count
    num_calls = 1 if logits_BM.numel() > MANY_VALUES else 5
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall_s, cpu_s = least_times(lambda: call(logits_BM), num_calls)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    copies = grown_kib * 1024 / (logits_BM.numel() * logits_BM.element_size())
    return {
        "wall_ms": round(wall_s * 1e3, 3),
        "cpu_ms": round(cpu_s * 1e3, 3),
        "ns_per_position": round(wall_s * 1e9 / logits_BM.numel(), 3),
        "peak_extra_mib": round(grown_kib / 1024, 1),
        "peak_extra_copies": round(copies, 3),
    }


def least_times(call: Callable[[], Any], num_calls: int) -> tuple[float, float]:
    walls, cpus = [], []
    for _ in range(num_calls):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)


def method_of(name: str) -> Callable[[torch.Tensor], Any]:
    def gumbel(logits_BM: torch.Tensor) -> Any:
        noise_BM = -torch.log(-torch.log(torch.rand_like(logits_BM)))
        return (torch.log_softmax(logits_BM, dim=1) + noise_BM).topk(NUM_SAMPLES, dim=1)

    def multinomial(logits_BM: torch.Tensor) -> Any:
        return torch.multinomial(logits_BM.softmax(dim=1), NUM_SAMPLES)

    def compiled(logits_BM: torch.Tensor) -> Any:
        with compiled_path(True):
            return draw(logits_BM, NUM_SAMPLES)

    def plain(logits_BM: torch.Tensor) -> Any:
        with compiled_path(False):
            return draw(logits_BM, NUM_SAMPLES)

    def balanced(logits_BM: torch.Tensor) -> Any:
        num_positions = logits_BM.shape[1]
        side = next(side for side in range(int(num_positions**0.5), 0, -1) if num_positions % side == 0)
        return draw(logits_BM, NUM_SAMPLES, scheme="balanced", map_shape=(side, num_positions // side))

    def floor(logits_BM: torch.Tensor) -> Any:
        buffer = torch.empty(min(BLOCK, logits_BM.numel()))
        total = 0.0
        for part in logits_BM.view(-1).split(BLOCK):
            total += float(torch.exp(part, out=buffer[: len(part)]).sum())
        return total

    return {
        "gumbel": gumbel,
        "multinomial": multinomial,
        "compiled": compiled,
        "torch": plain,
        "balanced": balanced,
        "floor": floor,
    }[name]


def measure_weights() -> dict[str, float]:
    torch.set_num_threads(1)
    logits_BM = torch.randn(16, 10_000, generator=torch.Generator().manual_seed(0))
    q_BN = draw(logits_BM, NUM_SAMPLES).log_prob.exp()
    wall_s, cpu_s = least_times(lambda: estimator_weights(q_BN, "murthy"), 100)
    return {"wall_ms": round(wall_s * 1e3, 3), "cpu_ms": round(cpu_s * 1e3, 3)}


def first_call_s(cache_folder: str | None) -> float:
    """CPU seconds of the first draw of a process through compiled code, import of numba included."""
    environment = dict(os.environ)
    if cache_folder is not None:
        environment["NUMBA_CACHE_DIR"] = cache_folder
    command = [sys.executable, "-c", FIRST_CALL]
    for _ in range(1 if cache_folder else 2):  # the first run of two fills the cache
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return round(float(done.stdout), 2)


def report(case: dict[str, Any]) -> None:
    methods = case["methods"]
    print(f"{case['rows']} x {case['positions']:,}, {case['threads']} threads")
    for name, found in methods.items():
        wall_ratio, cpu_ratio = (methods["gumbel"][unit] / found[unit] for unit in ("wall_ms", "cpu_ms"))
        print(
            f"  {name:12} wall {found['wall_ms']:10.2f} ms ({wall_ratio:5.2f} x gumbel)"
            f"  cpu {found['cpu_ms']:10.2f} ms ({cpu_ratio:5.2f} x)"
            f"  extra {found['peak_extra_mib']:8.1f} MiB ({found['peak_extra_copies']:.2f} copies)",
            flush=True,
        )


if __name__ == "__main__":
    main()
