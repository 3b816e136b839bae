"""A step of training on a device against the same on the CPU, over images and lazy pyramids in memory.

Stated tolerances: positions drawn from equal logits and patches are equal; weights, attention logits,
features, the loss and its gradients agree to 1e-4 of their largest value (float32 without TF32; sums run in
another order on a device)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ats_stream.sampling import (
    attention_sampling,
    cut_patches,
    draw,
    expectation,
    log_attention,
    patch_offsets,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

DEVICE = torch.device("cuda", 0)
TOLERANCE = 1e-4
NUM_IMAGES, NUM_PATCHES, PATCH = 4, 8, 32


def networks() -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(0)
    attention = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1))
    feature = nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 24)
    )
    return attention, feature, nn.Linear(24, 5)


def images() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    high = torch.randint(0, 256, (NUM_IMAGES, 3, 256, 320), dtype=torch.uint8, generator=generator)
    low = F.avg_pool2d(high.float(), 8) / 255
    return low, high, torch.randint(0, 5, (NUM_IMAGES,), generator=generator)


def assert_near(got: Tensor, expected: Tensor, name: str) -> None:
    difference = (got.detach().cpu() - expected.detach()).abs().max()
    assert difference <= TOLERANCE * expected.detach().abs().max(), (name, float(difference))


def exact_arithmetic() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


class InMemory:
    """A pyramid of which only patches are read, on the host: what sampling asks of any source."""

    def __init__(self, image: Tensor) -> None:
        self._image = image.numpy()
        self.levels = (SimpleNamespace(shape=self._image.shape, dtype=self._image.dtype),)

    def read_patches(self, level: int, offsets: Any, size: Sequence[int], *, fill: Any = 0) -> Any:
        """Patches (N, C, *size), of the image padded by a patch on every side."""
        assert level == 0
        rim = [(0, 0), *((side, side) for side in size)]
        padded = np.pad(self._image, rim, constant_values=fill)
        return np.stack([
            padded[:, y + size[0] : y + 2 * size[0], x + size[1] : x + 2 * size[1]] for y, x in offsets
        ])  # fmt: skip


def step(device: torch.device, logits_BM: Tensor, *, is_lazy: bool = False) -> dict[str, Tensor]:
    """One step that draws from given logits, so that both devices draw from the same bits."""
    attention, feature, head = (net.to(device) for net in networks())
    low, high, label_B = (tensor.to(device) for tensor in images())
    source = [InMemory(image) for image in high.cpu()] if is_lazy else high
    own_logits_BM = attention(low).flatten(1)
    log_a_BM = log_attention(own_logits_BM)
    map_shape = tuple(low.shape[2:])
    drawn = draw(log_attention(logits_BM).to(device), NUM_PATCHES, seed=7, map_shape=map_shape)
    offsets_BND = patch_offsets(drawn.index, map_shape, tuple(high.shape[2:]), (PATCH, PATCH))
    patches = cut_patches(source, offsets_BND, (PATCH, PATCH), dtype=torch.float32)
    features_BNF = feature(patches.flatten(0, 1) / 255).view(NUM_IMAGES, NUM_PATCHES, -1)
    attention_BN = log_a_BM.gather(1, drawn.index).exp()
    loss = F.cross_entropy(head(expectation(features_BNF, attention_BN, drawn.weight)), label_B)
    loss.backward()
    gradients = [p.grad for net in (attention, feature, head) for p in net.parameters() if p.grad is not None]
    return {
        "index": drawn.index,
        "weight": drawn.weight,
        "patches": patches,
        "logits": own_logits_BM,
        "features": features_BNF,
        "loss": loss,
        **{f"gradient {number}": gradient for number, gradient in enumerate(gradients)},
    }


def test_a_step_equals_the_cpus() -> None:
    exact_arithmetic()
    with torch.no_grad():
        logits_BM = networks()[0](images()[0]).flatten(1)
    wanted = step(torch.device("cpu"), logits_BM)
    for is_lazy in (False, True):
        got = step(DEVICE, logits_BM, is_lazy=is_lazy)
        assert wanted.keys() == got.keys()
        for name, expected in wanted.items():
            assert got[name].device == DEVICE, name
            if name in ("index", "patches"):
                assert torch.equal(got[name].cpu(), expected), name
            else:
                assert_near(got[name], expected, name)


def test_the_module_trains_on_the_device() -> None:
    exact_arithmetic()
    attention, feature, head = networks()
    module = attention_sampling(attention, feature, PATCH, NUM_PATCHES, use_logits=True, seed=3).to(DEVICE)
    head = head.to(DEVICE)
    low, high, label_B = (tensor.to(DEVICE) for tensor in images())
    optimiser = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=1e-3)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        features, _, patches = module(low, high)
        assert patches.dtype == torch.float32
        loss = F.cross_entropy(head(features), label_B)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < sum(losses[:5])
