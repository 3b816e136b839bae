"""Caches, space and credentials: what is looked at, and what is never shown."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest

from ats_stream.doctor import places
from ats_stream.doctor.finding import State

Usage = namedtuple("Usage", "total used free")
NOWHERE = Path("/proc/1/not-here")


def test_a_cache_that_can_be_written_is_fine(tmp_path: Path) -> None:
    found = places.caches({"CUPY_CACHE_DIR": str(tmp_path)}, NOWHERE, tmp_path / "package", has_cupy=True)
    assert [finding.state for finding in found] == [State.OK, State.OK]
    assert str(tmp_path / "package" / "__pycache__") in found[0].said
    assert str(tmp_path) in found[1].said
    assert not (tmp_path / "package").exists()  # nothing is made


def test_numba_goes_to_the_users_cache_where_the_package_is_read_only(tmp_path: Path) -> None:
    (found,) = places.caches({}, tmp_path, NOWHERE, has_cupy=False)
    assert (found.state, str(tmp_path / ".cache" / "numba") in found.said) == (State.OK, True)


def test_caches_that_cannot_be_written_name_their_variable() -> None:
    found = places.caches({}, NOWHERE, NOWHERE, has_cupy=True)
    assert [finding.state for finding in found] == [State.NOTE, State.NOTE]
    assert ["NUMBA_CACHE_DIR" in found[0].advice, "CUPY_CACHE_DIR" in found[1].advice] == [True, True]
    (found_numba,) = places.caches({"NUMBA_CACHE_DIR": str(NOWHERE)}, Path.cwd(), Path.cwd(), has_cupy=False)
    assert found_numba.state == State.NOTE  # numba takes no other place then


@pytest.mark.parametrize(("free_gib", "state"), [(4.9, State.NOTE), (5.1, State.OK)])
def test_little_space_is_noted(
    free_gib: float, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: Usage(0, 0, int(free_gib * 2**30)))
    (finding,) = places.space({"working folder": tmp_path})
    assert (finding.state, f"{free_gib} GiB free in {tmp_path}" in finding.said) == (state, True)
    assert bool(finding.advice) == (state == State.NOTE)


def test_folders_that_are_not_there_or_read_only_are_noted() -> None:
    (missing,) = places.space({"folder of Ray": NOWHERE})
    assert (missing.state, str(NOWHERE) in missing.said) == (State.NOTE, True)
    (closed,) = places.space({"working folder": Path("/proc")})
    assert "cannot be written" in closed.said


@pytest.mark.parametrize(("free_gib", "state"), [(0.06, State.NOTE), (8.0, State.OK)])
def test_small_shared_memory_is_noted(
    free_gib: float, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = int(free_gib * 2**30)
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: Usage(size, 0, size))
    (finding,) = places.shared_memory(tmp_path)
    assert finding.state == state
    assert ("--shm-size" in finding.advice) == (state == State.NOTE)
    assert places.shared_memory(tmp_path / "none") == []


def test_credentials_are_named_and_never_shown() -> None:
    environ = {"AWS_ACCESS_KEY_ID": "AKIASECRET", "AWS_PROFILE": "", "AZURE_STORAGE_ACCOUNT_KEY": "c2VjcmV0"}
    assert places.credentials(environ) == ["AWS_ACCESS_KEY_ID", "AZURE_STORAGE_ACCOUNT_KEY"]
