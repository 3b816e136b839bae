"""Loggers: each record once, in order, over any number of runs; whatever goes wrong stops no training."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from fake_trackers import make_mlflow, make_wandb
from tiny import run_config

from ats_stream.errors import InputError, PreemptedError
from ats_stream.workers import ClusterConfig, train
from ats_stream.workers.logger_clients import LOGGERS, MlflowLogger, WandbLogger
from ats_stream.workers.loggers import NOTES_FOLDER, Loggers, make_loggers

if TYPE_CHECKING:
    from pathlib import Path

    from ats_stream.io import Archive

CONFIG = run_config(num_epochs=2).to_dict()


def record(step: int, phase: str = "train", **numbers: Any) -> dict[str, Any]:
    return {"phase": phase, "step": step, "loss": 1.0 / step, **numbers}


class Recorder:
    """Remembers what it was told; fails at the call that is named."""

    module = "json"

    def __init__(self, fails: str = "", error: Exception | None = None) -> None:
        self.told: list[Any] = []
        self._fails, self._error = fails, error or OSError("no such host")

    def _tell(self, call: str, *what: Any) -> None:
        if call == self._fails:
            raise self._error
        self.told.append((call, *what))

    def open(self, run_dir: Path, config: Any, run_id: str | None) -> str:
        self._tell("open", run_id)
        return run_id or "new"

    def log(self, record: Any) -> None:
        self._tell("log", record["step"], record["phase"])

    def close(self, *, succeeded: bool) -> None:
        self._tell("close", succeeded)


def send(logger: Any, run_dir: Path, records: list[Any], earlier: list[Any] = []) -> list[str]:  # noqa: B006
    """Send records as a run does; what was complained of."""
    said: list[str] = []
    with Loggers({"it": logger}, run_dir, CONFIG, earlier, on_problem=said.append) as loggers:
        for one in records:
            loggers.on_record(one)
    return said


def test_records_are_sent_once_and_in_order_over_a_resume(tmp_path: Path) -> None:
    first = Recorder()
    assert send(first, tmp_path, [record(2), record(2, "val"), record(4)]) == []
    sent = [("log", 2, "train"), ("log", 2, "val"), ("log", 4, "train")]
    assert first.told == [("open", None), *sent, ("close", True)]
    # back at step 2: what is made again is not sent again
    second = Recorder()
    remade = [record(4), record(4, "val"), record(6)]
    assert send(second, tmp_path, remade, earlier=[record(2), record(2, "val")]) == []
    assert second.told == [("open", "new"), ("log", 4, "val"), ("log", 6, "train"), ("close", True)]
    # a run that was done before is not touched
    third = Recorder()
    assert send(third, tmp_path, [], earlier=[record(6)]) == []
    assert third.told == []


def test_other_records_stay_in_the_run_folder(tmp_path: Path) -> None:
    logger = Recorder()
    assert send(logger, tmp_path, [{"phase": "skipped", "step": 1, "slide": "a.svs"}, record(2)]) == []
    assert logger.told == [("open", None), ("log", 2, "train"), ("close", True)]


@pytest.mark.parametrize("call", ["open", "log", "close"])
def test_a_failure_is_told_once_and_the_next_run_makes_up_for_it(tmp_path: Path, call: str) -> None:
    error = OSError("cannot reach http://me:secret@host:1/api")
    records = [record(2), record(4), record(6)]
    (line,) = send(Recorder(call, error), tmp_path, records)
    assert line.startswith("it: logging stopped (OSError: cannot reach http://host:1/api); training goes on")
    again = Recorder()
    assert send(again, tmp_path, [], earlier=records) == []
    wanted = {"open": [None, 2, 4, 6], "log": ["new", 2, 4, 6], "close": []}[call]
    assert [told[1] for told in again.told[:-1]] == wanted


def test_keys_are_never_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "abc123")
    (line,) = send(Recorder("open", ValueError("bad key abc123\nsee docs")), tmp_path, [])
    assert "ValueError: bad key ... see docs" in line


def test_a_logger_that_hangs_holds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ats_stream.workers.loggers.CLOSE_TIMEOUT_S", 0.01)
    let_go = threading.Event()

    class Hanging(Recorder):
        def log(self, record: Any) -> None:
            let_go.wait()

    assert send(Hanging(), tmp_path, [record(2)]) == [
        "it: did not end within 0.01 s; some numbers may be missing there"
    ]
    let_go.set()


def test_a_run_that_is_stopped_is_said_to_be(tmp_path: Path) -> None:
    logger = Recorder()
    with pytest.raises(PreemptedError), Loggers({"it": logger}, tmp_path, CONFIG, []):
        raise PreemptedError("run", 1, 2)
    assert logger.told[-1] == ("close", False)


def test_what_is_missing_is_told_before_anything_starts(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in LOGGERS:
        with pytest.raises(InputError) as caught:
            train(archive, tmp_path / "run", run_config(), ClusterConfig(loggers=(name,)))
        assert str(caught.value) == (
            f"--logger {name} needs the package {name}: pip install 'ats-stream[{name}]'"
        )
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match="needs MLFLOW_TRACKING_URI"):
        MlflowLogger()
    with pytest.raises(ValueError, match="loggers must be among mlflow, wandb, got 'tensorbord'"):
        ClusterConfig(loggers=("tensorbord",))


def test_a_training_sends_its_records_and_goes_on_without_its_logger(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    good, bad = Recorder(), Recorder("log")
    monkeypatch.setitem(LOGGERS, "mlflow", _made(good))
    monkeypatch.setitem(LOGGERS, "wandb", _made(bad))
    cluster = ClusterConfig(loggers=("mlflow", "wandb", "mlflow"))
    result = train(archive, tmp_path / "run", run_config(num_epochs=2), cluster)
    phases = [("log", 2, "train"), ("log", 2, "val"), ("log", 4, "train"), ("log", 4, "val")]
    assert good.told == [("open", None), *phases, ("close", True)]
    assert [(r["step"], r["phase"]) for r in result.metrics] == [told[1:] for told in phases]
    assert capfd.readouterr().err.count("wandb: logging stopped (OSError: no such host)") == 1


def _made(logger: Recorder) -> Any:
    def make() -> Recorder:
        return logger

    make.module = "json"  # type: ignore[attr-defined]
    return make


@pytest.fixture(params=["fake", "real"])
def mlflow(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow with an empty store: a stand-in, and, where it is installed, the package."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    if request.param == "real":
        return pytest.importorskip("mlflow")
    for name, module in make_mlflow().items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    return sys.modules["mlflow"]


@pytest.mark.filterwarnings("default")  # of what MLflow imports
def test_mlflow_gets_parameters_and_numbers(mlflow: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert send(*_sent(make_loggers(["mlflow"])["mlflow"], run_dir)) == []
    run_id = json.loads((run_dir / NOTES_FOLDER / "it.json").read_text())["id"]
    client = mlflow.MlflowClient()
    assert client.get_run(run_id).info.status == "FINISHED"
    assert send(MlflowLogger(), run_dir, [record(4, "train"), record(6, "train")]) == []
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["trainer.num_epochs"] == "2"
    assert run.data.params["classes"] == "['0', '1']"
    history = client.get_metric_history(run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(2, 1 / 2), (4, 1 / 4), (6, 1 / 6)]
    assert [m.value for m in client.get_metric_history(run_id, "val/auroc")] == [0.75]


def _sent(logger: Any, run_dir: Path) -> tuple[Any, Path, list[Any]]:
    return logger, run_dir, [record(2), record(2, "val", auroc=0.75), record(4)]


def test_wandb_gets_the_configuration_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb: Any = make_wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert send(*_sent(WandbLogger(), tmp_path / "run")) == []
    assert send(WandbLogger(), tmp_path / "run", [record(6)]) == []
    first, second = wandb.runs
    assert (first.name, first.project, first.dir, first.config) == (
        "run", "ats-stream", str(tmp_path / "run"), CONFIG,
    )  # fmt: skip
    assert first.logged[1] == (2, {"val/loss": 0.5, "val/auroc": 0.75})
    assert (second.id, second.logged, second.exit_code) == (first.id, [(6, {"train/loss": 1 / 6})], 0)


def test_wandb_that_does_not_know_the_user_is_told_and_asks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", make_wandb(is_logged_in=False))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (line,) = send(*_sent(WandbLogger(), tmp_path / "run"))
    assert "not logged in: 'wandb login', WANDB_API_KEY, or WANDB_MODE=offline" in line
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert send(*_sent(WandbLogger(), tmp_path / "run")) == []


@pytest.mark.filterwarnings("default")  # of what W&B imports
def test_the_package_of_wandb_writes_offline_what_is_asked_and_no_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--storage-options", "secret=hunter2"])
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert send(*_sent(WandbLogger(), run_dir)) == []
    assert send(WandbLogger(), run_dir, [record(6)]) == []
    run_id = json.loads((run_dir / NOTES_FOLDER / "it.json").read_text())["id"]
    written = [p for p in run_dir.rglob("*") if p.is_file()]
    assert sum(p.name == f"run-{run_id}.wandb" for p in written) == 2
    content = b"".join(p.read_bytes() for p in written)
    assert b"train/loss" in content
    assert b"hunter2" not in content
