"""The control that sees the low-resolution view alone: what can be told without full resolution?

It has the feature network and the head of the main model, and looks at the view as if it were one patch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ats_stream.io import open_pyramid
from ats_stream.models import FeatureNet, ModelConfig
from ats_stream.workers.plan import Plan
from ats_stream.workers.sampler import view_level

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ats_stream.io import ArchiveRow
    from ats_stream.workers import TrainerConfig


class ViewClassifier(nn.Module):
    """Views (B, C, Y, X) -> class logits (B, K), with the feature network and the head of the main model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.features = FeatureNet(config)
        self.head = nn.Linear(self.features.num_features, config.num_classes)

    def forward(self, views_BCYX: Tensor) -> Tensor:
        """Class logits."""
        logits: Tensor = self.head(self.features(views_BCYX))
        return logits


def low_resolution_accuracy(
    train_rows: Sequence[ArchiveRow],
    test_rows: Sequence[ArchiveRow],
    classes: Sequence[str],
    model: ModelConfig,
    trainer: TrainerConfig,
    view_downsample: float,
    *,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> float:
    """Train on the views of ``train_rows`` as the main model is; accuracy on those of ``test_rows``."""
    views_BCYX, label_B = _load(train_rows, classes, view_downsample)
    torch.manual_seed(trainer.seed)
    network = ViewClassifier(model)
    optimiser = torch.optim.AdamW(network.parameters(), lr=trainer.lr, weight_decay=trainer.weight_decay)
    plan = Plan(
        images=tuple(range(len(train_rows))),
        batch_size=trainer.batch_size,
        num_epochs=trainer.num_epochs,
        seed=trainer.seed,
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, total_iters=plan.num_steps)
    for step in range(plan.num_steps):
        rows = torch.tensor([visit.image for visit in plan.visits(step) if visit.share > 0])
        loss = F.cross_entropy(network(views_BCYX[rows]), label_B[rows])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch types it partly
        nn.utils.clip_grad_norm_(network.parameters(), trainer.clip_norm)
        optimiser.step()
        schedule.step()
        progress(step + 1, plan.num_steps)
    views_BCYX, label_B = _load(test_rows, classes, view_downsample)
    with torch.inference_mode():
        starts = range(0, len(views_BCYX), trainer.batch_size)
        parts = [network(views_BCYX[i : i + trainer.batch_size]).argmax(1) for i in starts]
    return float((torch.cat(parts) == label_B).float().mean())


def _load(
    rows: Sequence[ArchiveRow], classes: Sequence[str], view_downsample: float
) -> tuple[Tensor, Tensor]:
    views = []
    for row in rows:
        pyramid = open_pyramid(row.slide)
        views.append(pyramid.read(view_level(pyramid, view_downsample)))
    labels = [list(classes).index(row.label) for row in rows]
    return torch.from_numpy(np.stack(views)), torch.tensor(labels)
