"""Probes run in another process: what a broken package does there, and what is told of it."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import pytest

from ats_stream.doctor import probe
from ats_stream.doctor.ask import Answer, ask

if TYPE_CHECKING:
    from pathlib import Path

BROKEN = {
    "raises": "raise RuntimeError('half\\ninstalled')",
    "leaves": "raise SystemExit(7)",
    "dies": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "ends": "import os; os._exit(3)",
    "talks": "print('{\"end\": \"talks\"}'); import os; os.write(1, b'noise')",
}


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in BROKEN.items():
        (tmp_path / f"{name}.py").write_text(source)
    inherited = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{inherited}")


@pytest.mark.usefixtures("broken")
def test_broken_packages_are_told_apart_and_hide_nothing_behind_them() -> None:
    answers = ask(["raises", "dies", "talks", "ends", "json", "leaves", "not_there"])
    assert {name: answer.error for name, answer in answers.items()} == {
        "raises": "RuntimeError: half installed",
        "dies": "ends Python by SIGSEGV",
        "talks": "",
        "ends": "ends Python with exit code 3",
        "json": "",
        "leaves": "SystemExit: 7",
        "not_there": "ModuleNotFoundError: No module named 'not_there'",
    }
    assert not {*BROKEN} & {*sys.modules}


def test_what_does_not_come_back_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "waits.py").write_text("import threading; threading.Event().wait()")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert ask(["waits"], timeout_s=2) == {"waits": Answer(error="did not come back within 2 s")}


def test_every_codec_that_slides_need_works_here() -> None:
    assert probe.codecs() == {"works": list(probe.CODECS), "fails": []}


def test_a_codec_that_gives_other_pixels_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import imagecodecs

    monkeypatch.setattr(imagecodecs, "zstd_decode", lambda coded: b"other")
    monkeypatch.setattr(imagecodecs, "webp_encode", lambda *args, **options: 1 // 0)
    assert probe.codecs()["fails"] == ["webp", "zstd"]


@pytest.mark.parametrize("name", ["gpu", "openslide-library", "video", "object-stores"])
def test_facts_can_be_sent(name: str) -> None:
    facts = probe.PROBES[name]()
    assert json.loads(json.dumps(facts)) == facts
    assert facts
