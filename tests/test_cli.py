"""The command line as such: what it loads, its help, its exit codes. The commands: tests/commands."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import ats_stream
from ats_stream import cli
from ats_stream.errors import ClusterError, PreemptedError, SlideError
from ats_stream.models import ModelConfig

if TYPE_CHECKING:
    from pathlib import Path

HEAVY = ("ray", "torch", "zarr", "dask", "numpy", "tifffile", "openslide", "PIL")


def loaded_by(statement: str) -> str:
    program = f"import sys\n{statement}\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "statement",
    [
        "import ats_stream, ats_stream.errors",
        "from ats_stream.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from ats_stream.cli import main\ntry: main(['--version'])\nexcept SystemExit: pass",
        "from ats_stream.cli import main\ntry: main(['nonsense'])\nexcept SystemExit: pass",
    ],
)
def test_help_loads_nothing_heavy(statement: str) -> None:
    assert loaded_by(statement) == "[]"


@pytest.mark.parametrize("command", ["preprocess", "info"])
def test_commands_on_images_need_neither_ray_nor_torch(command: str) -> None:
    program = f"from ats_stream.cli import main\ntry: main(['{command}', '--help'])\nexcept SystemExit: pass"
    found = loaded_by(program)
    assert "'numpy'" in found or command in {"info", "plan", "verify", "doctor"}
    assert not any(f"'{name}'" in found for name in ("ray", "torch", "zarr", "dask"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"ats-stream {ats_stream.__version__}\n"


def test_help_names_every_command_and_each_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    overview = capsys.readouterr().out
    for command, summary in cli.COMMANDS.items():
        assert f"{command}" in overview
        assert summary in overview
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])
        text = capsys.readouterr().out
        assert f"ats-stream {command} " in text
        assert "--out" in text or command in {"info", "plan", "verify", "view", "doctor"}
    assert "75 resumable" in overview
    assert "130 interrupted" in overview


def test_without_a_command_the_help_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "ats-stream preprocess" in captured.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["--nonsense"], "the following arguments are required: COMMAND"),
        (["verify"], "the following arguments are required: TARGET"),
        (["info", "a", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["plan", "a", "--pixel-size", "1"], "unrecognized arguments: --pixel-size 1"),
        (["preprocess", "a.svs"], "the following arguments are required: --out"),
        (["preprocess", "a", "--out", "b", "--profile", "lzw"], "--profile: invalid choice: 'lzw'"),
        (["preprocess", "a", "--out", "b", "--skip-existing", "--overwrite"], "not allowed with argument"),
        (["train", "a.csv", "--out", "b", "--lr", "fast"], "--lr: invalid float value: 'fast'"),
        (["train", "a.csv", "--out", "b", "--epochs", "1.5"], "--epochs: invalid int value: '1.5'"),
    ],
)
def test_wrong_words_get_one_line_and_exit_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert "--help'" in captured.err


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def run(arguments: object) -> None:
        raise error

    monkeypatch.setattr("ats_stream.commands.info.run", run)
    return cli.main(["info", "a"])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (SlideError("a.svs", "cut off\nat byte 7"), 2, "error: a.svs: cut off at byte 7"),
        (ClusterError("no GPU"), 1, "error: no GPU"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a"), 1, "error: a: No space left on device"),
        (MemoryError("1 PiB"), 1, "error: out of memory: 1 PiB"),
        (PreemptedError("r", 2, 9), 75, str(PreemptedError("r", 2, 9))),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_one_line_and_a_code(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert raising(monkeypatch, error) == code
    assert capsys.readouterr() == ("", f"ats-stream: {line}\n")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="a bug"):
        raising(monkeypatch, ValueError("a bug"))


def test_a_field_out_of_range_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="num_classes") as caught:
        ModelConfig(num_classes=0)
    assert raising(monkeypatch, caught.value) == 2
    assert capsys.readouterr().err == "ats-stream: error: num_classes must be at least 1, got 0\n"


def test_ctrl_c_while_a_command_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupt)
    assert cli.main(["info", "a"]) == 130
    assert capsys.readouterr().err == "ats-stream: interrupted\n"


def test_a_reader_that_goes_away_is_no_error(pyramid_of_zeros: Path) -> None:
    words = [str(pyramid_of_zeros)] * 400  # more text than a pipe holds
    command = [sys.executable, "-m", "ats_stream.cli", "info", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.fixture
def pyramid_of_zeros(tmp_path: Path) -> Path:
    import numpy as np

    from ats_stream.io import write_pyramid

    write_pyramid(np.zeros((1, 8, 8), np.uint8), tmp_path / "a.ome.zarr")
    return tmp_path / "a.ome.zarr"


def test_a_job_ends_with_a_line_of_json(
    pyramid_of_zeros: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    Image.new("RGB", (40, 30), "white").save(tmp_path / "a.png")
    assert cli.run_job("preprocess", [str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {"pyramids": [str(tmp_path / "out" / "a.ome.zarr")], "failed": [], "skipped": []}


def test_a_job_of_which_nothing_worked_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "none.svs")
    assert cli.run_job("preprocess", [missing, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"ats-stream: failed: {missing}: no such file\n"
    assert json.loads(captured.out)["failed"] == [missing]


def test_a_submitted_job_must_not_write_into_the_copy_it_runs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "_ray_pkg_0123"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert cli.run_job("preprocess", ["a.svs", "--out", "out"]) == 2
    assert "give a job an absolute path" in capsys.readouterr().err
    assert list(folder.iterdir()) == []
