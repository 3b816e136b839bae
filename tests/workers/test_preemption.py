"""SIGTERM: a run may be stopped at any question, by a real signal too, and goes on without a bit changed."""

from __future__ import annotations

import itertools
import pickle
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import make_job, run_config, without_clock

from ats_stream import cli
from ats_stream.errors import EXIT_RESUMABLE, PreemptedError
from ats_stream.workers import train
from ats_stream.workers.checkpoint import find_checkpoint, load_checkpoint
from ats_stream.workers.executors import make_executor
from ats_stream.workers.metrics import read_metrics
from ats_stream.workers.preemption import StopRequest, keep_sigterm
from ats_stream.workers.ranks import Alone
from ats_stream.workers.trainer import RankTrainer, train_rank

if TYPE_CHECKING:
    from pathlib import Path

    from ats_stream.io import Archive

# 4 steps an epoch, the last one filled up, and 2 of validation; a checkpoint every 3 falls in mid-epoch too
CONFIG = run_config(num_epochs=3, batch_size=2, lag=2, publish_interval=2, checkpoint_interval=3)


@pytest.fixture
def handler() -> Any:
    """A handler of SIGTERM of our own, which must be there again at the end; ignores the signal."""

    def ignore(_number: int, _frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, ignore)
    yield ignore
    after = signal.signal(signal.SIGTERM, before)
    assert after is ignore


def test_a_signal_only_sets_the_mark(handler: Any) -> None:
    stop = StopRequest()
    assert not stop.asked
    with stop.on_sigterm():
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked


def test_other_threads_leave_the_signal_alone(handler: Any) -> None:
    seen: list[Any] = []

    def elsewhere() -> None:
        with StopRequest().on_sigterm(), keep_sigterm():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [handler]


def test_what_others_set_is_replaced_only_where_there_was_a_handler(handler: Any) -> None:
    with keep_sigterm():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is handler
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with keep_sigterm():
        signal.signal(signal.SIGTERM, handler)
    assert signal.getsignal(signal.SIGTERM) is handler


class StopsAt(Alone):
    """Asked to stop at one question, counted from 0; None for never."""

    def __init__(self, question: int | None) -> None:
        super().__init__()
        self.question, self.asked = question, 0

    def must_stop(self) -> bool:
        self.asked += 1
        return self.asked - 1 == self.question


