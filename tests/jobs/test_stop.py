"""jobs/stop.py: it knows drivers and ranks by their command lines, asks them to stop, and waits."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = Path(__file__).resolve().parents[2] / "jobs" / "stop.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("stop", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("words", "is_training"),
    [
        ("python jobs/train.py a.csv --out b", True),
        ("/opt/venv/bin/python3.11 /opt/ats-stream/jobs/train.py a.csv", True),
        ("/opt/venv/bin/python /opt/venv/bin/ats-stream train a.csv", True),
        ("python -m ats_stream.cli train a.csv", True),
        ("ray::RayTrainWorker", True),
        ("ray::RayTrainWorker.poll_status", True),
        ("ray::SamplerActor.sample", False),
        ("ray::TrainController.run", False),
        ("python jobs/preprocess.py a.svs", False),
        ("python -m ats_stream.cli info train", False),
        ("python -m ats_stream.cli", False),
        ("/opt/venv/bin/python /opt/venv/bin/ats-stream predict train", False),
        ("python my/train.py jobs/train.py", False),
        ("sh -c python\\ jobs/train.py", False),
        ("vi jobs/train.py", False),
        ("python", False),
        ("", False),
    ],
)
def test_who_trains(script: Any, words: str, is_training: bool) -> None:
    assert script.is_training(words.replace("\\ ", "_").split()) is is_training


# says that it is ready, and goes when it is asked
OBEDIENT = """
import signal
def go(*_):
    print("asked", flush=True)
    raise SystemExit
signal.signal(signal.SIGTERM, go)
print("ready", flush=True)
signal.pause()
"""
STUBBORN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
while True:
    signal.pause()
"""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Any]:
    """Start a process that looks like a job; all of them are gone at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(text: str, name: str) -> subprocess.Popen[str]:
        file = tmp_path / "jobs" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        process = subprocess.Popen([sys.executable, str(file)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_it_asks_waits_and_tells(
    script: Any, job: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # only what this test has started is looked at, whatever else trains on this machine
    monkeypatch.setattr(psutil, "process_iter", lambda: psutil.Process().children())
    assert script.main([]) == 0
    assert capsys.readouterr().out == "0 training processes asked to stop, 0 of them still there\n"
    trainer, other = job(OBEDIENT, "train.py"), job(OBEDIENT, "predict.py")
    assert script.main(["--timeout-s", "60"]) == 0
    assert capsys.readouterr().out == "1 training processes asked to stop, 0 of them still there\n"
    assert trainer.stdout.read() == "asked\n"
    assert other.poll() is None
    deaf = job(STUBBORN, "train.py")
    assert script.main(["--timeout-s", "0.1"]) == 1
    assert capsys.readouterr().out == "1 training processes asked to stop, 1 of them still there\n"
    assert deaf.poll() is None


def test_a_process_that_ended_meanwhile_is_no_failure(script: Any, job: Any) -> None:
    process = job(OBEDIENT, "train.py")
    known = psutil.Process(process.pid)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert script.stop([known], 60) == []
