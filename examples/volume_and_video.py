"""Three axes: attention over a volume (z, y, x) and over a video (t, y, x), read lazily.

    python examples/volume_and_video.py [--volume stack.tif] [--video film.mp4]

Nothing changes but the convolutions: the view has three axes of space, so have the attention map and the
patches. First a network learns on made volumes to find a bead and say whether it is hollow, which only
full resolution shows; about 150 steps teach it that, and all 200 take a few minutes on two cores. Then the
same kind of model looks at a file; of it only the view and the drawn patches are read. Time may be an axis
like any other. Without files a volume and a video are made.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ats_stream.io import open_pyramid
from ats_stream.models import SampledClassifier
from ats_stream.sampling import attention_sampling, multinomial_entropy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ats_stream.io import Pyramid

SIDE, SCALE, BEAD = 32, 4, 10


def main(argv: Sequence[str] | None = None) -> float:
    """Train on volumes, look at a volume and a video; returns the accuracy of the last steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--volume", type=Path, help="a stack (z, y, x): OME-TIFF, ImageJ TIFF, OME-Zarr")
    parser.add_argument("--video", type=Path, help="a video (t, y, x); needs the extra 'video'")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--small", action="store_true", help="few steps, for a quick look")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)

    accuracy = train(model_of(1, (BEAD + 2,) * 3), 3 if arguments.small else arguments.steps)
    volume = arguments.volume or beads(1, np.random.default_rng(1))[0][0].numpy()
    look("volume", open_pyramid(volume), patch=(8, 32, 32) if arguments.volume else (12, 12, 12))
    film = arguments.video or open_made_video()
    look("video", open_pyramid(film) if arguments.video else film, patch=(8, 32, 32))
    return accuracy


def model_of(num_channels: int, patch: tuple[int, int, int]) -> SampledClassifier:
    """Attention and feature network of three axes, and a head of two classes."""
    attention = nn.Sequential(
        nn.Conv3d(num_channels, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 1, 3, padding=1)
    )
    feature = nn.Sequential(
        nn.Conv3d(num_channels, 16, 3, padding=1), nn.ReLU(),
        nn.Conv3d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool3d(1), nn.Flatten(),
    )  # fmt: skip
    sampling = attention_sampling(
        attention, feature, patch, n_patches=8, use_logits=True,
        attention_regularizer=multinomial_entropy(1e-3),
    )  # fmt: skip
    return SampledClassifier(sampling, num_features=16, num_classes=2)


def beads(count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Volumes (B, 1, z, y, x) with one bead each, full or hollow, of the same mean, and which."""
    volumes = rng.normal(0, 0.05, (count, 1, SIDE, SIDE, SIDE)).astype(np.float32)
    hollow_B = rng.integers(0, 2, count)
    offset = np.arange(BEAD) - (BEAD - 1) / 2
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(offset, offset, offset)))
    shapes = [radius <= BEAD / 2, (radius <= BEAD / 2) & (radius > BEAD / 4)]
    for volume, hollow in zip(volumes[:, 0], hollow_B, strict=True):
        z, y, x = rng.integers(0, SIDE - BEAD, 3)
        shape = shapes[hollow] * np.float32(shapes[0].sum() / shapes[hollow].sum())
        volume[z : z + BEAD, y : y + BEAD, x : x + BEAD] += shape
    return torch.from_numpy(volumes), torch.from_numpy(hollow_B)


def train(model: SampledClassifier, num_steps: int) -> float:
    """Steps of 16 volumes, made as they are needed."""
    rng = np.random.default_rng(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    right = []
    for step in range(num_steps):
        volumes, hollow_B = beads(16, rng)
        logits, attention, _ = model(F.avg_pool3d(volumes, SCALE), volumes)
        loss = F.cross_entropy(logits, hollow_B) + model.sampling.regularization
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append(float((logits.argmax(dim=1) == hollow_B).float().mean()))
        if (step + 1) % 30 == 0 or step + 1 == num_steps:
            peak = float(attention.detach().flatten(1).amax(dim=1).mean())
            print(f"step {step + 1}: accuracy {np.mean(right[-30:]):.2f}, largest attention {peak:.3f}")
    return float(np.mean(right[-30:]))


@torch.no_grad()
def look(name: str, image: Pyramid, patch: tuple[int, int, int]) -> None:
    """Draw patches of a file with networks that have learned nothing, to show what is read and where."""
    level = image.levels[-1]
    pixels = torch.from_numpy(image.read(level).astype(np.float32))[None]
    if len(image.levels) == 1:  # the file has no smaller level: make a view
        pixels = F.avg_pool3d(pixels, SCALE, ceil_mode=True)
    model = model_of(pixels.shape[1], patch).eval()
    _, attention, patches = model(pixels, [image])
    shape = image.levels[0].shape
    share = patches[0].numel() / np.prod(shape)
    print(f"{name}: axes {''.join(image.axes)}, shape {shape}, attention {tuple(attention.shape[1:])}")
    print(f"  {patches.shape[1]} patches of {patches.shape[3:]} drawn, {share:.2%} of the pixels")


def open_made_video() -> Pyramid:
    """A spot that moves, (c, t, y, x) uint8."""
    frames = np.zeros((1, 32, 96, 128), dtype=np.uint8)
    for t in range(32):
        frames[0, t, 20 + t : 30 + t, 3 * t : 3 * t + 12] = 255
    return open_pyramid(frames, axes=("c", "t", "y", "x"))


if __name__ == "__main__":
    main()
