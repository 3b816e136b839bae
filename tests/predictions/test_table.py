"""Tables of predictions: what is written is what is read, equal records give equal bytes."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

import pyarrow
import pyarrow.parquet
import pytest
from samples import bad_record, info, record

from ats_stream.errors import InputError
from ats_stream.predictions import table
from ats_stream.predictions.record import Patches, SlideRecord
from ats_stream.predictions.table import read_parquet, write_csv, write_parquet

if TYPE_CHECKING:
    from pathlib import Path

RECORDS = [record(0), bad_record(1), record(2, time=12.5, right=None, pixel_size_um=None)]


@pytest.mark.parametrize("one", RECORDS)
def test_json_gives_the_record_back(one: SlideRecord) -> None:
    assert SlideRecord.from_json(one.to_json()) == one


@pytest.mark.parametrize("rows_per_group", [1, 2, 1024])
def test_parquet_gives_the_records_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_group: int
) -> None:
    monkeypatch.setattr(table, "ROWS_PER_GROUP", rows_per_group)
    place = write_parquet(tmp_path / "t.parquet", info(), RECORDS)
    assert read_parquet(place) == (info(), RECORDS)
    without = [SlideRecord(**{**vars(one), "patches": Patches()}) for one in RECORDS]
    assert read_parquet(place, patches=False) == (info(), without)
    assert write_parquet(tmp_path / "u.parquet", info(), iter(RECORDS)).read_bytes() == place.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"t.parquet", "u.parquet"}


def test_columns_are_what_other_programs_expect(tmp_path: Path) -> None:
    rows = pyarrow.parquet.read_table(write_parquet(tmp_path / "t.parquet", info(), RECORDS))
    assert {"p_normal", "p_tumor", "se_tumor", "patch_y", "patch_attention", "error"} <= set(
        rows.column_names
    )
    assert rows.schema.field("patch_weight").type == pyarrow.list_(pyarrow.float32())
    assert rows["p_tumor"].to_pylist()[1] is None
    assert rows["error"].to_pylist() == ["", "truncated", ""]
    assert rows["patch_x"].to_pylist()[0] == list(RECORDS[0].patches.x)


def test_csv_has_a_line_for_each_slide(tmp_path: Path) -> None:
    with write_csv(tmp_path / "t.csv", info(), RECORDS).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["s0", "bad1", "s2"]
    assert rows[0]["p_tumor"] == f"{RECORDS[0].value_K[1]:.6f}"
    assert rows[0]["se_tumor"] == "0.010000"
    assert (rows[1]["p_tumor"], rows[1]["error"]) == ("", "truncated")
    assert rows[0]["num_patches"] == "6"


def test_one_draw_has_no_column_of_errors(tmp_path: Path) -> None:
    once = [record(0, standard_error_K=())]
    text = write_csv(tmp_path / "t.csv", info(num_draws=1), once).read_text()
    assert "se_" not in text
    place = write_parquet(tmp_path / "t.parquet", info(num_draws=1), once)
    assert read_parquet(place)[1] == once


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.parquet: no such file"):
        read_parquet(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("no table at all")
    with pytest.raises(InputError, match=r"text\.parquet: cannot read it"):
        read_parquet(tmp_path / "text.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match=r"other\.parquet: no table of predictions"):
        read_parquet(tmp_path / "other.parquet")
