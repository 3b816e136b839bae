"""A small archive of real digits, a model trained on it for a moment, and the command line in process."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest

from ats_stream.cli import main
from ats_stream.demo.digits import DigitsConfig, build_archive

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DIGITS = DigitsConfig(
    num_train=4,
    num_val=2,
    num_test=3,
    classes=(0, 1),
    num_matching=2,
    num_clutter=2,
    side_px=1024,
    view_downsample=32,
)
# what a quick training needs on these images
QUICK = ("--patches", "4", "--patch-px", "32", "--prior", "foreground", "--batch-size", "4", "--epochs", "2")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line on standard error."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("ats-stream")
        return lines[0]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def run(*words: object) -> Outcome:
        try:
            code = main([str(word) for word in words])
        except SystemExit as leaving:  # argparse
            code = int(leaving.code or 0)
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def table(digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive table of nine small images in two classes."""
    return build_archive(tmp_path_factory.mktemp("archive"), digits, DIGITS)


@pytest.fixture(scope="session")
def pyramid(table: Path) -> Path:
    return table.parent / "test" / "test-0000.ome.zarr"


@pytest.fixture(scope="session")
def trained(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert main(["train", str(table), "--out", str(folder), *QUICK]) == 0
    return folder
