"""What answers of probes mean, and one whole examination."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ats_stream import cli
from ats_stream.doctor import Finding, State
from ats_stream.doctor.ask import Answer
from ats_stream.doctor.examination import codecs, devices, stores

H100 = {"name": "H100", "memory_bytes": 80 << 30, "adds": True}


def said(built_for: str | None, found: list[dict[str, Any]], cupy: Answer | None = None) -> list[Finding]:
    answers = {"gpu": Answer({"built_for": built_for, "devices": found})}
    return list(devices(answers if cupy is None else {**answers, "cupy-device": cupy}))


def cupy(runtime: int | None) -> Answer:
    return Answer({"version": "14.2.0", "available": runtime is not None, "runtime": runtime})


@pytest.mark.parametrize(
    ("found", "states", "words"),
    [
        (said(None, []), ["note"], "CPU alone"),
        (said("13.0", []), ["note"], "sees no device"),
        (said("13.0", [H100]), ["ok", "bad"], "ats-stream[cuda13]"),
        (said("12.8", [H100]), ["ok", "bad"], "ats-stream[cuda12]"),
        (said("13.0", [H100, H100], cupy(13000)), ["ok", "ok", "ok"], "80 GiB"),
        (said("13.0", [H100], cupy(12090)), ["ok", "bad"], "14.2.0 for CUDA 12, torch is for CUDA 13.0"),
        (said("13.0", [H100], cupy(None)), ["ok", "bad"], "sees no device although torch does"),
        (said("13.0", [H100], Answer(error="ImportError: libcuda")), ["ok", "bad"], "ImportError: libcuda"),
        (said("13.0", [{**H100, "adds": False}], cupy(13000)), ["bad", "ok"], "a sum on it came out wrong"),
    ],
)
def test_devices(found: list[Finding], states: list[str], words: str) -> None:
    assert [finding.state.value for finding in found] == states
    assert words in "\n".join(map(str, found))
    for finding in found:
        assert bool(finding.advice) == (finding.state != State.OK)


def test_a_torch_that_cannot_be_imported_is_no_gpu() -> None:
    (finding,) = devices({"gpu": Answer(error="ends Python by SIGILL")})
    assert (finding.state, finding.said) == (State.BAD, "ends Python by SIGILL")


def test_codecs_and_stores() -> None:
    assert codecs(Answer({"works": ["png"], "fails": []})).state == State.OK
    assert "webp cannot write and read" in codecs(Answer({"works": [], "fails": ["webp"]})).said
    assert codecs(Answer(error="no")).state == State.BAD
    assert stores(Answer({"schemes": ["s3"]}), []).said == "s3; no credentials in the environment"
    assert stores(Answer({"schemes": ["s3"]}), ["AWS_PROFILE"]).said == "s3; credentials by AWS_PROFILE"


FACTS: dict[str, dict[str, Any]] = {
    "gpu": {"built_for": "13.0", "devices": [H100]},
    "cupy-device": {"version": "14.2.0", "available": True, "runtime": 13000},
    "codecs": {"works": ["jpeg8"], "fails": []},
    "openslide-library": {"version": "4.0.1"},
    "video": {"decoders": ["h264"]},
    "object-stores": {"schemes": ["s3"]},
}


def test_all_is_asked_at_once_and_no_secret_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the probes themselves: test_probe.py, and tests/test_packaging.py in an environment with the wheel
    asked: list[str] = []

    def ask(words: list[str]) -> dict[str, Answer]:
        asked.extend(words)
        return {word: Answer(FACTS.get(word, {})) for word in words}

    monkeypatch.setattr("ats_stream.doctor.examination.ask", ask)
    monkeypatch.setattr("ats_stream.doctor.packages.installed_names", lambda: {"cupy-cuda13x", "av"})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "not-to-be-seen")
    monkeypatch.setenv("RAY_ADDRESS", "ray://someone:not-to-be-seen@head:10001")
    code = cli.main(["doctor", "--json"])
    written = capsys.readouterr()
    result = json.loads(written.out)
    bad = [finding for finding in result["findings"] if finding["state"] == "bad"]
    assert (code, bad) == (0, [])
    assert {"torch", "ray", "zarr", *FACTS} <= {*asked}
    subjects = {finding["subject"] for finding in result["findings"]}
    assert {"python", "torch", "ray", "gpu 0", "CuPy on the gpu", "codecs", "OpenSlide's library"} <= subjects
    assert {"cache of numba", "cache of CuPy", "object stores", "working folder", "ray cluster"} <= subjects
    assert "not-to-be-seen" not in written.out + written.err


def test_what_is_bad_is_printed_with_advice_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = [Finding(State.OK, "python", "3.13"), Finding(State.BAD, "zarr", "gone", "pip install zarr")]
    monkeypatch.setattr("ats_stream.doctor.examine", lambda: iter(findings))
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == [
        "ok    python: 3.13",
        "bad   zarr: gone",
        "      -> pip install zarr",
        "1 bad",
    ]
