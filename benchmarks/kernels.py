"""Speed of the kernels beside what torch does, and the floor that memory sets.

    python benchmarks/kernels.py                   on the CPU: benchmarks/results/kernels_cpu.json
    python benchmarks/kernels.py --device cuda     on a device: benchmarks/results/kernels_cuda.json
    python benchmarks/kernels.py --quick           small sizes, nothing written

On a device it needs numpy, torch and CuPy alone. The cases and the targets are in kernels_gather.py,
kernels_gather_cpu.py and kernels_sample.py; the exit code is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from machine import describe_device, versions

RESULTS = Path(__file__).parent / "results"
QUIET_LOAD = 0.5  # more running than this, before the benchmark begins, marks its result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    result: dict[str, Any] = {
        "machine": describe_device(arguments.device),
        "versions": versions(("ats-stream", "numpy", "numba", "torch", "cupy-cuda12x", "cupy-cuda13x")),
        "load_before": round(load, 2),
        "machine_was_quiet": load < QUIET_LOAD,
    }
    if arguments.device == "cpu":
        import kernels_gather_cpu

        result["gather"] = kernels_gather_cpu.measure(quick=arguments.quick)
    else:
        import kernels_gather
        import kernels_sample

        torch.cuda.init()
        bytes_per_s = kernels_gather.copy_rate()
        result["copy_gb_per_s"] = round(bytes_per_s / 1e9)
        result["gather"] = kernels_gather.measure(bytes_per_s=bytes_per_s, quick=arguments.quick)
        result["sample"] = kernels_sample.measure(
            *((4, 100_000) if arguments.quick else ()), bytes_per_s=bytes_per_s
        )
    print_table(result)
    if not arguments.quick:
        out = arguments.out or RESULTS / f"kernels_{arguments.device}.json"
        out.write_text(json.dumps(result, indent=1) + "\n")
    missed = [case["case"] for case in result["gather"] if not case["targets_met"]]
    if not result.get("sample", {}).get("targets_met", True):
        missed.append(result["sample"]["case"])
    for case in missed:
        print(f"target missed: {case}")
    return int(bool(missed) and not arguments.quick)


def print_table(result: dict[str, Any]) -> None:
    cases = [*result["gather"], *([result["sample"]] if "sample" in result else [])]
    for case in cases:
        print(case["case"])
        floor = case["ms"]["floor"]
        for name, milliseconds in case["ms"].items():
            print(f"  {name:24} {milliseconds:10.3f} ms   {milliseconds / floor:8.2f} x floor")
        for name, value in case.items():
            if name not in ("case", "ms"):
                print(f"  {name}: {value}")


if __name__ == "__main__":
    sys.exit(main())
