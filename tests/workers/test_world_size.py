"""The number of ranks may change wherever a run is saved: weights stay those of a run without a change."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
from thread_ranks import ThreadRank, make_ranks, side_by_side
from tiny import make_job, run_config

from ats_stream.errors import PreemptedError
from ats_stream.workers.checkpoint import find_checkpoint, load_checkpoint
from ats_stream.workers.executors import make_executor
from ats_stream.workers.ledger import check_ledger, read_ledger
from ats_stream.workers.trainer import RankTrainer, TrainJob

if TYPE_CHECKING:
    from pathlib import Path

    from ats_stream.io import Archive

NUM_STEPS = 20
TOLERANCE = 1e-6


class StopsAfter(ThreadRank):
    """A rank that all leave together at a step."""

    last_step = NUM_STEPS
    trainer: RankTrainer

    def must_stop(self) -> bool:
        return self.trainer.stream.step == self.last_step < NUM_STEPS


def train(job: TrainJob, world_size: int, last_step: int) -> None:
    """Go on with so many ranks up to a step."""
    ranks = make_ranks(world_size, StopsAfter)
    trainers = []
    for rank in ranks:  # one after the other: torch has one random state for all threads
        executor = make_executor("serial", job.slides, job.labels, job.config.model, job.config.sampler)
        trainer = RankTrainer(job, rank, executor)
        trainer.resume()
        assert isinstance(rank, StopsAfter)
        rank.trainer, rank.last_step = trainer, last_step
        trainers.append(trainer)
    trainers[0].keep_ledger()

    def work(rank: ThreadRank) -> None:
        if last_step == NUM_STEPS:
            trainers[rank.rank].run(None)
        else:
            with pytest.raises(PreemptedError):
                trainers[rank.rank].run(None)

    side_by_side(ranks, work)


def make(archive: Archive, run: Path, task: str) -> TrainJob:
    """A job of 20 steps, 2 an epoch, with checkpoints in between."""
    config = run_config(num_epochs=NUM_STEPS // 2, lag=2, checkpoint_interval=3, lr=1e-3, task=task)
    if task != "survival":
        return make_job(archive, run, config)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, num_classes=1), classes=("risk",)
    )
    times = [[1.0 + (7 * row) % 11, float(row % 3 > 0)] for row in range(len(archive.rows))]
    return dataclasses.replace(make_job(archive, run, config), targets=times)


def final(job: TrainJob) -> dict[str, Any]:
    return load_checkpoint(find_checkpoint(job.run_dir))


@pytest.mark.parametrize("task", ["classification", "survival"])
def test_weights_do_not_depend_on_how_many_ranks_took_which_steps(
    archive: Archive, tmp_path: Path, task: str
) -> None:
    whole = make(archive, tmp_path / "whole", task)
    train(whole, 2, NUM_STEPS)
    wanted = final(whole)
    for number, worlds in enumerate([[(2, 7), (1, NUM_STEPS)], [(1, 4), (4, 11), (1, NUM_STEPS)]]):
        job = make(archive, tmp_path / str(number), task)
        for world_size, last_step in worlds:
            train(job, world_size, last_step)
        found = final(job)
        assert found["step"] == wanted["step"] == NUM_STEPS
        for name, weight in wanted["model"].items():
            torch.testing.assert_close(found["model"][name], weight, rtol=0, atol=TOLERANCE, msg=name)
        assert check_ledger(job.plan, read_ledger(job.run_dir)) == ()
        sizes = {record.step: record.rank + 1 for record in read_ledger(job.run_dir)}
        begins = [0, *(last for _, last in worlds)]
        for (world_size, last_step), begin in zip(worlds, begins, strict=False):
            assert {sizes[step] for step in range(begin, last_step)} == {world_size}
    moved = [(final(whole)["model"][n] - w).abs().max() for n, w in initial(archive, tmp_path, task).items()]
    assert max(moved) > 1000 * TOLERANCE  # it did train


def initial(archive: Archive, folder: Path, task: str) -> dict[str, torch.Tensor]:
    """The weights before the first step."""
    job = make(archive, folder / "none", task)
    executor = make_executor("serial", job.slides, job.labels, job.config.model, job.config.sampler)
    state = RankTrainer(job, make_ranks(1)[0], executor).learner.model.state_dict()
    return {name: tensor.clone() for name, tensor in state.items()}
