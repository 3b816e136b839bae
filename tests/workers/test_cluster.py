"""Real fits of Ray Train: two ranks equal one process, survive a kill, and fail or stop in one line."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from tiny import SAMPLER, make_job, run_config, without_clock

from ats_stream.errors import ClusterError, PreemptedError, SlideError
from ats_stream.workers import ClusterConfig, train
from ats_stream.workers.checkpoint import find_checkpoint, load_checkpoint
from ats_stream.workers.cluster import START_TRIES, ray_cluster, start_local_ray
from ats_stream.workers.ledger import check_ledger, read_ledger

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from ats_stream.io import Archive
    from ats_stream.workers import TrainResult

# Ray Train makes a context of Ray Data, which warns of old defaults of its own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
# each epoch's end waits for Ray Train's health check, so a signal at an early record comes before the end
NUM_EPOCHS = 16
CONFIG = dataclasses.replace(
    run_config(num_epochs=NUM_EPOCHS, lag=1),
    sampler=dataclasses.replace(SAMPLER, seed=5),  # --seed is for both
)
# the same, and where it runs, as options of the command
OPTIONS = (
    *("--epochs", str(NUM_EPOCHS), "--batch-size", "4", "--lag", "1", "--seed", "5", "--lr", "3e-3"),
    *("--patches", "4", "--patch-px", "48", "--prior", "foreground", "--entropy-weight", "0.01"),
    *("--attention-width", "4", "--feature-width", "8"),
    *("--executor", "ray", "--cpus-per-rank", "0.5", "--cpus-per-sampler", "0.25", "--out", "run"),
)
TWO_RANKS = ClusterConfig(
    executor="ray", num_ranks=2, cpus_per_rank=0.5, cpus_per_sampler=0.25, samplers_per_rank=1
)


@pytest.fixture(scope="module")
def two_ranks(
    archive: Archive, ray_local: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainResult, list[Any]]:
    """A whole run of two ranks with a sampler each, and what its listener saw."""
    seen: list[Any] = []
    run = tmp_path_factory.mktemp("fit") / "run"
    return train(archive, run, CONFIG, TWO_RANKS, on_record=seen.append), seen


@pytest.mark.slow
def test_two_ranks_train_the_model_of_one_process(
    archive: Archive, two_ranks: tuple[TrainResult, list[Any]], tmp_path: Path
) -> None:
    result, seen = two_ranks
    serial = train(archive, tmp_path / "serial", CONFIG)
    assert result.checkpoint.name == serial.checkpoint.name == f"step-{2 * NUM_EPOCHS:08d}.pt"
    mine, reference = load_checkpoint(result.checkpoint), load_checkpoint(serial.checkpoint)
    for name, weight in reference["model"].items():
        torch.testing.assert_close(mine["model"][name], weight, rtol=1e-5, atol=1e-5)
    assert seen == result.metrics
    plan = make_job(archive, tmp_path, CONFIG).plan
    assert (
        check_ledger(plan, read_ledger(result.run_dir))
        == check_ledger(plan, read_ledger(serial.run_dir))
        == ()
    )
    records, wanted = without_clock(result.metrics), without_clock(serial.metrics)
    assert len(records) == len(wanted) == 2 * NUM_EPOCHS
    for record, other in zip(records, wanted, strict=True):
        assert record.pop("phase") == other.pop("phase")
        assert record == pytest.approx(other, rel=1e-3, abs=1e-4)
    assert {p.name for p in result.run_dir.iterdir() if not p.name.startswith("ray-train")} == {
        p.name for p in serial.run_dir.iterdir()
    }


def ranks_of_train() -> list[psutil.Process]:
    """The processes of Ray Train's ranks below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "TrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.slow
