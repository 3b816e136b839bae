"""``plan``: it says what a training takes, for people and for programs, and refuses what cannot be."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., Any]

SMALL = ("--patches", "4", "--patch-px", "32", "--prior", "foreground", "--batch-size", "4")


def test_a_plan_for_people(table: Path, run: Run) -> None:
    done = run("plan", table, *SMALL, "--nodes", "2", "--ranks", "4", "--samplers", "2", "--look-at", "2")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[:2] == [
        "4 images, 2 looked at; a step takes 4: 1 on each of 4 ranks",
        "on 2 nodes, with 8 samplers in all",
    ]
    assert [line for line in lines[2:] if not line.startswith(" ")][:3] == ["from storage", "memory", "speed"]
    assert "in turn" in done.out
    assert lines[-1].startswith("the limit: in turn, ")


def test_a_plan_for_programs(table: Path, run: Run) -> None:
    rates = ("--storage-mb-per-s", "0.001", "--sampler-s", "0.5", "--rank-s", "0.25", "--lag", "1")
    done = run("plan", table, *SMALL, *rates, "--json")
    assert (done.code, done.err) == (0, "")
    plan = json.loads(done.out)
    assert len(plan["looked_at"]) == 4
    assert plan["rates"] == {
        "storage_bytes_per_s": 1000.0,
        "link_bytes_per_s": 1.25e9,
        "sampler_s": 0.5,
        "rank_s": 0.25,
    }
    speeds = plan["images_per_s"]
    assert next(iter(speeds)) == "storage"
    assert (speeds["samplers"], speeds["ranks"]) == (4.0, 8.0)
    assert plan["sizes"]["step_bytes_later"] == pytest.approx(4 * 1000 / speeds["storage"])
    assert plan["sizes"]["item_bytes"] == 32 * 32 * 4 + 4 * 3 * 32 * 32 + 4 * 16


def test_a_gpu_that_is_not_here_is_not_guessed(table: Path, run: Run) -> None:
    done = run("plan", table, *SMALL, "--gpu", "--window", "99999")
    assert "ranks          not known: give --rank-s" in done.out
    assert "on its GPU" in done.out
    assert done.out.splitlines()[-1].endswith("give --object-store-bytes")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--nodes", "0"), "--nodes must be positive, got 0"),
        (("--storage-mb-per-s", "nan"), "--storage-mb-per-s must be positive, got nan"),
        (("--ranks", "3"), "batch_size 4 does not split evenly over 3 ranks"),
        (("--prior", "tissue"), "no label 'tissue' to draw within"),
        (("--patches", "0"), "--patches must be at least 1, got 0"),
    ],
)
def test_plans_that_cannot_be(table: Path, run: Run, words: tuple[str, ...], said: str) -> None:
    failed = run("plan", table, *SMALL, *words)
    assert (failed.code, failed.out) == (2, "")
    assert said in failed.complaint
