"""Settings from a YAML file: the same names as in the config.yaml of a run; options come before them."""

from __future__ import annotations

import dataclasses
import difflib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ats_stream.errors import InputError, MissingFileError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Collection


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """The option that names the file."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with sections model, sampler, trainer, cluster, such as a run's config.yaml; options "
        "given here come first",
    )


def apply_config_file(arguments: argparse.Namespace) -> tuple[str, ...] | None:
    """Put the file's values where no option was given; the classes that it lists, if any.

    Raises InputError, with the nearest known name, for what is not a setting, and for values of another type.
    """
    if arguments.config is None:
        return None
    path = Path(arguments.config)
    content = _read(path)
    classes = content.pop("classes", None)
    sections = _sections()
    _check_names(path, "", content, sections)
    given = set(vars(arguments))
    taken: dict[str, tuple[str, Any]] = {}
    for section, values in content.items():
        fields = {field.name: field for field in dataclasses.fields(sections[section])}
        if not isinstance(values, dict):
            raise InputError(f"{path}: {section} must hold names and values, got {values!r}")
        _check_names(path, f"{section}.", values, fields)
        for name, value in values.items():
            value = _typed(f"{path}: {section}.{name}", value, str(fields[name].type))
            where, other = taken.setdefault(name, (section, value))
            if other != value:
                raise InputError(f"{path}: {where}.{name} is {other!r} and {section}.{name} {value!r}")
            if name not in given:
                setattr(arguments, name, value)
    if classes is None:
        return None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise InputError(f"{path}: classes must be a list of names, got {classes!r}")
    return tuple(classes)


def _sections() -> dict[str, Any]:
    from ats_stream.models import ModelConfig
    from ats_stream.workers import ClusterConfig, SamplerConfig, TrainerConfig

    return {
        "model": ModelConfig,
        "sampler": SamplerConfig,
        "trainer": TrainerConfig,
        "cluster": ClusterConfig,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFileError(f"{path}: no such configuration") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot read it: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: a configuration has sections, got {type(content).__name__}")
    return content


def _check_names(path: Path, prefix: str, found: Collection[Any], known: Collection[str]) -> None:
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(known)}"
            raise InputError(f"{path}: no setting {prefix}{name}; {hint}")


_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "str | None": (str, type(None)),
    "tuple[str, ...]": (),
}


def _typed(where: str, value: Any, kind: str) -> Any:
    """The value, checked. Booleans are integers in Python but not here, and YAML takes 1e-3 for a word."""
    if kind == "float" and isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    if kind == "tuple[str, ...]" and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "bool"):
        raise InputError(f"{where} must be {kind}, got {value!r}")
    return value
