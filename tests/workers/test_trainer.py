"""The training loop of one rank: it learns, goes on from any checkpoint, and counts no image twice."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from lazy_copies import LazyCopies
from tiny import make_job, run_config, without_clock

from ats_stream.demo.digits import DigitsConfig, Scene, write_scene
from ats_stream.errors import CheckpointError
from ats_stream.io import read_archive, write_archive
from ats_stream.kernels.feeder import DeviceFeeder
from ats_stream.workers.batch import BatchFeeder
from ats_stream.workers.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from ats_stream.workers.executors import make_executor
from ats_stream.workers.metrics import read_metrics
from ats_stream.workers.ranks import Alone
from ats_stream.workers.trainer import RankTrainer, TrainJob, train_rank

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ats_stream.io import Archive
    from ats_stream.workers import RunConfig

CPU = torch.device("cpu")


def make_trainer(job: TrainJob) -> RankTrainer:
    executor = make_executor("serial", job.slides, job.labels, job.config.model, job.config.sampler)
    return RankTrainer(job, Alone(), executor)


def final(run_dir: Path) -> dict[str, Any]:
    return load_checkpoint(find_checkpoint(run_dir))


def assert_same_state(one: Any, other: Any, where: str = "") -> None:
    """Nested states are equal, tensors bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same_state(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same_state(*pair, f"{where}[{number}]")
    else:
        assert one == other, where


class Copier(Alone):
    """Keeps a copy of the run folder as each checkpoint leaves it."""

    def __init__(self, run_dir: Path, copies: Path) -> None:
        super().__init__()
        self.run_dir, self.copies = run_dir, copies

    def report(self, numbers: dict[str, float]) -> None:
        shutil.copytree(self.run_dir, self.copies / str(int(numbers["step"])))


# lag, steps between versions, steps between checkpoints: with 2 steps an epoch, 3 cuts epochs in their middle
RESUMED = [
    run_config(num_epochs=4, checkpoint_interval=1),
    run_config(
        num_epochs=4, checkpoint_interval=3, lag=2, publish_interval=2, extra_patches=3, extra_epochs=2
    ),
]


@pytest.fixture(scope="module", params=RESUMED, ids=["synchronous", "lagging"])
def uninterrupted(
    request: pytest.FixtureRequest, archive: Archive, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TrainJob, Path]]:
    """A whole run, and the folder of its copies at each checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    job = make_job(archive, folder / "run", request.param)
    train_rank(job, Copier(folder / "run", folder / "copies"))
    return job, folder / "copies"


def test_going_on_from_any_checkpoint_changes_no_bit(uninterrupted: tuple[TrainJob, Path]) -> None:
    job, copies = uninterrupted
    wanted = final(Path(job.run_dir))
    steps = sorted(int(copy.name) for copy in copies.iterdir())
    assert steps == ([*range(1, 9)] if job.config.trainer.lag == 0 else [2, 3, 4, 6, 8])
    for step in steps:
        # as if the process had gone on for a while after the checkpoint, and then been killed
        copy = shutil.copytree(copies / str(step), copies.parent / f"resumed-{step}")
        shutil.copy(Path(job.run_dir) / "metrics.jsonl", copy)
        assert final(copy)["step"] == step
        train_rank(dataclasses.replace(job, run_dir=str(copy)), Alone())
        state = final(copy)
        assert_same_state(state, wanted)
        assert without_clock(read_metrics(copy)) == without_clock(read_metrics(Path(job.run_dir)))


def test_an_epochs_seconds_include_those_before_the_checkpoint(uninterrupted: tuple[TrainJob, Path]) -> None:
    job, copies = uninterrupted
    in_mid_epoch = copies / "3"
    before_s = load_checkpoint(find_checkpoint(in_mid_epoch))["totals"]["seconds"]
    copy = shutil.copytree(in_mid_epoch, copies.parent / "timed")
    train_rank(dataclasses.replace(job, run_dir=str(copy)), Alone())
    record = next(r for r in read_metrics(copy) if r["step"] == 4 and r["phase"] == "train")
    assert record["seconds"] > before_s > 0


def test_a_finished_run_is_left_as_it_is(uninterrupted: tuple[TrainJob, Path]) -> None:
    job, _ = uninterrupted
    checkpoint = find_checkpoint(job.run_dir)
    before = checkpoint.read_bytes(), (Path(job.run_dir) / "metrics.jsonl").read_bytes()
    train_rank(job, Alone())
    assert (checkpoint.read_bytes(), (Path(job.run_dir) / "metrics.jsonl").read_bytes()) == before


def test_lag_changes_the_training_and_the_window_does_not(archive: Archive, tmp_path: Path) -> None:
    states = []
    for number, (lag, window) in enumerate([(0, 16), (2, 16), (2, 1), (2, 5)]):
        config = run_config(num_epochs=2, lag=lag)
        train_rank(make_job(archive, tmp_path / str(number), config, window=window), Alone())
        states.append(final(tmp_path / str(number))["model"])
    assert_same_state(states[1], states[2])
    assert_same_state(states[1], states[3])
    assert not torch.equal(states[0]["head.weight"], states[1]["head.weight"])


@pytest.mark.parametrize("config", [RESUMED[1], run_config(num_epochs=2, accumulate=2, lag=1)])
def test_copying_ahead_changes_no_bit(archive: Archive, tmp_path: Path, config: RunConfig) -> None:
    """As on a device: the next items are asked for while a step is under way, and copied late."""
    states, num_ahead = [], 0
    for ahead in (False, True):
        trainer = make_trainer(make_job(archive, tmp_path / f"ahead-{ahead}", config))
        if ahead:
            trainer.learner.batches = BatchFeeder(CPU, DeviceFeeder(CPU, copies=LazyCopies()))
        stage = trainer.learner.stage

        def count(items: Any, stage: Any = stage) -> None:
            nonlocal num_ahead
            num_ahead += 1
            stage(items)

        trainer.learner.stage = count  # type: ignore[method-assign]  # looks on
        trainer.run(None)
        states.append(final(tmp_path / f"ahead-{ahead}"))
        # every step but the first is copied ahead with a lag of 1; of a longer interval, those with a version
        assert (num_ahead > 0) == ahead
    assert_same_state(*states)


def first_step(archive: Archive, run_dir: Path, batch_size: int) -> tuple[dict[str, torch.Tensor], Any]:
    """The gradient of the first step, and its sums."""
    config = run_config(batch_size=batch_size, clip_norm=1e9)
    trainer = make_trainer(make_job(archive, run_dir, config))
    sums = trainer.step()
    return {n: p.grad for n, p in trainer.learner.model.named_parameters() if p.grad is not None}, sums


@pytest.mark.parametrize("batch_size", [8, 12])
def test_a_batch_that_is_filled_up_has_the_gradient_of_one_that_is_not(
    archive: Archive, tmp_path: Path, batch_size: int
) -> None:
    exact, exact_sums = first_step(archive, tmp_path, 7)
    filled, filled_sums = first_step(archive, tmp_path, batch_size)
    assert exact.keys() == filled.keys()
    for name, gradient in exact.items():
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(filled[name], gradient, rtol=1e-4, atol=1e-6)
    for name in ("images", "loss", "accuracy", "entropy", "stored_bytes", "decoded_bytes"):
        assert filled_sums[name] == pytest.approx(exact_sums[name], rel=1e-5), name


def test_metrics_are_means_over_the_images_of_an_epoch(archive: Archive, tmp_path: Path) -> None:
    train_rank(make_job(archive, tmp_path, run_config(num_epochs=2, lr=1e-9)), Alone())
    records = read_metrics(tmp_path)
    assert [(r["phase"], r["step"], r["epoch"]) for r in records] == [
        ("train", 2, 1), ("val", 2, 1), ("train", 4, 2), ("val", 4, 2),
    ]  # fmt: skip
    for record in records:
        assert round(record["accuracy"] * (7 if record["phase"] == "train" else 3), 6) % 1 == 0
        assert 0 <= record["accuracy"] <= 1
        assert record["loss"] > 0
        if record["phase"] == "train":
            # nothing is learned at this rate, so attention is fresh and its draws are worth all they can be
            assert record["effective_share"] == pytest.approx(1, abs=1e-3)
            assert 0 < record["sampled_mass"] <= 1
            assert 0 < record["entropy"] < math.log(256)
            assert record["stored_bytes"] < record["decoded_bytes"]


def test_checkpoints_are_reported_and_records_reach_the_caller(archive: Archive, tmp_path: Path) -> None:
    reports: list[float] = []

    class Listener(Alone):
        def report(self, numbers: dict[str, float]) -> None:
            reports.append(numbers["step"])

    records: list[dict[str, Any]] = []
    train_rank(make_job(archive, tmp_path, run_config(checkpoint_interval=3)), Listener(), records.append)
    assert reports == [2, 3, 4, 6]
    assert records == read_metrics(tmp_path)


def test_without_a_validation_split_only_training_is_measured(archive: Archive, tmp_path: Path) -> None:
    job = dataclasses.replace(make_job(archive, tmp_path, run_config(num_epochs=1)), val_rows=())
    train_rank(job, Alone())
    assert [record["phase"] for record in read_metrics(tmp_path)] == ["train"]


# --- checkpoints that do not fit


def spoil(state: dict[str, Any], kind: str) -> None:
    if kind == "weights of another shape":
        state["model"]["head.weight"] = state["model"]["head.weight"][:, :-1]
    elif kind == "weights missing":
        del state["model"]["head.bias"]
    elif kind == "no tensor":
        state["model"]["head.bias"] = "none"
    elif kind == "no moments":
        state["optimiser"]["optimiser"].pop("state")
    elif kind == "no groups":
        state["optimiser"]["optimiser"]["param_groups"] = []
    elif kind == "no version":
        state["versions"] = {}
    elif kind == "versions of nothing":
        state["versions"] = dict.fromkeys(state["versions"], 5)


@pytest.mark.parametrize(
    "kind",
    [
        "weights of another shape", "weights missing", "no tensor", "no moments", "no groups", "no version",
        "versions of nothing",
    ],
)  # fmt: skip
def test_tampered_checkpoints_are_refused_in_one_line(archive: Archive, tmp_path: Path, kind: str) -> None:
    job = make_job(archive, tmp_path, run_config())
    trainer = make_trainer(job)
    trainer.step()
    trainer.checkpoint()
    state = final(tmp_path)
    spoil(state, kind)
    save_checkpoint(tmp_path, 1, {k: v for k, v in state.items() if k not in ("format", "step")})
    with pytest.raises(CheckpointError, match="does not fit its own configuration: ") as caught:
        make_trainer(job).resume()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changed", ["labels", "slides", "train_rows"])
def test_a_run_is_not_taken_up_on_another_archive(archive: Archive, tmp_path: Path, changed: str) -> None:
    job = make_job(archive, tmp_path, run_config())
    trainer = make_trainer(job)
    trainer.step()
    trainer.checkpoint()
    make_trainer(job).resume()
    values: Any = getattr(job, changed)
    other = dataclasses.replace(job, **{changed: type(values)(reversed(values))})
    with pytest.raises(
        CheckpointError, match="slides, labels, splits or pixel sizes of the table have changed"
    ):
        make_trainer(other).resume()
    moved = dataclasses.replace(job, slides=[f"/elsewhere/{Path(slide).name}" for slide in job.slides])
    assert moved.archive_key == job.archive_key


def test_a_run_is_not_taken_up_with_other_pixel_sizes(archive: Archive, tmp_path: Path) -> None:
    job = dataclasses.replace(make_job(archive, tmp_path, run_config()), pixel_sizes={0: 0.25, 2: 0.5})
    trainer = make_trainer(job)
    trainer.step()
    trainer.checkpoint()
    make_trainer(dataclasses.replace(job, pixel_sizes={2: 0.5, 0: 0.25})).resume()
    for changed in ({}, {0: 0.25}, {0: 0.25, 2: 1.0}, {0: 0.25, 3: 0.5}):
        with pytest.raises(CheckpointError, match="splits or pixel sizes of the table have changed"):
            make_trainer(dataclasses.replace(job, pixel_sizes=changed)).resume()


# --- learning


def write_coloured_archive(folder: Path) -> Archive:
    """8 images: 4 plates of the class's colour, 4 of grey ones; one patch of colour settles the class."""
    config = DigitsConfig(side_px=512, gap_px=8, num_matching=4, num_other=0, num_clutter=4)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(8):
        label = number % 2
        colours = [[(250, 20, 20), (20, 20, 250)][label]] * 4 + [(90, 90, 90)] * 4
        plates = np.broadcast_to(np.array(colours, np.uint8)[:, :, None, None], (8, 3, 36, 36))
        scene = Scene(label, np.argwhere(np.ones((3, 3)))[:8] * 160 + rng.integers(0, 100, (8, 2)), plates)
        target = folder / f"{number}.ome.zarr"
        write_scene(target, scene, config)
        rows.append((target, str(label), "train"))
    write_archive(folder / "archive.csv", rows)
    return read_archive(folder / "archive.csv")


