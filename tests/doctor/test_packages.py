"""What is said of packages: missing, old, broken, optional."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ats_stream.doctor import packages
from ats_stream.doctor.ask import Answer
from ats_stream.doctor.finding import State
from ats_stream.doctor.packages import Package, clashes, declared, judge

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
ZARR = Requirement("zarr>=3.1,<4")
TIMM = Requirement("timm>=1; extra == 'timm'")


@pytest.mark.parametrize(
    ("package", "error", "state", "said", "advice"),
    [
        (Package(ZARR, "", "3.1.6", "zarr"), "", State.OK, "3.1.6", ""),
        (
            Package(ZARR, "", None, None),
            "",
            State.BAD,
            "not installed, zarr<4,>=3.1",
            'install "zarr<4,>=3.1"',
        ),
        (
            Package(ZARR, "", "2.18.3", "zarr"),
            "",
            State.BAD,
            "2.18.3 is installed, <4,>=3.1 is needed",
            "install",
        ),
        (Package(ZARR, "", "3.2.0rc1", "zarr"), "", State.OK, "3.2.0rc1", ""),
        (Package(ZARR, "", "3.1.6", "zarr"), "ImportError: no", State.BAD, "(ImportError: no)", "--force"),
        (Package(TIMM, "timm", None, None), "", State.NOTE, "only needed for feature", "ats-stream[timm]"),
        (
            Package(TIMM, "timm", "1.0.1", "timm"),
            "ImportError: no",
            State.NOTE,
            "(ImportError: no)",
            "[timm]",
        ),
        (Package(TIMM, "timm", "0.9", "timm"), "", State.BAD, "0.9 is installed, >=1 is needed", "timm>=1"),
    ],
)
def test_a_package_is_judged(package: Package, error: str, state: State, said: str, advice: str) -> None:
    finding = judge(package, {package.module or "": Answer(error=error)})
    assert (finding.state, finding.subject) == (state, package.requirement.name)
    assert said in finding.said
    assert advice in finding.advice
    assert bool(finding.advice) == (state != State.OK)


def test_every_declared_package_is_looked_at_and_tried() -> None:
    found = declared()
    assert found, "the package is installed, editable at least"
    for package in found:
        if package.version is not None:
            assert package.module, package.requirement
    assert {package.extra for package in found} <= {"", *packages.OPTIONAL}
    modules = {package.requirement.name: package.module for package in found}
    assert (modules["torch"], modules["pillow"], modules["openslide-python"]) == ("torch", "PIL", "openslide")


def test_extras_are_those_of_the_project() -> None:
    # the others are for work on the project itself
    assert {*PROJECT["optional-dependencies"]} == {*packages.OPTIONAL, "bench", "docs", "dev"}


def test_two_builds_of_cupy_clash() -> None:
    (finding,) = clashes({"cupy-cuda12x", "numpy", "cupy-cuda13x"})
    assert finding.state == State.BAD
    assert "pip uninstall cupy-cuda12x cupy-cuda13x" in finding.advice
    assert clashes({"cupy-cuda12x", "numpy"}) == []
