"""The package as users get it: sdist, the wheel made from it, an environment without this checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ats_stream

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "ats_stream")
VERSION = ats_stream.__version__


def run(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """Call the build backend as pip does, with the setuptools that is there, so that nothing is fetched."""
    program = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    run(sys.executable, "-c", program, cwd=source)
    (made,) = out.iterdir()
    return made


def package_files() -> Iterator[str]:
    for path in sorted((ROOT / "ats_stream").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    (folder / "out").mkdir()
    (folder / "source").mkdir()
    for name in BUILT_FROM:
        (folder / "source" / name).symlink_to(ROOT / name)  # what a build leaves behind stays here
    return build("sdist", folder / "source", folder / "out")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "out").mkdir()
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build("wheel", folder / f"ats_stream-{VERSION}", folder / "out")


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; the packages it needs are those of this one, without this checkout."""
    folder = tmp_path_factory.mktemp("clean") / "env"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps",
        "--disable-pip-version-check", wheel, cwd=folder.parent)  # fmt: skip
    own = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    here = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    # a path in a .pth file is searched, the .pth files in it are not read: the editable install stays out
    (own / "packages_of_the_tests.pth").write_text("\n".join(sorted(here)) + "\n")
    return folder


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"ats_stream-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = [
            name for name in archive.namelist() if not name.startswith(f"ats_stream-{VERSION}.dist-info/")
        ]
        metadata = archive.read(f"ats_stream-{VERSION}.dist-info/METADATA").decode()
    missing = sorted({*package_files()} - {*names})
    assert missing == [], "name them in tool.setuptools.package-data"
    assert sorted({*names} - {*package_files()}) == []
    assert "License-Expression: MIT" in metadata
    assert (
        "Attention sampling" in metadata or "attention sampling" in metadata
    )  # the README is its description


def test_the_sdist_brings_licence_and_readme(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "PKG-INFO"} <= names


def test_the_command_of_a_clean_environment(clean: Path, tmp_path: Path) -> None:
    command = clean / "bin" / "ats-stream"
    assert run(command, "--version", cwd=tmp_path) == f"ats-stream {VERSION}\n"
    assert "ats-stream preprocess" in run(command, "--help", cwd=tmp_path)
    findings = json.loads(run(command, "doctor", "--json", cwd=tmp_path))["findings"]
    (cache,) = [finding for finding in findings if finding["subject"] == "cache of numba"]
    assert str(clean) in cache["said"]


IMPORT_ALL = """
import importlib, pkgutil, sys
import ats_stream
names = [found.name for found in pkgutil.walk_packages(ats_stream.__path__, "ats_stream.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
places = {module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "ats_stream"}
assert all(place.startswith(sys.prefix) for place in places), places
print(len(names))
"""


def test_every_module_can_be_imported_from_the_wheel(clean: Path, tmp_path: Path) -> None:
    num_modules = sum(name.endswith(".py") for name in package_files())
    assert (
        int(run(clean / "bin" / "python", "-W", "error", "-c", IMPORT_ALL, cwd=tmp_path)) == num_modules - 1
    )
