"""The three jobs as a user submits them, with ``ray job submit`` to a cluster of this machine."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from ats_stream.demo.digits import DigitsConfig, build_archive
from ats_stream.io import open_pyramid
from ats_stream.workers.checkpoint import latest_step
from ats_stream.workers.ledger import read_ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).absolute().with_name("ray")
START_TIMEOUT_S = 120
START_TRIES = 3
JOB_TIMEOUT_S = 240
DIGITS = DigitsConfig(
    num_train=4, num_val=2, num_test=2, classes=(0, 1), num_matching=2, num_clutter=2, side_px=1024
)


class Done(NamedTuple):
    code: int
    lines: list[str]
    """Output of the job, without what ``ray job submit`` adds."""


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray cluster of its own on free ports, with 4 CPU slots; gives the address for jobs."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short: socket paths hold at most 107 characters
    try:
        for _ in range(START_TRIES):
            head, url = start_head(folder)
            try:
                if takes_jobs(url, head):
                    yield url
                    return
            finally:
                end(head)
        raise AssertionError(f"the cluster did not start:\n{Path(folder, 'head.log').read_text()}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def start_head(folder: str) -> tuple[subprocess.Popen[bytes], str]:
    """The processes of a head node, and its address for jobs."""
    port, dashboard, agent, metrics, client = free_ports(5)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        "PATH": f"{RAY.parent}:{os.environ['PATH']}",
    }
    options = {
        "node-ip-address": "127.0.0.1",
        "port": port,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "metrics-export-port": metrics,
        "ray-client-server-port": client,
        "num-cpus": 4,
        "object-store-memory": 100 << 20,  # 100 MiB
        "temp-dir": folder,
    }
    command = [str(RAY), "start", "--head", "--block", "--include-dashboard=true"]
    with Path(folder, "head.log").open("a") as log:
        head = subprocess.Popen(
            command + [f"--{name}={value}" for name, value in options.items()],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all its processes, and no others, can be ended together
        )
    return head, f"http://127.0.0.1:{dashboard}"


def takes_jobs(url: str, head: subprocess.Popen[bytes]) -> bool:
    """Wait until a job that does nothing was done; False if the node ends instead, as on a busy machine."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    deadline_s = time.monotonic() + START_TIMEOUT_S
    name = None
    while head.poll() is None and time.monotonic() < deadline_s:
        try:
            client = JobSubmissionClient(url)
            name = name or client.submit_job(entrypoint="true")
            if client.get_job_status(name) == JobStatus.SUCCEEDED:
                return True
        except Exception:  # what is not up yet fails in many ways
            name = None
        time.sleep(0.5)
    return False


def end(head: subprocess.Popen[bytes]) -> None:
    """End the cluster's processes and no others: its session's, and its children in others."""
    import psutil

    def is_ours(process: psutil.Process) -> bool:
        try:
            return os.getsid(process.pid) == head.pid
        except ProcessLookupError:
            return False

    ours = [process for process in psutil.process_iter() if is_ours(process)]
    ours += psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    for process in set(ours):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    head.wait(timeout=30)
    psutil.wait_procs(ours, timeout=30)


@pytest.fixture
def submit(address: str) -> Callable[..., Done]:
    from ray.job_submission import JobSubmissionClient

    def submit(*words: object) -> Done:
        name = f"{Path(str(words[0])).stem}-{time.monotonic_ns()}"
        command = [RAY, "job", "submit", "--address", address, "--submission-id", name, "--working-dir", "."]
        done = subprocess.run(
            [*map(str, command), "--", "python", *map(str, words)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=JOB_TIMEOUT_S,
        )
        assert name in done.stdout, done.stdout + done.stderr
        return Done(done.returncode, JobSubmissionClient(address).get_job_logs(name).splitlines())

    return submit


def result(done: Done) -> dict[str, Any]:
    assert done.code == 0, "\n".join(done.lines)
    found: dict[str, Any] = json.loads(done.lines[-1])
    return found


def test_preprocess(submit: Callable[..., Done], slide_path: Path, tmp_path: Path) -> None:
    (target,) = result(submit("jobs/preprocess.py", slide_path, "--out", tmp_path))["pyramids"]
    assert open_pyramid(target).levels[0].shape == (3, 2967, 2220)


def test_train_and_predict(submit: Callable[..., Done], digits: Any, tmp_path: Path) -> None:
    table = build_archive(tmp_path / "archive", digits, DIGITS)
    quick = ("--patches", "4", "--patch-px", "32", "--prior", "foreground", "--batch-size", "4")
    trained = result(
        submit("jobs/train.py", table, "--out", tmp_path / "run", "--ranks", "2", "--epochs", "2", *quick)
    )
    assert Path(trained["checkpoint"]).is_file()
    assert 0 <= trained["val_accuracy"] <= 1

    words = (trained["run"], table, "--split", "test", "--out", tmp_path / "found")
    found = result(submit("jobs/predict.py", *words))
    with Path(found["table"]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert all(abs(float(row["p_0"]) + float(row["p_1"]) - 1) < 1e-5 for row in rows)


@pytest.mark.timeout(900)
@pytest.mark.torture
def test_a_job_that_is_stopped_goes_on_when_it_is_submitted_again(
    address: str, submit: Callable[..., Done], digits: Any, tmp_path: Path
) -> None:
    from ray.job_submission import JobStatus, JobSubmissionClient

    table, run = build_archive(tmp_path / "archive", digits, DIGITS), tmp_path / "run"
    quick = ("--patches", "4", "--patch-px", "32", "--prior", "foreground", "--batch-size", "4")
    words = ("jobs/train.py", table, "--out", run, "--ranks", "2", "--epochs", "20", *quick)
    client = JobSubmissionClient(address)
    name = client.submit_job(
        entrypoint=shlex.join(["python", *map(str, words)]), runtime_env={"working_dir": str(ROOT)}
    )
    wait_until(lambda: latest_step(run) > 0 or client.get_job_status(name).is_terminal())
    client.stop_job(name)  # SIGTERM, and SIGKILL to what is there 3 s later
    wait_until(lambda: client.get_job_status(name).is_terminal())
    assert client.get_job_status(name) == JobStatus.STOPPED, client.get_job_logs(name)
    first = latest_step(run)
    assert 0 < first < 20

    done = submit(*words)
    result(done)
    assert f"going on from {run}/checkpoints/step-{first:08d}.pt" in done.lines
    visits = [(r.step, r.image) for r in read_ledger(run)]
    assert sorted(visits) == [(step, image) for step in range(20) for image in range(4)]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + JOB_TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def test_a_job_with_wrong_input_fails_with_one_line(submit: Callable[..., Done], tmp_path: Path) -> None:
    done = submit("jobs/train.py", tmp_path / "none.csv", "--out", tmp_path / "run")
    assert done.code == 1  # all that ``ray job submit`` knows
    assert done.lines[-1] == f"ats-stream: error: {tmp_path / 'none.csv'}: no such file"
    assert not any("Traceback" in line for line in done.lines)