@pytest.mark.parametrize("lag", [0, 2])
def test_it_learns_what_colour_the_class_is_and_where_to_look(tmp_path: Path, lag: int) -> None:
    archive = write_coloured_archive(tmp_path)
    config = run_config(num_epochs=30, lr=1e-2, entropy_weight=0.0, lag=lag)
    train_rank(make_job(archive, tmp_path / "run", config), Alone())
    train = [record for record in read_metrics(tmp_path / "run") if record["phase"] == "train"]
    assert train[0]["loss"] > 0.4
    # eight images in an epoch, and each draw may miss: what was learned shows in the mean of the last epochs
    assert np.mean([record["loss"] for record in train[-10:]]) < 0.2
    assert np.mean([record["accuracy"] for record in train[-10:]]) > 0.95


# --- the best model, and when to stop


def with_scores(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    """Validations that give these accuracies, one after the other."""
    left = list(scores)
    monkeypatch.setattr(RankTrainer, "validate", lambda _self: {"loss": 1.0, "accuracy": left.pop(0)})


def test_the_best_epoch_is_kept_beside_the_newest(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_scores(monkeypatch, 0.5, 0.9, 0.7, 0.9)
    train_rank(make_job(archive, tmp_path, run_config(num_epochs=4)), Alone())
    best = load_checkpoint(tmp_path / "checkpoints" / "best.pt")
    assert (best["step"], best["best"]) == (4, {"score": 0.9, "step": 4, "worse_epochs": 0})
    assert (final(tmp_path)["step"], final(tmp_path)["best"]["worse_epochs"]) == (8, 2)


def test_training_ends_early_and_stays_ended(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(archive, tmp_path, run_config(num_epochs=9, patience=2))
    with_scores(monkeypatch, 0.5, 0.4, 0.5)
    train_rank(job, Alone())
    assert final(tmp_path)["step"] == 6
    train_rank(job, Alone())  # there is no score left to give
    assert final(tmp_path)["step"] == 6


def test_weighted_visits_are_resumed_bit_for_bit(archive: Archive, tmp_path: Path) -> None:
    config = run_config(average_decay=0.5, accumulate=2, schedule="cosine")
    weights = [1.0, 2, 3, 1, 2, 3, 1]
    jobs = [make_job(archive, tmp_path / name, config) for name in ("one", "other")]
    jobs = [dataclasses.replace(job, visit_weights=weights) for job in jobs]
    train_rank(jobs[0], Alone())
    first = make_trainer(jobs[1])
    for _ in range(3):
        first.totals.add(first.step())
    first.checkpoint()
    train_rank(jobs[1], Alone())
    one, other = final(tmp_path / "one"), final(tmp_path / "other")
    for part in ("model", "average", "best", "step", "versions"):
        assert_same_state(one[part], other[part], part)
