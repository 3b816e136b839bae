"""Archives in object storage: the same items, losses and weights as from a folder, and no secret anywhere."""

from __future__ import annotations

import csv
import dataclasses
import logging
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tiny import (
    SAMPLER,
    assert_same_item,
    attention,
    make_sampler,
    run_config,
    table,
    visit,
    weights,
    without_clock,
)

from ats_stream.cli import main
from ats_stream.errors import SlideError
from ats_stream.io import StorageOptions, read_archive, write_archive
from ats_stream.workers import ClusterConfig, PatchSampler, Plan, Stream, train
from ats_stream.workers.checkpoint import load_checkpoint
from ats_stream.workers.executors import make_executor
from ats_stream.workers.predict import Predictor
from ats_stream.workers.trainer import TrainJob

if TYPE_CHECKING:
    from ats_stream.io import Archive

MODEL = run_config().model


@pytest.fixture(scope="module")
def remote(archive: Archive, s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """The same archive, its pyramids as objects; the first two stay in their folder."""
    folder = tmp_path_factory.mktemp("table")
    rows = []
    for number, row in enumerate(archive):
        place = row.slide
        if number >= 2:
            place = s3.upload(Path(row.slide), "digits", f"{row.split}/{row.name}.ome.zarr")
        rows.append((place, row.label, row.split))
    write_archive(folder / "archive.csv", rows)
    return read_archive(folder / "archive.csv")


def files_with(folder: Path, secret: str) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]


def check_stream(archive: Archive, remote: Archive, executor: str, options: Any) -> None:
    """Items drawn over the network are those drawn from the folder, bit for bit."""
    plan = Plan(images=tuple(range(len(archive))), batch_size=4, num_epochs=1, seed=0, lag=None)
    made = make_executor(
        executor, *table(remote), MODEL, SAMPLER, storage_options=options, cpus_per_sampler=0.5
    )
    try:
        stream = Stream(plan, made)
        stream.publish(0, attention(model=MODEL))
        items = list(stream)
    finally:
        made.close()
    local = Stream(plan, make_executor("serial", *table(archive), MODEL, SAMPLER))
    local.publish(0, attention(model=MODEL))
    for item, expected in zip(items, local, strict=True):
        assert_same_item(item, dataclasses.replace(expected, slide=remote.rows[expected.visit.image].slide))


def test_items_from_a_bucket_are_those_of_the_folder(archive: Archive, remote: Archive, s3: Any) -> None:
    check_stream(archive, remote, "serial", s3.options)


@pytest.mark.slow
def test_actors_get_the_options_and_their_logs_do_not(
    archive: Archive, remote: Archive, s3: Any, ray_local: Any
) -> None:
    check_stream(archive, remote, "ray", s3.options)
    logs = Path(ray_local._private.worker._global_node.get_session_dir_path()) / "logs"
    assert any(logs.iterdir())
    assert files_with(logs, s3.secret) == []


