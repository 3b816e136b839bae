"""Attention sampling in a LightningModule.

    pip install pytorch-lightning
    python examples/lightning_module.py

``attention_sampling(...)`` is an nn.Module like any other. Two things to remember: its ``regularization``
belongs to the loss, and its draws are keyed by a step counter that lives in the state_dict, so
checkpoints of Lightning carry it. In evaluation draws repeat themselves. Under DistributedDataParallel
each rank draws for itself.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ats_stream.sampling import attention_sampling, multinomial_entropy

if TYPE_CHECKING:
    from collections.abc import Sequence

SIDE, SCALE, PATCH = 128, 8, 24


class FindTheSquare(lightning.LightningModule):
    """Is the small square striped along or across? The view shows where it is, a patch what it is."""

    def __init__(self) -> None:
        super().__init__()
        attention = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1))
        feature = nn.Sequential(nn.Conv2d(1, 16, 5), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.sampling = attention_sampling(
            attention, feature, PATCH, n_patches=4, use_logits=True,
            attention_regularizer=multinomial_entropy(1e-3),
        )  # fmt: skip
        self.head = nn.Linear(16, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits of images (B, 1, y, x)."""
        features, self.attention, self.patches = self.sampling(F.avg_pool2d(images, SCALE), images)
        return self.head(features)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The loss of a batch, the regulariser in it."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels) + self.sampling.regularization
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """Accuracy, and how much of the attention lies on what was drawn from."""
        images, labels = batch
        self.log("accuracy", (self(images).argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Fit; returns what was logged last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="one epoch of few images, for a quick look")
    arguments = parser.parse_args(argv)
    lightning.seed_everything(0, verbose=False)
    training = squares(32 if arguments.small else 512, seed=0)
    validation = squares(16 if arguments.small else 128, seed=1)
    trainer = lightning.Trainer(
        max_epochs=1 if arguments.small else arguments.epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = FindTheSquare()
    trainer.fit(
        model, DataLoader(training, batch_size=16, shuffle=True), DataLoader(validation, batch_size=16)
    )
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    print(f"after {trainer.global_step} steps: {logged}")
    print(f"attention {tuple(model.attention.shape)}, patches {tuple(model.patches.shape)}")
    return logged


def squares(count: int, seed: int) -> TensorDataset:
    """Images (1, y, x) with a striped square on noise, and the direction of the stripes."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.1 * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    labels = torch.randint(0, 2, (count,), generator=generator)
    stripes = (torch.arange(16) // 2 % 2).float()
    for image, across in zip(images[:, 0], labels.tolist(), strict=True):
        y, x = (int(one) for one in torch.randint(0, SIDE - 16, (2,), generator=generator))
        image[y : y + 16, x : x + 16] += stripes[:, None] if across else stripes[None, :]
    return TensorDataset(images, labels)


if __name__ == "__main__":
    main()