@pytest.fixture(scope="module")
def whole(archive: Archive, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """An undisturbed run, and how often it asked."""
    run = tmp_path_factory.mktemp("whole") / "run"
    ranks = StopsAt(None)
    train_rank(make_job(archive, run, CONFIG), ranks)
    return run, ranks.asked


def assert_same_run(run: Path, whole: Path) -> None:
    mine, wanted = load_checkpoint(find_checkpoint(run)), load_checkpoint(find_checkpoint(whole))
    assert mine["step"] == wanted["step"]
    for part in ("model", "versions"):
        flat, reference = dict(_leaves(mine[part])), dict(_leaves(wanted[part]))
        assert flat.keys() == reference.keys()
        assert all(torch.equal(flat[name], reference[name]) for name in reference)
    assert without_clock(read_metrics(run)) == without_clock(read_metrics(whole))


def _leaves(tree: dict[Any, Any], path: tuple[Any, ...] = ()) -> Any:
    for name, value in tree.items():
        yield from _leaves(value, (*path, name)) if isinstance(value, dict) else [((*path, name), value)]


@pytest.mark.slow
def test_a_stop_at_any_question_changes_no_bit(
    archive: Archive, whole: tuple[Path, int], tmp_path: Path
) -> None:
    reference, num_questions = whole
    assert num_questions == 12 + 3 * 2  # before each step of training and of validation
    stopped_at = []
    for question in range(num_questions):
        job = make_job(archive, tmp_path / str(question), CONFIG)
        with pytest.raises(PreemptedError) as caught:
            train_rank(job, StopsAt(question))
        stopped_at.append(caught.value.step)
        assert caught.value.num_steps == 12
        if caught.value.step:  # all that was done is saved; at step 0 there is nothing to save
            assert find_checkpoint(job.run_dir).name == f"step-{caught.value.step:08d}.pt"
        train_rank(job, Alone())
        assert_same_run(tmp_path / str(question), reference)
    # an epoch has 4 steps, then validates; a stop inside the validation is after the epoch's last step
    assert stopped_at == [0, 1, 2, 3, 4, 4, 4, 5, 6, 7, 8, 8, 8, 9, 10, 11, 12, 12]


def test_a_run_that_is_stopped_again_and_again_ends_all_the_same(
    archive: Archive, whole: tuple[Path, int], tmp_path: Path
) -> None:
    job = make_job(archive, tmp_path / "run", CONFIG)
    for stops in itertools.count():
        try:
            # the third question: two steps further, or out of a validation that must begin anew
            train_rank(job, StopsAt(2))
        except PreemptedError:
            assert stops < 20
        else:
            break
    assert stops >= 6
    assert_same_run(tmp_path / "run", whole[0])


def test_ranks_without_sums_of_their_own_take_part_in_an_open_epoch(archive: Archive, tmp_path: Path) -> None:
    job = make_job(archive, tmp_path / "run", CONFIG)
    with pytest.raises(PreemptedError):
        train_rank(job, StopsAt(5))  # in the first validation

    class Second(Alone):
        rank = 1
        world_size = 2

        def __init__(self) -> None:
            super().__init__()
            self.totals: list[list[float]] = []

        def total(self, values: torch.Tensor) -> torch.Tensor:
            self.totals.append(values.tolist())
            return values + 1

    sums = []
    for ranks in (Alone(), Second()):
        executor = make_executor("serial", job.slides, job.labels, job.config.model, job.config.sampler)
        trainer = RankTrainer(job, ranks, executor)
        trainer.resume()
        assert trainer._epoch_is_open
        sums.append(trainer.totals.over(ranks))
    assert sums[0].keys() == sums[1].keys()
    assert sums[0]["images"] == 7
    assert sums[1]["images"] == 1  # what the others said, and nothing of its own
    state = load_checkpoint(find_checkpoint(job.run_dir))
    assert state["totals"].keys() == sums[0].keys()


def test_a_stop_that_comes_after_the_last_step_changes_nothing(
    archive: Archive, whole: tuple[Path, int], tmp_path: Path
) -> None:
    stop = StopRequest()
    result = train(
        archive,
        tmp_path / "run",
        CONFIG,
        on_record=lambda record: stop.ask() if record["step"] == 12 else None,
        stop=stop,
    )
    assert stop.asked
    assert_same_run(result.run_dir, whole[0])


@pytest.mark.slow
def test_sigterm_to_the_command_saves_and_exits_75(
    archive: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("--patches", "4", "--patch-px", "48", "--batch-size", "1", "--epochs", "6", "--lag", "1")

    def words(out: str) -> list[str]:
        return ["train", str(archive.path), "--out", str(tmp_path / out), *settings]

    command = [sys.executable, "-m", "ats_stream.cli", *words("stopped")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch   2/"):
                break
        process.send_signal(signal.SIGTERM)
        _, complaint = process.communicate(timeout=120)
    step = load_checkpoint(find_checkpoint(tmp_path / "stopped"))["step"]
    assert 2 * 7 <= step < 6 * 7
    assert process.returncode == EXIT_RESUMABLE == 75
    assert complaint == (
        f"ats-stream: {tmp_path / 'stopped'}: stopped by SIGTERM after step {step} of 42; "
        "the same command goes on from there\n"
    )
    assert cli.main(words("stopped")) == 0
    assert f"going on from {tmp_path / 'stopped'}" in capsys.readouterr().out
    assert cli.main(words("whole")) == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_the_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(PreemptedError("runs/a", 3, 9)))
    assert (str(error), error.exit_code) == (str(PreemptedError("runs/a", 3, 9)), 75)
    assert error.args == ("runs/a", 3, 9)
