"""The page of benchmarks, made from results/*.json: no number is copied by hand.

    python benchmarks/results_page.py        prints the page as Markdown

Every result becomes a section with the machine it was measured on and tables of its numbers: a list of
records is a table, records in records become columns of it. Curves and lists of numbers are left to the
files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

TITLES = {
    "convert": ("Conversion", "python benchmarks/convert.py"),
    "demo": ("The demo", "python benchmarks/demo.py"),
    "estimators": ("Variance and gradient error of the estimators", "python benchmarks/estimators.py"),
    "kernels_cpu": ("Gathering patches on the CPU", "python benchmarks/kernels.py"),
    "kernels_cuda": ("Kernels on a device", "python benchmarks/kernels.py --device cuda"),
    "plateau": ("What shortens the plateau of training", "python benchmarks/plateau.py"),
    "predict": ("Prediction and its report", "python benchmarks/predict.py"),
    "read": ("Reading patches", "python benchmarks/read.py"),
    "sampling": ("Drawing on the CPU", "python benchmarks/sampling.py"),
    "stream": ("The stream of items", "python benchmarks/stream.py"),
    "train": ("A step beside every patch", "python benchmarks/train.py"),
    "view": ("Tiles of the viewer", "python benchmarks/view.py"),
    "megapixel_mnist": ("Megapixel MNIST", "python benchmarks/megapixel_mnist.py"),
}
"""Titles of the sections and how the numbers are measured; a result without one goes by its file's name."""

MAX_COLUMNS = 12
MAX_ROWS = 60
ABOUT = ("machine", "versions", "peers", "load_before", "machine_was_quiet", "settings", "parameters")
"""What describes a measurement and is no result of it."""

_HEAD = """\
# Benchmarks

Made from the stored results in `benchmarks/results` when this site was built; each section names the command
that measures it again and the machine it ran on. Times of other libraries were taken beside ours, in the same
run. Nothing here was measured on a GPU, unless a section says so.
"""


def page(folder: Path = RESULTS) -> str:
    """The page as Markdown."""
    sections = [_section(path.stem, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        runs = {path.stem: json.loads(path.read_text()) for path in sorted(inner.glob("*.json"))}
        if runs:
            sections.append(_section(inner.name, {"runs": runs}))
    return "\n".join([_HEAD, *sections])


def _reached(run: dict[str, Any]) -> dict[str, Any]:
    """A training by its numbers and the last point of its curve."""
    curve = run.get("curve") or run.get("epochs") or [{}]
    last = curve[-1] if isinstance(curve, list) and isinstance(curve[-1], dict) else {}
    return {**{key: value for key, value in run.items() if not isinstance(value, list)}, "last": last}


def _section(name: str, result: dict[str, Any]) -> str:
    title, command = TITLES.get(name, (name, ""))
    lines = [f"## {title}", ""]
    if command:
        lines += [f"    {command}", ""]
    about = {key: result[key] for key in ABOUT if key in result}
    if about:
        lines += [_about(about), ""]
    for key, value in result.items():
        if key not in ABOUT:
            lines += _tables(key, value)
    return "\n".join(lines)


def _about(about: dict[str, Any]) -> str:
    named = {
        key.removeprefix("machine ").removeprefix("versions "): value for key, value in flat(about).items()
    }
    shown = ", ".join(f"{key} {_cell(value)}" for key, value in named.items() if _is_shown(value))
    return f"*{shown}*"


def _tables(key: str, value: Any) -> list[str]:
    """A value as tables: each list of records one, lists in records tables of their own."""
    if isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
        of_one = _reached if key == "runs" else dict
        value = [{"name": name, **of_one(item)} for name, item in value.items()]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return [f"{key.replace('_', ' ')}: {_cell(value)}", ""]
    # a target that this file has no measurement of says nothing
    records = [
        {name: _as_records(item) for name, item in record.items()}
        for record in value
        if isinstance(record, dict) and record.get("holds", True) is not None
    ]
    if not records:
        return []
    inner = {name: item for record in records for name, item in record.items() if _is_records(item)}
    if inner:
        lines: list[str] = []
        for record in records:
            plain = flat({name: item for name, item in record.items() if not _is_records(item)})
            said = [_cell(item) for item in plain.values() if isinstance(item, str)]
            lines += [f"**{said[0]}**: {', '.join(said[1:])}" if said else f"**{key}**", ""]
            for name in inner:
                if _is_records(record.get(name)):
                    lines += _tables(name, record[name])
        return lines
    return [*_table([flat(record) for record in records]), ""]


def _as_records(value: Any) -> Any:
    """Records by name as a list of them, where there are several; anything else as it is."""
    if isinstance(value, dict) and len(value) > 2 and all(isinstance(item, dict) for item in value.values()):
        return [{"name": name, **item} for name, item in value.items()]
    return value


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _table(records: list[dict[str, Any]]) -> list[str]:
    columns = list(
        dict.fromkeys(name for record in records for name, value in record.items() if _is_shown(value))
    )
    varied = [name for name in columns if len({_cell(record.get(name)) for record in records}) > 1]
    chosen = (varied if len(columns) > MAX_COLUMNS and len(records) > 1 else columns)[:MAX_COLUMNS]
    head = [f"| {' | '.join(name.replace('_', ' ') for name in chosen)} |", "|" + " --- |" * len(chosen)]
    rows = [f"| {' | '.join(_cell(record.get(name)) for name in chosen)} |" for record in records[:MAX_ROWS]]
    left = len(records) - MAX_ROWS
    return [*head, *rows, *([f"\n{left} rows more in the file."] if left > 0 else [])]


def flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A record without records in it.

    >>> flat({"a": 1, "ms": {"read": 2.5}})
    {'a': 1, 'ms read': 2.5}
    """
    found: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name} ")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _is_shown(value: Any) -> bool:
    return value is not None and not (isinstance(value, list) and (len(value) > 4 or _is_records(value)))


def _cell(value: Any) -> str:
    """A value for a reader, with no more digits than mean something.

    >>> _cell(0.123456), _cell(2484.27), _cell(138866010.0), _cell(True), _cell("a | b"), _cell(None)
    ('0.1235', '2484', '138866010', 'yes', 'a / b', '')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_cell(item) for item in value)
    return str(value).replace("|", "/").replace("\n", " ")


if __name__ == "__main__":
    sys.stdout.write(page())
