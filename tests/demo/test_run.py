"""The demo from end to end, with few images and in one process: what it prints and what it leaves."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from ats_stream.cli import main


@pytest.mark.slow
def test_the_demo_ends_in_a_line_of_json_and_a_report(
    slide_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["demo", "--out", str(out), "--slide", str(slide_path), "--executor", "serial"]
    if (
        "ATS_STREAM_TEST_DATA" in os.environ
    ):  # otherwise the digits come out of their wheel, as for a stranger
        words += ["--digits", str(Path(os.environ["ATS_STREAM_TEST_DATA"]) / "mnist")]
    assert main([*words, "--epochs", "1", "--train-images", "8", "--test-images", "4"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == {
        "accuracy",
        "control_low_resolution",
        "control_uniform",
        "peak_bytes",
        "seconds",
        "level0_share",
        "report",
    }
    assert all(0 <= result[name] <= 1 for name in ("accuracy", "control_low_resolution", "control_uniform"))
    assert 0 < result["level0_share"] < 0.01
    assert 100 << 20 < result["peak_bytes"] < 4 << 30
    page = Path(result["report"]).read_text()
    assert page.count("<img") >= 5  # four test images and the slide
    with (out / "predictions" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(list((out / "predictions" / "pictures").iterdir())) == 4
    share = sum(int(row["decoded_bytes"]) / int(row["full_bytes"]) for row in rows) / 4
    assert result["level0_share"] == pytest.approx(share, abs=1e-6)
    assert main([*words]) == 2  # the folder is there now
