"""``train``: what it refuses before it starts, what it leaves behind, and how it is taken up."""

from __future__ import annotations

import dataclasses
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from tiny import run_config, without_clock

from ats_stream.errors import ArchiveError, CheckpointError, InputError, SlideError, TargetExistsError
from ats_stream.workers import ClusterConfig, RunConfig, TrainerConfig, train
from ats_stream.workers.checkpoint import load_checkpoint
from ats_stream.workers.config import CONFIG_FILE, check_same
from ats_stream.workers.ledger import LEDGER_FILE
from ats_stream.workers.metrics import METRICS_FILE, TENSORBOARD_FOLDER, read_metrics

if TYPE_CHECKING:
    from pathlib import Path

    from ats_stream.io import Archive
    from ats_stream.workers import TrainResult
    from ats_stream.workers.progress import Progress

CONFIG = run_config(num_epochs=2, checkpoint_interval=1)


@pytest.fixture(scope="module")
def trained(archive: Archive, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, list[Any]]:
    """A finished run, and the records that its listener saw."""
    seen: list[Any] = []
    result = train(archive, tmp_path_factory.mktemp("trained") / "run", CONFIG, on_record=seen.append)
    return result, seen


def test_a_run_folder_holds_configuration_metrics_checkpoints_and_scalars(
    trained: tuple[TrainResult, list[Any]],
) -> None:
    result, seen = trained
    found = {path.name for path in result.run_dir.iterdir()}
    assert found == {CONFIG_FILE, LEDGER_FILE, METRICS_FILE, TENSORBOARD_FOLDER, "checkpoints"}
    assert result.metrics == seen == read_metrics(result.run_dir)
    assert [(r["phase"], r["epoch"]) for r in seen] == [("train", 1), ("val", 1), ("train", 2), ("val", 2)]
    assert result.checkpoint == result.run_dir / "checkpoints" / "step-00000004.pt"
    assert RunConfig.from_dict(yaml.safe_load((result.run_dir / CONFIG_FILE).read_text())) == CONFIG
    assert RunConfig.from_dict(load_checkpoint(result.checkpoint)["config"]) == CONFIG


def test_the_same_command_gives_the_same_weights(
    archive: Archive, trained: tuple[TrainResult, list[Any]], tmp_path: Path
) -> None:
    again = train(archive, tmp_path / "run", CONFIG)
    mine, first = load_checkpoint(again.checkpoint), load_checkpoint(trained[0].checkpoint)
    assert all(torch.equal(mine["model"][name], weight) for name, weight in first["model"].items())
    assert without_clock(again.metrics) == without_clock(trained[1])


