"""Images that cannot be read: left out of every number, the same with any executor and after a resume."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from thread_ranks import ThreadRank, make_ranks, side_by_side
from tiny import MODEL, SAMPLER, make_job, make_sampler, run_config, visit, weights, without_clock

from ats_stream.errors import BadImagesError, CheckpointError, SlideError
from ats_stream.workers import PatchSampler, TrainerConfig, ray_executor, train
from ats_stream.workers.batch import collate
from ats_stream.workers.checkpoint import find_checkpoint, load_checkpoint
from ats_stream.workers.executors import SerialExecutor, make_executor
from ats_stream.workers.learner import Learner
from ats_stream.workers.ledger import check_ledger, read_ledger
from ats_stream.workers.metrics import read_metrics
from ats_stream.workers.quarantine import BadImage, Quarantine, blank_item
from ats_stream.workers.ranks import Alone
from ats_stream.workers.trainer import RankTrainer, TrainJob, train_rank

if TYPE_CHECKING:
    from types import ModuleType

    from ats_stream.io import Archive
    from ats_stream.workers import AttentionWeights, Item, RunConfig, Visit
    from ats_stream.workers.executors import Executor
    from ats_stream.workers.sampler import View

REASON = "no such file or folder"
CONFIG = run_config(num_epochs=2, checkpoint_interval=1, on_bad_image="skip", max_bad_share=0.5, lag=1)


def without_slides(archive: Archive, folder: Path, rows: tuple[int, ...]) -> Archive:
    """The archive, of which the slides of some rows are gone."""
    return dataclasses.replace(
        archive,
        rows=tuple(
            dataclasses.replace(row, slide=str(folder / f"gone-{n}.ome.zarr")) if n in rows else row
            for n, row in enumerate(archive.rows)
        ),
    )


def blank(image: int, **sampler: Any) -> Item:
    return blank_item(
        visit(image),
        weights(),
        SlideError("x.svs", "torn"),
        slides=[f"{n}.svs" for n in range(12)],
        sampler=dataclasses.replace(SAMPLER, **sampler),
        num_channels=MODEL.num_channels,
    )


# --- the blank item


@pytest.mark.parametrize("scheme", ["with_replacement", "des_raj", "murthy", "balanced", "top"])
def test_a_blank_item_fits_any_batch_and_moves_no_gradient(archive: Archive, scheme: str) -> None:
    sampler = make_sampler(archive, scheme=scheme)
    good = [dataclasses.replace(sampler.sample(visit(n), weights()).visit, share=0.5) for n in (0, 1)]
    items = [dataclasses.replace(sampler.sample(v, weights()), visit=v) for v in good]
    one = blank(3, scheme=scheme)
    assert (one.bad, one.slide, one.visit.share, one.num_drawn) == ("torn", "3.svs", 0.0, 0)
    assert collate([*items, one]).crops_BNCPP.dtype == torch.uint8
    for task in ("classification", "survival"):
        without, gradient = sums_and_gradient(items, 2, task)
        sums, same = sums_and_gradient([items[0], one, items[1]], 2, task)
        assert sums == pytest.approx(without, rel=1e-5)
        torch.testing.assert_close(same, gradient, rtol=1e-4, atol=1e-6)


def learner(task: str, ranks: Any = None) -> Learner:
    config = run_config(entropy_weight=0.01, clip_norm=1e9, task=task)
    model = dataclasses.replace(config.model, num_classes=1 if task == "survival" else 2)
    target_RT = torch.tensor([[3.0, 1], [1, 1], [2, 0], [4, 1]] + [[1.0, 0]] * 8)
    return Learner(
        dataclasses.replace(config, model=model),
        ranks or Alone(),
        num_steps=10,
        target_RT=target_RT if task == "survival" else torch.arange(12.0)[:, None] % 2,
        weight_R=torch.linspace(0.5, 1.5, 12),
    )


def sums_and_gradient(
    items: list[Item], num_images: int | None, task: str
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    one = learner(task)
    sums = one.step(items, num_images=num_images)
    return sums, {n: p.grad for n, p in one.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("task", ["classification", "survival", "regression"])
def test_a_step_whose_images_are_all_bad_has_no_gradient(task: str) -> None:
    sums, gradient = sums_and_gradient([blank(0), blank(1)], 0, task)
    assert set(sums.values()) == {0.0}
    assert all(not g.any() for g in gradient.values())


@pytest.mark.parametrize("task", ["classification", "survival"])
@pytest.mark.parametrize("bad", [(1,), (0, 1), (2,), (1, 3), (0, 1, 2, 3)])
def test_two_ranks_take_the_step_of_one_whoever_has_the_bad_images(
    archive: Archive, task: str, bad: tuple[int, ...]
) -> None:
    sampler = make_sampler(archive)
    visits = [dataclasses.replace(visit(n), share=0.25) for n in range(4)]
    items = [blank(n) if n in bad else sampler.sample(visits[n], weights()) for n in range(4)]
    num_good = 4 - len(bad)
    _, wanted = sums_and_gradient([i for i in items if i.bad is None] or items, num_good, task)
    counts: dict[int, Any] = {}
    seeding = threading.Lock()  # torch has one random state for all threads
    found: dict[int, dict[str, torch.Tensor]] = {}

    def work(ranks: ThreadRank) -> None:
        mine = items[2 * ranks.rank : 2 * ranks.rank + 2]
        quarantine = Quarantine(ranks, num_images=4, max_share=1)
        counts[ranks.rank] = quarantine.count(mine), quarantine.state()
        with seeding:
            one = learner(task, ranks)
        one.step(mine, num_images=counts[ranks.rank][0])
        found[ranks.rank] = {n: p.grad for n, p in one.model.named_parameters() if p.grad is not None}

    side_by_side(make_ranks(2), work)
    assert (
        counts[0]
        == counts[1]
        == (num_good, [{"image": n, "slide": f"{n}.svs", "reason": "torn"} for n in bad])
    )
    for gradient in found.values():
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


# --- the cap


def test_too_many_bad_images_are_named_in_all_ranks() -> None:
    def work(ranks: ThreadRank) -> None:
        quarantine = Quarantine(ranks, num_images=40, max_share=0.05)
        told: list[BadImage] = []
        quarantine.on_new = told.append
        assert quarantine.count([blank(1 + ranks.rank), blank(1)]) == 0
        assert quarantine.count([blank(2), blank(1)]) == 0
        assert [one.image for one in told] == [1, 2]
        restored = Quarantine(ranks, num_images=40, max_share=0.05)
        restored.restore(quarantine.state())
        with pytest.raises(BadImagesError) as caught:
            restored.count([blank(3), blank(1)] if ranks.rank else [blank(1)])
        assert str(caught.value) == (
            "3 of 40 images cannot be read, more than 0.05 of them may: 1.svs: torn; 2.svs: torn; 3.svs: torn"
        )

    side_by_side(make_ranks(2), work)
    error = BadImagesError([f"{n}.svs: torn" for n in range(8)], 10, 0.5)
    assert str(error).endswith("4.svs: torn; and 3 more")


# --- runs


def state_of(run_dir: Path) -> dict[str, Any]:
    return load_checkpoint(find_checkpoint(run_dir))


def test_a_run_leaves_bad_images_out_and_tells_them_once(archive: Archive, tmp_path: Path) -> None:
    broken = without_slides(archive, tmp_path, (2, 8))
    assert [archive.rows[n].split for n in (2, 8)] == ["train", "val"]
    seen: list[Any] = []
    result = train(broken, tmp_path / "run", CONFIG, on_record=seen.append)
    assert [(one.image, one.slide, one.reason) for one in result.skipped] == [
        (n, str(tmp_path / f"gone-{n}.ome.zarr"), REASON) for n in (2, 8)
    ]
    assert seen == result.metrics == read_metrics(result.run_dir)
    assert [r["phase"] for r in seen if r["phase"] != "skipped"] == ["train", "val"] * 2
    assert [r["bad_visits"] for r in seen if r["phase"] == "train"] == [
        1 + (2 in fill) for fill in filled(broken)
    ]
    assert all(np.isfinite(v) for r in seen for v in r.values() if isinstance(v, float))
    records = list(read_ledger(result.run_dir))
    plan = make_job(broken, tmp_path, CONFIG).plan
    assert check_ledger(plan, records) == ()
    bad = [(r.phase, r.image) for r in records if r.bad]
    assert bad.count(("val", 8)) == 2
    assert {r.bad for r in records if r.image in (2, 8)} == {REASON}
    assert {r.image for r in records if r.bad} == {2, 8}


def filled(archive: Archive) -> list[list[int]]:
    """Images that fill up the last batch, by epoch."""
    plan = make_job(archive, Path(), CONFIG).plan
    steps = [plan.visits(step) for step in range(plan.num_steps)]
    per_epoch = [steps[:2], steps[2:]]
    return [[v.image for visits in epoch for v in visits if v.share == 0] for epoch in per_epoch]


def test_going_on_changes_no_bit_though_images_are_bad(archive: Archive, tmp_path: Path) -> None:
    broken = without_slides(archive, tmp_path, (0, 2))
    job = make_job(broken, tmp_path / "run", CONFIG)
    train_rank(job, Copier(tmp_path / "run", tmp_path / "copies"))
    wanted = state_of(tmp_path / "run")
    for step in (1, 2, 3):
        copy = tmp_path / "copies" / str(step)
        train_rank(dataclasses.replace(job, run_dir=str(copy)), Alone())
        state = state_of(copy)
        assert state["bad_images"] == wanted["bad_images"]
        assert all(torch.equal(state["model"][n], w) for n, w in wanted["model"].items())
        assert without_clock(read_metrics(copy)) == without_clock(read_metrics(tmp_path / "run"))
        assert check_ledger(job.plan, read_ledger(copy)) == ()


class Copier(Alone):
    """Keeps a copy of the run folder as each checkpoint leaves it."""

    def __init__(self, run_dir: Path, copies: Path) -> None:
        super().__init__()
        self.run_dir, self.copies = run_dir, copies

    def report(self, numbers: dict[str, float]) -> None:
        shutil.copytree(self.run_dir, self.copies / str(int(numbers["step"])))


def test_the_first_step_is_that_of_an_archive_without_the_bad_image(archive: Archive, tmp_path: Path) -> None:
    """Seven images in one batch, one of them bad, and a batch of the other six."""
    gradients = []
    for rows, batch in (((2,), 7), ((), 6)):
        config = run_config(batch_size=batch, clip_norm=1e9, on_bad_image="skip", max_bad_share=1.0)
        job = make_job(without_slides(archive, tmp_path, rows), tmp_path / str(batch), config)
        if not rows:
            job = dataclasses.replace(job, train_rows=tuple(r for r in job.train_rows if r != 2))
        trainer = make_trainer(job)
        trainer.step()
        gradients.append(
            {n: p.grad for n, p in trainer.learner.model.named_parameters() if p.grad is not None}
        )
    assert any(g.any() for g in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def make_trainer(job: TrainJob) -> RankTrainer:
    executor = make_executor("serial", job.slides, job.labels, job.config.model, job.config.sampler)
    return RankTrainer(job, Alone(), executor)


def test_more_than_the_cap_end_the_run_by_their_names(archive: Archive, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, trainer=dataclasses.replace(CONFIG.trainer, max_bad_share=0.1))
    one = without_slides(archive, tmp_path, (2,))
    assert len(train(one, tmp_path / "one", config).skipped) == 1
    with pytest.raises(BadImagesError, match=r"2 of 10 images cannot be read.*gone-2.*gone-8"):
        train(without_slides(archive, tmp_path, (2, 8)), tmp_path / "two", config)
    # all the same as if they had failed at once
    strict = dataclasses.replace(CONFIG, trainer=dataclasses.replace(CONFIG.trainer, max_bad_share=0.0))
    with pytest.raises(BadImagesError, match="1 of 10 images cannot be read, more than 0 of them may"):
        train(one, tmp_path / "strict", strict)


def test_a_validation_of_bad_images_alone_has_no_numbers(archive: Archive, tmp_path: Path) -> None:
    result = train(without_slides(archive, tmp_path, (7, 8, 9)), tmp_path / "run", CONFIG)
    assert {r["phase"] for r in result.metrics} == {"train", "skipped"}
    assert [one.image for one in result.skipped] == [7, 8, 9]


def test_the_policy_may_change_when_a_run_is_taken_up(archive: Archive, tmp_path: Path) -> None:
    config = with_policy("fail")
    broken = without_slides(archive, tmp_path, (9,))  # which is not looked at before the start
    with pytest.raises(SlideError, match="gone-9"):
        train(broken, tmp_path / "run", config)
    changed = dataclasses.replace(with_policy("skip").trainer, lr=1.0)
    with pytest.raises(CheckpointError, match="trainer: lr was"):
        train(broken, tmp_path / "run", dataclasses.replace(config, trainer=changed))
    assert len(train(broken, tmp_path / "run", with_policy("skip")).skipped) == 1


def with_policy(policy: str) -> RunConfig:
    return dataclasses.replace(CONFIG, trainer=dataclasses.replace(CONFIG.trainer, on_bad_image=policy))


DEADLY = (2, 5)
DEADLY_REASON = "ended its sampler 2 times (out of memory, or an image that crashes the process)"


class Refusing(PatchSampler):
    """Raises for the images that end their samplers, where nothing may end."""

    def sample(self, visit: Visit, weights: AttentionWeights, view: View | None = None) -> Item:
        if visit.image in DEADLY:
            raise SlideError(self.slides[visit.image], DEADLY_REASON)
        return super().sample(visit, weights, view)


def deadly_actor(ray: ModuleType) -> Any:
    """A sampler whose process ends, as in a crash of its codec, at some of the images."""
    from ats_stream.workers.actors import SamplerActor

    sampler: Any = SamplerActor

    class DeadlyActor(sampler.__ray_metadata__.modified_class):  # type: ignore[misc]  # known to Ray alone
        def sample(self, visit: Visit, weights: AttentionWeights) -> Item:
            if visit.image in DEADLY:
                os._exit(1)
            item: Item = super().sample(visit, weights)
            return item

    return ray.remote(DeadlyActor)


@pytest.mark.slow
def test_images_that_end_their_samplers_are_left_out_and_no_others(
    archive: Archive, ray_local: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # each start of an actor takes seconds; nothing is repeated by Ray, so all that is under way suffers
    monkeypatch.setattr(ray_executor, "CALL_RETRIES", 0)
    monkeypatch.setattr(ray_executor, "TRIES_ALONE", 1)
    jobs = [make_job(archive, tmp_path / name, CONFIG) for name in ("serial", "ray")]
    table = (jobs[0].slides, jobs[0].labels, CONFIG.model, CONFIG.sampler)
    actors = ray_executor.RayExecutor(
        *table, num_samplers=1, cpus_per_sampler=0.1, actor=deadly_actor(ray_local)
    )
    executors: list[Executor] = [SerialExecutor(Refusing(*table)), actors]
    try:
        serial, ray = (RankTrainer(job, Alone(), one) for job, one in zip(jobs, executors, strict=True))
        for trainer in (serial, ray):
            trainer.run(None)
    finally:
        actors.close()
    assert set(ray.quarantine.images) == set(DEADLY)
    assert ray.quarantine.images == serial.quarantine.images
    for name, tensor in serial.learner.model.state_dict().items():
        assert torch.equal(tensor, ray.learner.model.state_dict()[name]), name


def test_policies_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="on_bad_image must be one of fail, skip, got 'ignore'"):
        TrainerConfig(on_bad_image="ignore")
    with pytest.raises(ValueError, match=r"max_bad_share must lie in \[0, 1\], got 1.5"):
        TrainerConfig(max_bad_share=1.5)