def test_a_rank_that_is_killed_changes_no_bit(
    archive: Archive, two_ranks: tuple[TrainResult, list[Any]], tmp_path: Path
) -> None:
    killed: list[int] = []
    seen: list[Any] = []

    def kill_once(record: Any) -> None:
        seen.append(record)
        if not killed:
            rank = ranks_of_train()[-1]
            os.kill(rank.pid, signal.SIGKILL)
            killed.append(rank.pid)

    cluster = dataclasses.replace(TWO_RANKS, max_failures=1)
    result = train(archive, tmp_path / "run", CONFIG, cluster, on_record=kill_once)
    assert len(killed) == 1
    assert len(list(result.run_dir.glob("tensorboard/events*"))) == 2  # rank 0 was started twice
    mine, reference = load_checkpoint(result.checkpoint), load_checkpoint(two_ranks[0].checkpoint)
    for name, weight in reference["model"].items():
        assert torch.equal(mine["model"][name], weight), name
    assert without_clock(result.metrics) == without_clock(two_ranks[0].metrics)
    assert without_clock(seen) == without_clock(result.metrics)  # each once, in order


@pytest.mark.slow
def test_a_slide_that_cannot_be_read_is_named_by_its_own_error(
    archive: Archive, ray_local: ModuleType, tmp_path: Path
) -> None:
    # none of those that are looked at before anything starts
    gone = dataclasses.replace(archive.rows[4], slide=str(tmp_path / "gone.ome.zarr"))
    broken = dataclasses.replace(archive, rows=(*archive.rows[:4], gone, *archive.rows[5:]))
    with pytest.raises(SlideError) as caught:
        train(broken, tmp_path / "run", CONFIG, TWO_RANKS)
    assert str(caught.value) == f"{gone.slide}: no such file or folder"


@pytest.mark.slow
def test_two_ranks_leave_out_what_one_process_leaves_out(
    archive: Archive, ray_local: ModuleType, tmp_path: Path
) -> None:
    gone = {n: dataclasses.replace(archive.rows[n], slide=str(tmp_path / f"gone-{n}")) for n in (2, 8)}
    broken = dataclasses.replace(archive, rows=tuple(gone.get(n, r) for n, r in enumerate(archive.rows)))
    trainer = dataclasses.replace(CONFIG.trainer, num_epochs=2, on_bad_image="skip", max_bad_share=0.2)
    config = dataclasses.replace(CONFIG, trainer=trainer)
    seen: list[Any] = []
    serial = train(broken, tmp_path / "serial", config)
    result = train(broken, tmp_path / "run", config, TWO_RANKS, on_record=seen.append)
    assert {one.image for one in result.skipped} == {2, 8}
    assert result.skipped == serial.skipped
    assert seen == result.metrics
    mine, reference = load_checkpoint(result.checkpoint), load_checkpoint(serial.checkpoint)
    for name, weight in reference["model"].items():
        torch.testing.assert_close(mine["model"][name], weight, rtol=1e-5, atol=1e-5)
    facts = [
        sorted(
            (r.phase, r.step, r.image, r.stream_id, r.share, r.version, r.bad or "") for r in read_ledger(run)
        )
        for run in (result.run_dir, serial.run_dir)
    ]
    assert facts[0] == facts[1]


@pytest.mark.slow
def test_a_cluster_too_small_is_refused_before_anything_is_written(
    archive: Archive, ray_local: ModuleType, tmp_path: Path
) -> None:
    many = dataclasses.replace(TWO_RANKS, samplers_per_rank=40)
    with pytest.raises(ClusterError, match="has 4 CPUs, the run needs 21"):
        train(archive, tmp_path / "run", CONFIG, many)
    if not torch.cuda.is_available():
        with pytest.raises(ClusterError, match="has 0 GPUs, the run needs 2"):
            train(archive, tmp_path / "run", CONFIG, dataclasses.replace(TWO_RANKS, use_gpu=True))
    assert not (tmp_path / "run").exists()
    with ray_cluster(TWO_RANKS, cpus_needed=1):
        pass
    fewer = dataclasses.replace(TWO_RANKS, min_ranks=1, max_failures=1)
    with ray_cluster(fewer, cpus_needed=8):  # there are 4, enough for one of two ranks
        pass
    with (
        pytest.raises(ClusterError, match=r"has 4 CPUs, the run needs 4\.5"),
        ray_cluster(fewer, cpus_needed=9),
    ):
        pass
    assert ray_local.is_initialized()  # a cluster that was there before stays


