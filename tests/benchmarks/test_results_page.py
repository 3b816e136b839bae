"""The page of benchmarks: every stored result is on it, and no number that is not in one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import results_page

if TYPE_CHECKING:
    from pathlib import Path


def test_a_result_becomes_tables(tmp_path: Path) -> None:
    result = {
        "machine": {"processor": "X", "cores": 2, "versions": {"numpy": "2.4"}},
        "cases": [
            {
                "case": "one",
                "what": "of a kind",
                "contestants": [{"name": "a", "wall_ms": 1.23456, "memory": None}],
            },
            {"case": "two", "what": "|x|", "contestants": [{"name": "b", "wall_ms": 20000.4, "same": True}]},
        ],
        "targets": [{"what": "met", "holds": True}, {"what": "of another file", "holds": None}],
        "methods": {"fast": {"ms": {"read": 1, "copy": 2}}, "slow": {"ms": {"read": 3, "copy": 4}}},
    }
    (tmp_path / "new.json").write_text(json.dumps(result))
    lines = results_page.page(tmp_path).splitlines()
    assert "## new" in lines
    assert "*processor X, cores 2, numpy 2.4*" in lines
    at = lines.index("**one**: of a kind")
    assert lines[at + 2 : at + 5] == ["| name | wall ms |", "| --- | --- |", "| a | 1.235 |"]
    assert "**two**: /x/" in lines
    assert "| b | 20000 | yes |" in lines
    assert "| met | yes |" in lines
    assert not any("another file" in line for line in lines)
    assert "| name | ms read | ms copy |" in lines
    assert "| slow | 3 | 4 |" in lines


def test_trainings_are_told_by_what_they_reached(tmp_path: Path) -> None:
    (tmp_path / "trained").mkdir()
    run = {"scheme": "murthy", "curve": [{"accuracy": 0.1}, {"accuracy": 0.91234}]}
    (tmp_path / "trained" / "seed0.json").write_text(json.dumps(run))
    assert "| seed0 | murthy | 0.9123 |" in results_page.page(tmp_path)


def test_every_stored_result_is_on_the_page() -> None:
    page = results_page.page()
    for path in results_page.RESULTS.glob("*.json"):
        title = results_page.TITLES.get(path.stem, (path.stem, ""))[0]
        assert f"\n## {title}\n" in page
        assert "| ---" in page[page.index(f"## {title}") :].split("\n## ")[0], path.name
