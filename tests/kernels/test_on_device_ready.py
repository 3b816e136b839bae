"""What waits for a device imports with numpy, torch and CuPy alone: it is carried there as plain files."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
GPU, BENCHMARKS = ROOT / "tests" / "gpu", ROOT / "benchmarks"
TESTS = sorted(GPU.glob("test_*.py"))

# as on a machine without them: the packages of this project that are neither numpy nor torch
HIDDEN = """
import re, sys, tomllib
from importlib import metadata

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
lines = project["dependencies"] + project["optional-dependencies"]["dev"]
wanted = {re.match(r"[\\w.-]+", line).group().lower() for line in lines} - {"torch", "numpy"}
for name, packages in metadata.packages_distributions().items():
    if wanted & {package.lower() for package in packages}:
        sys.modules[name] = None  # an import of it then fails
assert sys.modules["zarr"] is sys.modules["numba"] is sys.modules["pytest"] is None
"""


def test_all_of_it_imports_with_torch_and_numpy_alone() -> None:
    names = [path.stem for path in (*TESTS, *sorted(BENCHMARKS.glob("kernels*.py")))]
    assert len(names) >= 7
    program = f"{HIDDEN}\nimport importlib\nfor name in {names}: importlib.import_module(name)\n"
    folders = [ROOT, GPU, ROOT / "tests" / "kernels", BENCHMARKS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["test_gather", "test_sample"])
def test_some_cases_of_each_kernel_are_small_enough_for_the_sanitizers(name: str) -> None:
    body = ast.parse((GPU / f"{name}.py").read_text()).body
    functions = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    (small,) = (
        ast.literal_eval(node.value)
        for node in body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SMALL"
    )
    assert small
    assert set(small) <= functions
