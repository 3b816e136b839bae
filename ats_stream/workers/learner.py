"""What learns in a rank: the model, its optimiser, and what surrounds it. One call is one optimiser step.

Shapes: R rows of the archive table, B images of this rank's part of a step, K outputs, T target values.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ats_stream.models import PatchClassifier
from ats_stream.workers.batch import BatchFeeder, effective_share
from ats_stream.workers.optimisation import autocast, average_of, lr_factor
from ats_stream.workers.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from ats_stream.models import Prediction
    from ats_stream.workers.config import RunConfig
    from ats_stream.workers.protocol import Item
    from ats_stream.workers.ranks import Ranks


class Learner:
    """A model under training; ``target_RT`` and ``weight_R`` are the targets and loss weights of all rows."""

    def __init__(
        self, config: RunConfig, ranks: Ranks, *, num_steps: int, target_RT: Tensor, weight_R: Tensor
    ) -> None:
        trainer = config.trainer
        self.config, self.ranks, self.task = trainer, ranks, TASKS[trainer.task]
        self._target_RT, self._weight_R = target_RT.to(ranks.device), weight_R.to(ranks.device)
        torch.manual_seed(trainer.seed)
        self.model = PatchClassifier(config.model).to(ranks.device)
        if self.task.ignores_shift:
            # nothing but rounding would move it, and the optimiser would make whole steps of that
            nn.init.zeros_(self.model.head.bias.requires_grad_(False))
        self._wrapped = ranks.wrap(self.model)
        self._optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=trainer.lr, weight_decay=trainer.weight_decay
        )
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(
            self._optimiser,
            lambda step: lr_factor(
                step,
                num_steps,
                schedule=trainer.schedule,
                warmup_share=trainer.warmup_share,
                decay_share=trainer.decay_share,
            ),
        )
        # without mixed precision in float16 it does nothing at all
        self._scaler = torch.amp.GradScaler(ranks.device.type, enabled=trainer.precision == "float16")
        self._average = average_of(self.model, trainer.average_decay)
        self.batches = BatchFeeder(ranks.device)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self._scheduler.get_last_lr()[0])

    @property
    def best_guess(self) -> PatchClassifier:
        """The model to be judged and used: the average of the weights if there is one."""
        if self._average is None:
            return self.model
        averaged: PatchClassifier = self._average.module  # type: ignore[assignment]  # torch says Module
        return averaged

    def state(self) -> dict[str, Any]:
        """All that moves."""
        average = self._average
        return {
            "model": self.model.state_dict(),
            "average": {} if average is None else average.module.state_dict(),
            "optimiser": {
                "optimiser": self._optimiser.state_dict(),
                "scheduler": self._scheduler.state_dict(),
                "scaler": self._scaler.state_dict(),
                "num_averaged": 0 if average is None else int(average.n_averaged),
            },
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a state; KeyError, RuntimeError, TypeError or ValueError for one that does not fit."""
        self.model.load_state_dict(state["model"])
        around = state["optimiser"]
        self._optimiser.load_state_dict(around["optimiser"])
        self._scheduler.load_state_dict(around["scheduler"])
        self._scaler.load_state_dict(around["scaler"])
        if self._average is not None:
            self._average.module.load_state_dict(state["average"])
            self._average.n_averaged.fill_(around["num_averaged"])

    def stage(self, items: Sequence[Item]) -> None:
        """Begin to copy the items of the next step to the device."""
        for part in self._parts(items):
            self.batches.stage(part)

    def step(
        self,
        items: Sequence[Item],
        *,
        num_images: int | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """One optimiser step; sums over the images that the metrics are made of.

        ``num_images`` are those, over all ranks, that the loss is the mean of (default: as the items' shares
        say); with none the gradient is 0. ``meanwhile`` is called while the device is at work on the step.
        """
        self.model.train()
        self._optimiser.zero_grad()
        parts = self._parts(items)
        sums: dict[str, float] = {}
        for number, part in enumerate(parts):
            # gradients travel between the ranks once, with the last part
            is_last = number == len(parts) - 1
            with nullcontext() if is_last else self._unsynchronised():
                for name, value in self._backward(part, num_images, meanwhile if is_last else None).items():
                    sums[name] = sums.get(name, 0.0) + value
        self._scaler.unscale_(self._optimiser)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        self._scheduler.step()
        if self._average is not None:
            self._average.update_parameters(self.model)
        return sums

    def _parts(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        size = -(-len(items) // self.config.accumulate)
        return [items[at : at + size] for at in range(0, len(items), size)]

    def _unsynchronised(self) -> Any:
        wrapped: Any = self._wrapped
        return wrapped.no_sync() if hasattr(wrapped, "no_sync") else nullcontext()

    def _backward(
        self, items: Sequence[Item], num_images: int | None, meanwhile: Callable[[], None] | None
    ) -> dict[str, float]:
        device = self.ranks.device
        with autocast(device, self.config.precision):
            prediction = self._wrapped(self.batches.take(items))
        row_B = torch.tensor([item.visit.image for item in items], device=device)
        share_B = torch.tensor(_shares(items, num_images), device=device)
        loss, loss_B = self._loss(prediction.class_logits_BK, row_B, share_B)
        loss = loss - self.config.entropy_weight * (share_B * prediction.entropy_B).sum()
        # shares sum to 1 over all ranks, and the wrapper averages gradients over the ranks
        self._scaler.scale(loss * self.ranks.world_size).backward()
        if meanwhile is not None:
            meanwhile()  # before anything waits for the device
        return _sums(items, prediction, loss_B, (share_B > 0).cpu(), self._right(prediction, row_B))

    def _loss(self, outputs_BK: Tensor, row_B: Tensor, share_B: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's part of the loss, whose sum over the ranks is minimised, and that of each image."""
        if not self.task.needs_whole_batch:
            loss_B = self.task.loss(outputs_BK, self._target_RT[row_B])
            return (share_B * self._weight_R[row_B] * loss_B).sum(), loss_B.detach()
        # every rank computes the whole, through which only its own outputs get gradients
        all_BK, all_row_B, all_share_B = (self.ranks.gather(v) for v in (outputs_BK, row_B, share_B))
        real_B = all_share_B > 0
        if not real_B.any():
            return 0 * outputs_BK.sum(), torch.zeros_like(share_B)
        weight_B = self._weight_R[all_row_B[real_B]]
        loss_B = torch.zeros_like(all_share_B)
        loss_B[real_B] = self.task.loss(all_BK[real_B], self._target_RT[all_row_B[real_B]])
        whole = (weight_B * loss_B[real_B]).sum() / weight_B.sum()
        begin = self.ranks.rank * len(row_B)
        return whole, loss_B[begin : begin + len(row_B)].detach()

    def _right(self, prediction: Prediction, row_B: Tensor) -> Tensor | None:
        if self.config.task != "classification":
            return None
        return (prediction.class_logits_BK.argmax(1) == self._target_RT[row_B, 0].long()).cpu()


def _shares(items: Sequence[Item], num_images: int | None) -> list[float]:
    """What each image counts in the loss, 0 for one that fills a batch or is bad."""
    if num_images is None:
        return [item.visit.share for item in items]
    return [1.0 / num_images if item.visit.share > 0 else 0.0 for item in items]


def _sums(
    items: Sequence[Item], prediction: Prediction, loss_B: Tensor, real_B: Tensor, right_B: Tensor | None
) -> dict[str, float]:
    kept = [item for item, keep in zip(items, real_B.tolist(), strict=True) if keep]
    steps_behind = sum(item.visit.step - item.visit.version for item in kept)
    sums = {
        "images": float(real_B.sum()),
        "loss": float((loss_B.cpu() * real_B).sum()),
        "entropy": float((prediction.entropy_B.detach().cpu() * real_B).sum()),
        "sampled_mass": float((prediction.attention_BN.detach().cpu().sum(1) * real_B).sum()),
        "effective_share": float((effective_share(items, prediction) * real_B).sum()),
        "staleness": float(steps_behind),
        "stored_bytes": float(sum(item.stored_bytes for item in kept)),
        "decoded_bytes": float(sum(item.decoded_bytes for item in kept)),
        "sampler_s": sum(item.seconds for item in kept),
    }
    return sums if right_B is None else {**sums, "accuracy": float((right_B & real_B).sum())}
