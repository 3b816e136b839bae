"""The files around the package agree with it: pinned versions, citation, make targets."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ats_stream

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("declared", DECLARED)
def test_every_declared_package_is_pinned_to_a_version_it_allows(declared: str) -> None:
    requirement = Requirement(declared)
    assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_pins_hold_on_any_machine() -> None:
    for name, version in pins().items():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), (name, version)  # no local part such as +cpu
        assert not re.match("nvidia|cuda|cupy|triton", name), name


def test_citation_names_this_version_and_the_method() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == ats_stream.__version__
    assert citation["license"] == PROJECT["license"]
    (reference,) = citation["references"]
    assert [author["family-names"] for author in reference["authors"]] == ["Katharopoulos", "Fleuret"]
    assert (reference["year"], reference["volume"], reference["start"], reference["end"]) == (
        2019,
        97,
        3282,
        3291,
    )


def test_changelog_has_a_place_for_what_is_new() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"


def test_documented_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    documented = set(re.findall(r"^# make ([a-z]+)", makefile, re.MULTILINE))
    documented |= set(re.findall(r"`make ([a-z]+)`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"setup", "demo", "test", "torture", "lint", "clean"} <= documented <= targets
