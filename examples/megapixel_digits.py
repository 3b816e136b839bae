"""Megapixel MNIST, the task of the paper, in a training loop of your own.

    python examples/megapixel_digits.py        (the images need scipy)

A canvas of 500 x 500 pixels holds five handwritten digits; three of them show the class. The model sees a
view of a fifth of the side and 10 patches of 50 pixels. Images are those of the benchmark
(benchmarks/megapixel_data.py), networks are the paper's. For some epochs accuracy stays at chance (0.1);
benchmarks/megapixel_mnist.py trains to the end, compares estimators and keeps the curves.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from ats_stream.demo.assets import fetch_digits
from ats_stream.models import mnist_classifier

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from megapixel_data import DataConfig, make_dataset

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> float:
    """Train; returns the share of the drawn attention, which grows as the model learns where to look."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--digits", type=Path, help="MNIST files of your own; by default some are fetched")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--small", action="store_true", help="48 small images and one epoch, for a quick look"
    )
    arguments = parser.parse_args(argv)
    config = DataConfig(side_px=200 if arguments.small else 500, scale=0.2, num_noise=0)
    num_images, epochs = (48, 1) if arguments.small else (2000, arguments.epochs)

    torch.manual_seed(0)
    images, labels = fetch_digits(local=arguments.digits)
    data = make_dataset((images[:5000], labels[:5000].astype("int64")), config, num_images)
    model = mnist_classifier(n_patches=10, scheme="murthy")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    mass = 0.0
    for epoch in range(epochs):
        num_right, masses = 0, []
        for image_B in torch.randperm(len(data)).split(24):
            view, canvas = data.paint(image_B)  # uint8; the networks take floating point
            logits, attention, patches = model(view.float() / 255, canvas.float() / 255)
            loss = F.cross_entropy(logits, data.label_I[image_B]) + model.sampling.regularization
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            num_right += int((logits.argmax(dim=1) == data.label_I[image_B]).sum())
            masses.append(
                float(attention.detach().flatten(1).topk(patches.shape[1]).values.sum(dim=1).mean())
            )
        mass = sum(masses) / len(masses)
        print(
            f"epoch {epoch + 1}: accuracy {num_right / len(data):.3f}, mass of the 10 best cells {mass:.3f}"
        )
    pixels = patches.shape[1] * patches.shape[-1] * patches.shape[-2]
    print(f"of {config.side_px**2} pixels of an image the model saw {pixels} at full resolution")
    return mass


if __name__ == "__main__":
    main()
