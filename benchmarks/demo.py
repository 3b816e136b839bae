"""The demo over several seeds: accuracy of model and controls, time, memory, bytes read.

    .venv/bin/python benchmarks/demo.py --seeds 0 1 2

Each run is `ats-stream demo` in a process of its own, as `make demo` starts it. Results go to
benchmarks/results/demo.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "demo.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the result goes (%(default)s)")
    arguments = parser.parse_args()
    runs = [run_demo(seed) for seed in arguments.seeds]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": describe_machine(), "runs": runs}, indent=2) + "\n")
    print(f"stored in {arguments.out}")


def run_demo(seed: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "ats_stream.cli",
            "demo",
            "--seed",
            str(seed),
            "--out",
            f"{folder}/out",
        ]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    del result["report"]  # it went with the temporary folder
    print({"seed": seed, **result}, flush=True)
    return {"seed": seed, **result}


if __name__ == "__main__":
    main()
