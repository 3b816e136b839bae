"""The modules on opened pyramids: the same numbers as on the images as tensors.

Shapes: B images, C channels, F features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ats_stream.errors import InputError
from ats_stream.io import ConvertConfig, open_pyramid, write_pyramid
from ats_stream.sampling import (
    AttentionSampling,
    Compose,
    RandomFlip,
    RandomIntensity,
    RandomPan,
    RandomQuarterTurn,
    attention_sampling,
)

if TYPE_CHECKING:
    from pathlib import Path

    from ats_stream.io import Pyramid


class Means(nn.Module):
    """Feature of a patch: its mean per channel."""

    def forward(self, patches: Tensor) -> Tensor:
        return patches.flatten(2).mean(dim=2)


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def on_disk(images_BCYX: np.ndarray, folder: Path) -> list[Pyramid]:
    config = ConvertConfig(chunk_px=64, shard_px=128, coarsest_px=64, tissue=False)
    for row, image in enumerate(images_BCYX):
        write_pyramid(image, folder / f"{row}.zarr", config)
    return [open_pyramid(folder / f"{row}.zarr") for row in range(len(images_BCYX))]


def model_of(num_channels: int, num_axes: int, patch_px: int) -> AttentionSampling:
    torch.manual_seed(0)
    attention = {2: nn.Conv2d, 3: nn.Conv3d}[num_axes](num_channels, 1, 3, padding=1)
    return attention_sampling(
        attention, Means(), patch_px, n_patches=4, use_logits=True, inference="average", num_draws=3
    ).eval()


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_pyramid_on_disk_is_read_as_the_tensor_is_cut(tmp_path: Path) -> None:
    images_BCYX = pixels(2, 3, 200, 152)
    sources = on_disk(images_BCYX, tmp_path)
    coarse = [source.levels[-1] for source in sources]
    assert coarse[0].shape == (3, 50, 38)
    views = [source.read(len(source.levels) - 1, (0, 0, 0), (3, 50, 38)) for source in sources]
    x_low = torch.from_numpy(np.stack(views)).float() / 255
    x_high = torch.from_numpy(images_BCYX)
    model = model_of(3, 2, 33)
    assert same(model(x_low, x_high), model(x_low, sources))
    augmentation = Compose(
        RandomFlip(), RandomPan(9, fill=200), RandomQuarterTurn(), RandomIntensity(p=1.0), seed=2
    )
    for _ in range(3):
        dense = augmentation(x_low, x_high)
        augmentation.step -= 1
        lazy = augmentation(x_low, sources)
        assert not torch.equal(dense[0], x_low)
        assert same(model(*dense), model(*lazy))
    with pytest.raises(
        InputError, match=r"patch of \(200, 200\) pixels is larger than the image, \(200, 152\)"
    ):
        model_of(3, 2, 200)(x_low, sources)


def test_a_volume_is_read_as_the_tensor_is_cut() -> None:
    images_BCZYX = pixels(2, 1, 24, 40, 32)
    sources = [open_pyramid(image) for image in images_BCZYX]
    x_high = torch.from_numpy(images_BCZYX)
    x_low = nn.functional.avg_pool3d(x_high.float(), 4) / 255
    model = model_of(1, 3, 9)
    assert same(model(x_low, x_high), model(x_low, sources))
    augmentation = Compose(RandomFlip((0,)), RandomPan((1, 0, 2)), RandomQuarterTurn((1, 2)), seed=2)
    dense = augmentation(x_low, x_high)
    augmentation.step -= 1
    assert same(model(*dense), model(*augmentation(x_low, sources)))
