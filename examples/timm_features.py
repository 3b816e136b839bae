"""A feature network of timm behind attention sampling.

    pip install "ats-stream[timm]"
    python examples/timm_features.py --model resnet18 [--weights resnet18.safetensors]

Any model of timm gives features of patches; weights come from a local file, nothing is downloaded here.
The attention network stays small, because it runs over the whole view. Images are made: textures in one
corner of a grey field, fine or coarse, which the view shows alike.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ats_stream.models import SampledClassifier, timm_feature
from ats_stream.sampling import attention_sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

SIDE, SCALE, PATCH = 256, 8, 64


def main(argv: Sequence[str] | None = None) -> float:
    """Train some steps; returns the last loss."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet18", help="a name of timm.list_models()")
    parser.add_argument("--weights", type=Path, help="a local file of weights")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--small", action="store_true", help="two steps, for a quick look")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)

    feature = timm_feature(arguments.model, patch_size=(PATCH, PATCH), path=arguments.weights)
    attention = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1))
    sampling = attention_sampling(attention, feature, n_patches=4, use_logits=True)  # its size: the feature's
    model = SampledClassifier(sampling, num_features=feature.num_features, num_classes=2)
    print(f"{arguments.model}: {feature.num_features} features of patches of {feature.patch_size} pixels")

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    generator = torch.Generator().manual_seed(0)
    for step in range(2 if arguments.small else arguments.steps):
        images, fine_B = textures(8, generator)
        logits, drawn_from, patches = model(F.avg_pool2d(images, SCALE), images)
        loss = F.cross_entropy(logits, fine_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {float(loss.detach()):.3f}")
    print(f"attention {tuple(drawn_from.shape)}, patches {tuple(patches.shape)}")
    return float(loss.detach())


def textures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (B, 3, y, x) in [0, 1], stripes of one or two pixels somewhere on grey, and which."""
    images = torch.full((count, 3, SIDE, SIDE), 0.5)
    fine_B = torch.randint(0, 2, (count,), generator=generator)
    for image, fine in zip(images, fine_B.tolist(), strict=True):
        y, x = (int(one) for one in torch.randint(0, SIDE - PATCH, (2,), generator=generator))
        stripes = (torch.arange(PATCH) // (1 if fine else 2)) % 2
        image[:, y : y + PATCH, x : x + PATCH] = 0.2 + 0.3 * stripes.float()
    return images, fine_B


if __name__ == "__main__":
    main()