class NotStartedError(Exception):
    """As Ray raises it, which has no class for it."""

    def __init__(self) -> None:
        super().__init__(
            "The current node timed out during startup.\nThis could happen because of many things."
        )


def test_a_ray_that_gives_up_while_it_starts_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    told: list[dict[str, Any]] = []

    def init(**settings: Any) -> None:
        told.append(settings)
        if len(told) < START_TRIES:
            raise NotStartedError

    monkeypatch.setattr(ray, "init", init)
    start_local_ray(num_cpus=2)
    assert told == [{"address": "local", "include_dashboard": False, "num_cpus": 2}] * START_TRIES


def test_a_ray_that_never_starts_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**settings: Any) -> None:
        raise NotStartedError

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    line = "cannot reach a local Ray cluster: it did not start: The current node timed out during startup"
    with (
        pytest.raises(ClusterError, match=rf"^{line}\.?$"),
        ray_cluster(ClusterConfig(executor="ray"), cpus_needed=1),
    ):
        pass


def start_command(archive: Archive, folder: Path, *options: str) -> subprocess.Popen[str]:
    """The command as a user starts it, with a Ray of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "ats_stream.cli", "train", archive.path, *OPTIONS, *options],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def signal_after_an_epoch(process: subprocess.Popen[str], number: int) -> str:
    """Send a signal after the first epoch; all processes must end. Returns what the command complained of."""
    assert process.stdout is not None
    children: list[psutil.Process] = []
    try:
        for line in process.stdout:
            if line.startswith("epoch"):
                break
        children = psutil.Process(process.pid).children(recursive=True)
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        assert any("TrainWorker" in " ".join(child.cmdline()) for child in children)
        process.send_signal(number)
        _, complaint = process.communicate(timeout=60)
        _, left = psutil.wait_procs(children, timeout=30)
        assert [child.cmdline() for child in left] == []
    finally:
        process.kill()
        for child in children:
            if child.is_running():
                child.kill()
        process.communicate()
    return complaint


@pytest.mark.slow
def test_ctrl_c_ends_the_command_in_one_line_and_leaves_no_process(archive: Archive, tmp_path: Path) -> None:
    process = start_command(archive, tmp_path, "--epochs", "40")
    assert signal_after_an_epoch(process, signal.SIGINT) == "ats-stream: interrupted\n"
    assert process.returncode == 130
    # and the run can be taken up
    assert find_checkpoint(tmp_path / "run").name.startswith("step-")


@pytest.mark.slow
def test_sigterm_to_the_command_and_to_a_rank_changes_no_bit(
    archive: Archive, two_ranks: tuple[TrainResult, list[Any]], tmp_path: Path
) -> None:
    process = start_command(archive, tmp_path)
    complaint = signal_after_an_epoch(process, signal.SIGTERM)
    first = load_checkpoint(find_checkpoint(tmp_path / "run"))["step"]
    assert process.returncode == 75, complaint
    assert f"stopped by SIGTERM after step {first} of {2 * NUM_EPOCHS}; the same command" in complaint
    assert complaint.count("\n") == 1

    def ask_a_rank(record: Any) -> None:
        if record["phase"] == "train":
            os.kill(ranks_of_train()[-1].pid, signal.SIGTERM)

    with pytest.raises(PreemptedError) as caught:
        train(archive, tmp_path / "run", CONFIG, TWO_RANKS, on_record=ask_a_rank)
    assert 2 <= first < caught.value.step < 2 * NUM_EPOCHS
    result = train(archive, tmp_path / "run", CONFIG, TWO_RANKS)
    mine, reference = load_checkpoint(result.checkpoint), load_checkpoint(two_ranks[0].checkpoint)
    for name, weight in reference["model"].items():
        assert torch.equal(mine["model"][name], weight), name
    assert without_clock(result.metrics) == without_clock(two_ranks[0].metrics)
