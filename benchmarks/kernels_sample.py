"""Drawing on a device, for benchmarks/kernels.py: 16 x 1,000,000 logits, N = 64.

Needs numpy, torch and CuPy alone. The ways:

    race        both kernels of the operator: positions, keys, normaliser, mass of the rest
    draw        draw() with "murthy" weights, its one wait for the device included
    chain       log_softmax, exponential_, division, topk in torch: float32 noise, no normaliser of the rest
    log_softmax the first step of the chain alone
    floor       one read of the logits at the rate at which this device copies, given by the caller

    python benchmarks/kernels_sample.py [--rows 16] [--positions 1000000] [--samples 64]    prints a table
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import torch

from ats_stream.kernels.sample import sample_race
from ats_stream.sampling import draw

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_WARM = 5
NUM_CALLS = 50
FILL_BYTES = 1 << 30  # 1 GiB: about half a millisecond
FLOOR_TARGET = 2.0  # times the floor, at most
CHAIN_TARGET = 5.0  # times faster than the chain, at least


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--positions", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=64)
    arguments = parser.parse_args()
    copied = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(copied)
    rate = 2 * copied.numel() / (median_ms(lambda: target.copy_(copied)) * 1e-3)
    print(
        json.dumps(
            measure(arguments.rows, arguments.positions, arguments.samples, bytes_per_s=rate), indent=1
        )
    )


def measure(
    num_rows: int = 16, num_positions: int = 1_000_000, num_samples: int = 64, *, bytes_per_s: float
) -> dict[str, Any]:
    """Times in ms, their ratios, and whether the positions are those of the CPU."""
    generator = torch.Generator().manual_seed(0)
    on_cpu_BM = torch.randn(num_rows, num_positions, generator=generator)
    logits_BM = on_cpu_BM.cuda()
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    streams_B = torch.arange(num_rows, device="cuda")
    noise_BM = torch.empty_like(logits_BM)

    def chain() -> Any:
        # the smallest of E / p are the first arrivals; the largest of p / E are the same
        log_q_BM = torch.log_softmax(logits_BM, dim=1)
        return (log_q_BM.exp() / noise_BM.exponential_()).topk(num_samples, dim=1)

    ways: dict[str, Callable[[], Any]] = {
        "race": lambda: sample_race(logits_BM, num_samples + 1, seed=seed, stream_ids_B=streams_B),
        "draw": lambda: draw(logits_BM, num_samples, seed=seed),
        "chain": chain,
        "log_softmax": lambda: torch.log_softmax(logits_BM, dim=1),
    }
    times_ms = {name: median_ms(way) for name, way in ways.items()}
    times_ms["floor"] = logits_BM.nbytes / bytes_per_s * 1e3
    same = torch.equal(draw(on_cpu_BM, num_samples).index, draw(logits_BM, num_samples).index.cpu())
    over_floor = times_ms["race"] / times_ms["floor"]
    over_chain = times_ms["chain"] / times_ms["race"]
    return {
        "case": f"{num_rows} x {num_positions} float32, N = {num_samples}",
        "ms": {name: round(value, 4) for name, value in times_ms.items()},
        "times_the_floor": round(over_floor, 2),
        "times_faster_than_the_chain": round(over_chain, 2),
        "same_positions_as_the_cpu": same,
        "targets_met": same and over_floor <= FLOOR_TARGET and over_chain >= CHAIN_TARGET,
    }


def median_ms(call: Callable[[], Any]) -> float:
    """Median time between two events around a call.

    Before each, a large fill empties the cache, and gives the host the time to queue the call.
    """
    filled = torch.empty(FILL_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(NUM_WARM):
        call()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(NUM_CALLS)]
    for start, end in pairs:
        filled.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in pairs)[NUM_CALLS // 2]


if __name__ == "__main__":
    main()