def test_credentials_of_the_environment_are_used(
    archive: Archive, remote: Archive, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": s3.options["access_key_id"],
        "AWS_SECRET_ACCESS_KEY": s3.secret,
        "AWS_REGION": s3.options["region"],
        "AWS_ENDPOINT": s3.endpoint,
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    item = PatchSampler(*table(remote), MODEL, SAMPLER).sample(visit(3), weights(model=MODEL))
    expected = make_sampler(archive).sample(visit(3), weights(model=MODEL))
    assert item.crops_NCPP.tobytes() == expected.crops_NCPP.tobytes()


def test_training_from_a_bucket_is_that_from_the_folder(
    archive: Archive, remote: Archive, s3: Any, tmp_path: Path
) -> None:
    config = run_config(num_epochs=1)
    here = train(archive, tmp_path / "here", config)
    there = train(remote, tmp_path / "there", config, storage_options=s3.options)
    assert without_clock(there.metrics) == without_clock(here.metrics)
    one, other = load_checkpoint(here.checkpoint), load_checkpoint(there.checkpoint)
    assert one["archive"] == other["archive"]
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name
    for secret in (s3.secret, s3.options["access_key_id"]):
        assert files_with(tmp_path, secret) == []


@pytest.mark.filterwarnings("error")
def test_the_command_line_trains_and_predicts_and_shows_no_secret(
    remote: Archive,
    s3: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    options = tmp_path / "options.yaml"
    numbers = {name: s3.options[name] for name in ("timeout_s", "max_retries")}
    words = [f"{name}: {value}" for name, value in {**s3.options, **numbers}.items() if name != "region"]
    options.write_text("\n".join(words))
    given = ["--storage-options", str(options), "--storage-options", "region=us-east-1"]
    run, out, archive = tmp_path / "run", tmp_path / "out", remote.path
    quick = [
        "--patches",
        "2",
        "--patch-px",
        "32",
        "--prior",
        "foreground",
        "--batch-size",
        "4",
        "--epochs",
        "1",
    ]
    assert main(["train", archive, "--out", str(run), *quick, *given]) == 0
    assert main(["predict", str(run), archive, "--split", "test", "--out", str(out), *given]) == 0
    assert main(["info", remote.rows[-1].slide, *given]) == 0
    options.unlink()
    printed = capsys.readouterr()
    assert remote.rows[-1].slide in printed.out
    with (out / "predictions.csv").open(newline="") as file:
        assert [row["slide"] for row in csv.DictReader(file)] == [r.slide for r in remote.split("test")]
    for secret in (s3.secret, s3.options["access_key_id"]):
        assert files_with(tmp_path, secret) == []
        assert secret not in printed.out + printed.err + caplog.text


def test_nothing_that_carries_options_shows_them(remote: Archive, s3: Any) -> None:
    options = StorageOptions.of(s3.options)
    assert repr(options) == (
        "StorageOptions(access_key_id, endpoint, max_retries, region, secret_access_key, timeout_s)"
    )
    copy = pickle.loads(pickle.dumps(options))
    np.testing.assert_array_equal(
        copy.open(remote.rows[-1].slide).read(1), options.open(remote.rows[-1].slide).read(1)
    )
    job = TrainJob(
        run_dir="run",
        config=run_config(),
        cluster=ClusterConfig(),
        slides=[],
        labels=[],
        train_rows=(),
        val_rows=(),
        storage_options=options,
    )
    sampler = PatchSampler(*table(remote), MODEL, SAMPLER, options)
    for shown in (repr(job), f"{sampler}", f"{vars(sampler)}", repr(options.open(remote.rows[-1].slide))):
        assert s3.secret not in shown
        assert s3.options["access_key_id"] not in shown


def test_wrong_options_end_in_one_line_that_names_the_slide(remote: Archive, s3: Any) -> None:
    place = remote.rows[-1].slide
    for options, reason in (
        (
            {**s3.options, "region": "us-east-1", "nonsense": "hush-hush"},
            "storage options or URL cannot be used",
        ),
        ({**s3.options, "timeout_s": "hush-hush"}, "storage option timeout_s must be a number"),
        ({**s3.options, "endpoint": "http://127.0.0.1:1", "max_retries": 0}, "cannot connect"),
    ):
        sampler = PatchSampler(*table(remote), MODEL, SAMPLER, options)
        with pytest.raises(SlideError, match=reason) as caught:
            sampler.sample(visit(len(remote) - 1), weights(model=MODEL))
        message = f"{caught.value} {caught.value!r}"
        assert str(caught.value).startswith(f"{place}: ")
        assert "\n" not in message
        assert s3.secret not in message
        assert "hush-hush" not in message


def test_predictions_read_with_the_options(
    remote: Archive, s3: Any, tmp_path: Path, archive: Archive
) -> None:
    run = train(archive, tmp_path / "run", run_config(num_epochs=1)).run_dir
    predictor = Predictor.load(run)
    there = predictor.predict(remote.split("test").rows, storage_options=s3.options)
    for one, other in zip(there, predictor.predict(archive.split("test").rows), strict=True):
        np.testing.assert_array_equal(one.probability_K, other.probability_K)
        assert one.full_shape == other.full_shape