def test_each_step_is_told(archive: Archive, tmp_path: Path) -> None:
    steps: list[Progress] = []
    train(archive, tmp_path / "run", CONFIG, on_step=steps.append)
    assert [(one.step, one.num_steps) for one in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(one.images_per_s > 0 and 0 < one.wait_share < 1 and one.staleness == 0 for one in steps)
    assert [one.eta_s > 0 for one in steps] == [True, True, True, False]


def test_a_finished_run_is_returned_at_once(archive: Archive, trained: tuple[TrainResult, list[Any]]) -> None:
    seen: list[Any] = []
    again = train(archive, trained[0].run_dir, CONFIG, on_record=seen.append)
    assert seen == []
    assert again == trained[0]


@pytest.fixture
def copy(trained: tuple[TrainResult, list[Any]], tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(trained[0].run_dir, tmp_path / "copy")


CHANGES = [
    ("model", "feature_width", 16),
    ("sampler", "num_patches", 5),
    ("sampler", "prior_label", None),
    ("trainer", "lr", 0.5),
    ("trainer", "num_epochs", 3),
]


@pytest.mark.parametrize(("part", "field", "value"), CHANGES)
def test_a_run_folder_of_another_configuration_is_refused_naming_the_field(
    archive: Archive, copy: Path, part: str, field: str, value: Any
) -> None:
    old = getattr(getattr(CONFIG, part), field)
    changed: Any = {part: dataclasses.replace(getattr(CONFIG, part), **{field: value})}
    before = (copy / CONFIG_FILE).read_bytes()
    with pytest.raises(CheckpointError) as caught:
        train(archive, copy, dataclasses.replace(CONFIG, **changed))
    assert (
        str(caught.value)
        == f"{copy}: {part}: {field} was {old!r} and is now {value!r}; use another run folder"
    )
    assert (copy / CONFIG_FILE).read_bytes() == before


def test_a_run_folder_of_another_archive_is_refused(archive: Archive, copy: Path) -> None:
    fewer = dataclasses.replace(archive, rows=archive.rows[1:])
    with pytest.raises(
        CheckpointError, match="slides, labels, splits or pixel sizes of the table have changed"
    ):
        train(fewer, copy, CONFIG)


def test_where_a_run_computes_may_change(archive: Archive, copy: Path) -> None:
    assert train(archive, copy, CONFIG, ClusterConfig(window=1)).checkpoint.name == "step-00000004.pt"


def test_a_damaged_newest_checkpoint_is_refused(archive: Archive, copy: Path) -> None:
    newest = copy / "checkpoints" / "step-00000004.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    metrics = read_metrics(copy)
    with pytest.raises(CheckpointError, match=r"step-00000004\.pt: not a checkpoint, or damaged"):
        train(archive, copy, CONFIG)
    assert read_metrics(copy) == metrics
    newest.unlink()  # what is left is the checkpoint before, from which the run goes on
    assert without_clock(train(archive, copy, CONFIG).metrics) == without_clock(metrics)


def test_a_run_that_never_reached_a_checkpoint_may_be_started_anew(archive: Archive, tmp_path: Path) -> None:
    run_config(num_epochs=9).write(tmp_path / "run")
    (tmp_path / "run" / METRICS_FILE).write_text('{"phase": "train", "step": 2, "loss": 9}\n')
    result = train(archive, tmp_path / "run", CONFIG)
    assert [record["step"] for record in result.metrics] == [2, 2, 4, 4]
    assert result.metrics[0]["loss"] != 9


def test_folders_that_are_no_runs_are_left_alone(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(TargetExistsError, match="not empty and is not a run folder"):
        train(archive, tmp_path / "photos", CONFIG)
    with pytest.raises(TargetExistsError, match="is not a folder"):
        train(archive, tmp_path / "photos" / "cat.jpg", CONFIG)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_an_empty_folder_becomes_a_run(archive: Archive, tmp_path: Path) -> None:
    assert train(archive, tmp_path, run_config(num_epochs=1)).run_dir == tmp_path


def with_trainer(**changed: Any) -> RunConfig:
    return dataclasses.replace(CONFIG, trainer=dataclasses.replace(CONFIG.trainer, **changed))


def test_what_cannot_run_is_refused_before_anything_is_written(archive: Archive, tmp_path: Path) -> None:
    run = tmp_path / "run"
    two_ranks = ClusterConfig(executor="ray", num_ranks=2)
    with pytest.raises(InputError, match="batch_size 3 does not split evenly over 2 ranks"):
        train(archive, run, with_trainer(batch_size=3), two_ranks)
    with pytest.raises(ArchiveError, match=r"no row of split 'dev'; there are \['test', 'train', 'val'\]"):
        train(archive, run, with_trainer(train_split="dev"))
    with pytest.raises(ArchiveError, match=r"unknown label '1'; the model knows \['0', 'x'\]"):
        train(archive, run, dataclasses.replace(CONFIG, classes=("0", "x")))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="torch sees no GPU"):
            train(archive, run, CONFIG, ClusterConfig(use_gpu=True))
    assert not run.exists()


def test_a_split_to_validate_with_may_be_missing(archive: Archive, tmp_path: Path) -> None:
    config = with_trainer(num_epochs=1, val_split="dev")
    assert [r["phase"] for r in train(archive, tmp_path, config).metrics] == ["train"]


def test_a_slide_that_cannot_be_read_ends_the_run_by_its_name(archive: Archive, tmp_path: Path) -> None:
    gone = dataclasses.replace(archive.rows[2], slide=str(tmp_path / "gone.ome.zarr"))
    broken = dataclasses.replace(archive, rows=(*archive.rows[:2], gone, *archive.rows[3:]))
    with pytest.raises(SlideError, match=r"gone\.ome\.zarr: no such file or folder"):
        train(broken, tmp_path / "run", CONFIG)
    # the slide comes back, and the run goes on from where it was
    shutil.copytree(archive.rows[2].slide, gone.slide)
    assert train(broken, tmp_path / "run", CONFIG).checkpoint.name == "step-00000004.pt"


# --- configurations


def test_a_configuration_survives_yaml() -> None:
    for config in (CONFIG, run_config(lr=1e-5, lag=3, val_split="v", decay_share=0.0)):
        assert RunConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.pop("model"), "'model'"),
        (lambda c: c["model"].update(colour="red"), "colour"),
        (lambda c: c["trainer"].update(lr=-1.0), "lr must be positive, got -1.0"),
        (lambda c: c["model"].pop("num_classes"), "num_classes"),
        (lambda c: c.update(sampler=3), "mapping"),
    ],
)
def test_configurations_of_another_version_are_refused(spoil: Any, message: str) -> None:
    values = CONFIG.to_dict()
    spoil(values)
    with pytest.raises(CheckpointError, match=f"does not fit this version: .*{message}"):
        RunConfig.from_dict(values)


def test_the_first_field_that_differs_is_named() -> None:
    check_same({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2}}, "run")
    with pytest.raises(CheckpointError, match="run: b: c was 2 and is now 3"):
        check_same({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}, "run")
    with pytest.raises(CheckpointError, match="run: d was None and is now 4"):
        check_same({"a": 1}, {"a": 1, "d": 4}, "run")


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        *((TrainerConfig, name, 0) for name in ("num_epochs", "batch_size", "publish_interval")),
        *((TrainerConfig, name, -1) for name in ("weight_decay", "entropy_weight", "lag")),
        (TrainerConfig, "checkpoint_interval", -1),
        (TrainerConfig, "lr", 0.0),
        (TrainerConfig, "lr", float("nan")),
        (TrainerConfig, "clip_norm", -1.0),
        (TrainerConfig, "decay_share", 1.5),
        *(
            (ClusterConfig, name, 0)
            for name in ("num_ranks", "samplers_per_rank", "threads_per_rank", "window")
        ),
        *((ClusterConfig, name, -1) for name in ("cpus_per_rank", "cpus_per_sampler", "max_failures")),
        *((ClusterConfig, name, -1) for name in ("gpus_per_sampler", "hedge_after_s")),
        (ClusterConfig, "window_bytes", 0),
        (ClusterConfig, "gpus_per_rank", 0.5),
        (ClusterConfig, "executor", "dask"),
    ],
)
def test_impossible_configurations_name_the_field_and_the_value(kind: Any, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} must .*{value}"):
        kind(**{field: value})
