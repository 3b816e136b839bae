"""Training and prediction of what is not one class, from a Parquet table with groups, on the command line."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.parquet
import pytest

from ats_stream.io import read_archive

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., Any]

LABELS = {"multilabel": ["x", "x;y", "y"], "regression": ["0.5", "1.5", "-1"], "survival": ["1", "0", "1"]}
SCORES = {"multilabel": "auroc", "regression": "loss", "survival": "concordance"}


@pytest.mark.parametrize("task", LABELS)
def test_other_tasks_train_and_predict(task: str, table: Path, tmp_path: Path, run: Run) -> None:
    slides = [row.slide for row in read_archive(table)][:6]
    columns = {
        "slide": slides,
        "label": [LABELS[task][n % 3] for n in range(6)],
        "split": ["train"] * 6,
        "group": [f"p{n // 2}" for n in range(6)],
        "time": [1.0 + n for n in range(6)],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    (tmp_path / "c.yaml").write_text(
        "sampler: {num_patches: 4, patch_px: 32, prior_label: foreground}\n"
        "trainer: {num_epochs: 2, batch_size: 2, lr: 1e-3, average_decay: 0.5}\n"
    )
    done = run(
        *("train", tmp_path / "t.parquet", "--out", tmp_path / "run", "--task", task),
        *("--config", tmp_path / "c.yaml", "--folds", "3", "--fold", "1"),
    )
    assert (done.code, done.err) == (0, "")
    assert "training on 4 images of split 'train', validation on 2 of 'val'" in done.out
    assert f"validation {SCORES[task]} " in done.out
    done = run("predict", tmp_path / "run", tmp_path / "t.parquet", "--out", tmp_path / "found")
    assert (done.code, done.err) == (0, "")
    with (tmp_path / "found" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    if task == "multilabel":
        for row in rows:
            wanted = ";".join(name for name in "xy" if float(row[f"p_{name}"]) > 0.5)
            assert row["predicted"] == wanted
    else:
        name = {"regression": "value", "survival": "log hazard ratio"}[task]
        assert all(float(row["predicted"]) == pytest.approx(float(row[name]), abs=1e-5) for row in rows)


def test_folds_need_both_numbers(table: Path, tmp_path: Path, run: Run) -> None:
    done = run("train", table, "--out", tmp_path / "run", "--folds", "3")
    assert done.code == 2
    assert done.err == "ats-stream: error: --folds and --fold go together\n"
