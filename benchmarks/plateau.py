"""What gets attention off its plateau sooner: one change at a time on a small Megapixel MNIST.

    python benchmarks/plateau.py                  # every variant, two seeds, two processes side by side
    python benchmarks/plateau.py --only centred balanced --seeds 0 1 2

The task is Megapixel MNIST on 500 x 500 with 3 noise patches, 1,000 training images, N = 8 patches of 32 px,
networks of half the width, batch 32: small enough for many runs, with a plateau of hundreds of steps. A run
has left the plateau when it gets a fifth of 1,000 test images right (chance is a tenth) and is stopped then,
or after --epochs. Results go to benchmarks/results/plateau.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from machine import describe_machine
from megapixel_data import DataConfig, load_digits, make_dataset
from megapixel_mnist import Run, Schedule, evaluate, train_epoch
from megapixel_model import BIASED_ORIGINAL, MegapixelModel, Method

from ats_stream.files import write_atomic
from ats_stream.workers.allocator import keep_freed_memory

RESULTS = Path(__file__).parent / "results" / "plateau.json"
LEFT = 0.2
PLAIN = Run(
    setting="small",
    data=DataConfig(side_px=500, scale=0.12, num_noise=3),
    method=Method(num_patches=8, patch_px=32),
    feature_width=16,
    num_train=1000,
    num_test=1000,
    batch_size=32,
)


def variant(**changes: object) -> Run:
    """The plain run with another method."""
    return replace(PLAIN, method=replace(PLAIN.method, **changes))


def schedule(what: str, start: float, end: float, num_epochs: int) -> Run:
    """The plain run with a number that moves."""
    return replace(PLAIN, schedules=(Schedule(what, start, end, num_epochs),))


VARIANTS = {
    "plain (murthy)": PLAIN,
    "des_raj": variant(scheme="des_raj"),
    "with_replacement": variant(scheme="with_replacement"),
    "biased_original": variant(scheme=BIASED_ORIGINAL),
    "balanced": variant(scheme="balanced"),
    "centred": variant(centred=True),
    "temperature 1/4": variant(temperature=0.25),
    "temperature from 1/4 to 1": schedule("temperature", 0.25, 1.0, 20),
    "entropy weight from 1e-1 to 1e-4": schedule("entropy_weight", 1e-1, 1e-4, 20),
    "entropy weight from -1e-2 to 1e-4": schedule("entropy_weight", -1e-2, 1e-4, 20),
    "16 patches": variant(num_patches=16),
    "from 32 patches to 8": schedule("num_patches", 32, 8, 20),
    "batch of 8": replace(PLAIN, batch_size=8),
    "prior: ink": variant(prior="ink"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the result goes (%(default)s)")
    arguments = parser.parse_args()
    stored = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else {}
    jobs = [
        (f"{name}, seed {seed}", replace(VARIANTS[name], seed=seed, num_epochs=arguments.epochs))
        for seed in arguments.seeds
        for name in arguments.only
    ]
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(leave_plateau, run): (key, run) for key, run in jobs}
        for done in as_completed(pending):
            key, run = pending[done]
            stored[key] = {"run": asdict(run), **done.result()}
            print(summary(key, stored[key]), flush=True)
            result = {"machine": describe_machine(), "left_at": LEFT, "runs": stored}
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(arguments.out, (json.dumps(result, indent=1) + "\n").encode())


def leave_plateau(run: Run) -> dict[str, object]:
    """Train until the plateau is left: the epoch (None if it was not), CPU seconds and the curve."""
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(run.seed)
    training = make_dataset(load_digits(train=True), run.data, run.num_train)
    testing = make_dataset(load_digits(train=False), replace(run.data, seed=run.data.seed + 1), run.num_test)
    model = MegapixelModel(width=run.feature_width)
    optimizer = torch.optim.Adam(model.parameters(), lr=run.lr)
    curve: list[dict[str, float]] = []
    cpu = time.process_time()
    for epoch in range(run.num_epochs):
        point = {
            **train_epoch(model, optimizer, training, run, epoch),
            **evaluate(model, testing, run, epoch + 1),
        }
        curve.append({name: round(value, 4) for name, value in point.items()})
        if point["test_accuracy"] >= LEFT:
            break
    left = curve[-1]["test_accuracy"] >= LEFT
    return {
        "epochs_to_leave": len(curve) if left else None,
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "curve": curve,
    }


def summary(key: str, result: dict[str, object]) -> str:
    epochs = result["epochs_to_leave"]
    when = f"left after {epochs} epochs" if epochs else "not left"
    last = result["curve"][-1]  # type: ignore[index]
    return f"{key:45} {when:24} {result['cpu_seconds']:7} s CPU  accuracy {last['test_accuracy']:.3f}"


if __name__ == "__main__":
    main()
