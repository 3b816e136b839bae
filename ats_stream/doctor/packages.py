"""Which packages are there, in which version, against what this package declares."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from ats_stream.doctor.finding import Finding, State

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from packaging.requirements import Requirement

    from ats_stream.doctor.ask import Answer

DISTRIBUTION = "ats-stream"
OPTIONAL = {
    "cuda12": "training on a GPU of CUDA 12",
    "cuda13": "training on a GPU of CUDA 13",
    "mlflow": "--logger mlflow",
    "timm": "feature networks of timm",
    "wandb": "--logger wandb",
    "verify": "validators of OME-Zarr in `ats-stream verify`",
    "video": "reading video files",
}
"""Extras that a user may want, and what for; the others are for work on the project."""


@dataclass(frozen=True)
class Package:
    """A package that is declared, and what is installed of it."""

    requirement: Requirement
    extra: str
    """The extra that asks for it; empty for a package that is always needed."""
    version: str | None
    """None if it is not installed."""
    module: str | None
    """A module to try it by."""


def declared() -> list[Package]:
    """What the metadata of this package asks for on this machine; empty if it was not installed by pip."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    modules = _modules()
    packages = []
    for requirement in map(Requirement, lines):
        for extra in ("", *OPTIONAL):
            marker = requirement.marker
            if extra and (marker is None or marker.evaluate({"extra": ""})):
                continue  # needed anyhow
            if marker is None or marker.evaluate({"extra": extra}):
                name = requirement.name.lower()
                packages.append(Package(requirement, extra, _version(name), modules.get(name)))
                break
    return packages


def judge(package: Package, answers: Mapping[str, Answer]) -> Finding:
    """What to say of a package that was tried, or of one that is not there; pure."""
    requirement, version = package.requirement, package.version
    wanted = f"{requirement.name}{requirement.specifier}"
    install = (
        f'pip install "{wanted}"' if not package.extra else f'pip install "{DISTRIBUTION}[{package.extra}]"'
    )
    if version is None:
        if package.extra:
            said = f"not installed; only needed for {OPTIONAL[package.extra]}"
            return Finding(State.NOTE, requirement.name, said, install)
        return Finding(State.BAD, requirement.name, f"not installed, {wanted} is needed", install)
    if not requirement.specifier.contains(version, prereleases=True):
        said = f"{version} is installed, {requirement.specifier} is needed"
        return Finding(State.BAD, requirement.name, said, f'pip install "{wanted}"')
    answer = answers.get(package.module or "")
    if answer is not None and answer.error:
        said = f"{version} is installed and cannot be imported ({answer.error})"
        if package.extra:  # may lack what its extra would bring
            return Finding(State.NOTE, requirement.name, f"{said}; for {OPTIONAL[package.extra]}", install)
        return Finding(State.BAD, requirement.name, said, f'pip install --force-reinstall "{wanted}"')
    return Finding(State.OK, requirement.name, version)


def clashes(names: Iterable[str]) -> list[Finding]:
    """Packages that must not be installed together: two builds of CuPy overwrite each other."""
    found = sorted(name for name in names if name.startswith("cupy") and not name.startswith("cupy-backends"))
    if len(found) < 2:
        return []
    advice = f"pip uninstall {' '.join(found)}, then install the one of torch's CUDA"
    return [Finding(State.BAD, "cupy", f"{' and '.join(found)} overwrite each other", advice)]


def installed_names() -> set[str]:
    """Names of all installed distributions, in small letters."""
    return {
        str(found.metadata["Name"]).lower() for found in metadata.distributions() if found.metadata["Name"]
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _modules() -> dict[str, str]:
    """A module by which each installed distribution can be tried: of its own name, or else the first."""
    found: dict[str, list[str]] = {}
    for module, distributions in metadata.packages_distributions().items():
        for name in distributions:
            if not module.startswith("_") and module.isidentifier():
                found.setdefault(name.lower(), []).append(module)
    return {
        name: next((one for one in sorted(modules) if one.lower() == name.replace("-", "_")), min(modules))
        for name, modules in found.items()
    }
