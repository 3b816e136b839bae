"""Options that several commands share, and how options become configurations."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from ats_stream.errors import InputError, TargetExistsError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from ats_stream.io import Archive, StorageOptions
    from ats_stream.workers import ClusterConfig

Config = TypeVar("Config")
# where a column's name does not say it
_COLUMN_MEANING = {"pixel_size_um": "pixel size of level 0 in micrometres, where the slide's is not right"}


def add_column_options(parser: argparse.ArgumentParser) -> None:
    """How the columns of an archive table are called."""
    from ats_stream.io.archive import COLUMNS, OPTIONAL_COLUMNS

    group = parser.add_argument_group("the table")
    for column in COLUMNS + OPTIONAL_COLUMNS:
        note = ", if there" if column in OPTIONAL_COLUMNS else ""
        group.add_argument(
            f"--{column.replace('_', '-')}-column",
            default=argparse.SUPPRESS,
            metavar="NAME",
            help=f"column that holds the {_COLUMN_MEANING.get(column, column)}{note} ({column})",
        )


def archive_from(
    arguments: argparse.Namespace, path: str, *, classes: Sequence[str] | None = None
) -> Archive:
    """Read an archive table with the columns that the arguments name."""
    from ats_stream.io import read_archive

    given = vars(arguments).items()
    columns = {name.removesuffix("_column"): value for name, value in given if name.endswith("_column")}
    return read_archive(path, columns=columns, classes=classes)


def add_storage_options(parser: argparse.ArgumentParser) -> None:
    """What opens images behind URLs."""
    parser.add_argument(
        "--storage-options",
        action="append",
        default=[],
        metavar="KEY=VALUE|FILE",
        help="for images behind URLs: an option of the service, or a YAML file of them, which keeps secrets "
        "out of the list of processes; may be repeated, and is written nowhere",
    )


def storage_options_from(arguments: argparse.Namespace) -> StorageOptions:
    """The options for images behind URLs; InputError, without their values, if they cannot be understood."""
    from ats_stream.io.storage.storage_options import parse_storage_options

    return parse_storage_options(arguments.storage_options)


def add_ray_options(parser: argparse.ArgumentParser, *, ranks: bool) -> None:
    """Where a command computes; with ``ranks`` what concerns training processes too."""
    from ats_stream.workers.config import EXECUTORS, ClusterConfig

    default = ClusterConfig()
    group = parser.add_argument_group(
        "where it runs", "the options after --executor are for --executor ray alone"
    )
    add_choice(
        group,
        default,
        "executor",
        "--executor",
        EXECUTORS,
        "serial: this process; ray: processes of a Ray cluster, with the same result",
    )
    if ranks:
        add_field(group, default, "num_ranks", "--ranks", "training processes")
        add_field(group, default, "min_ranks", "--min-ranks", "as few as it may go on with; 0: all of them")
        add_field(group, default, "cpus_per_rank", "--cpus-per-rank", "CPUs set aside for a training process")
        add_field(group, default, "gpus_per_rank", "--gpus-per-rank", "with --gpu; below 1 leaves room")
        add_field(group, default, "max_failures", "--max-failures", "restarts after a training process died")
    of = " of each training process" if ranks else ""
    add_field(group, default, "samplers_per_rank", "--samplers", f"processes{of} that read and draw")
    add_field(group, default, "cpus_per_sampler", "--cpus-per-sampler", "CPUs set aside for each of them")
    add_field(
        group, default, "gpus_per_sampler", "--gpus-per-sampler", "GPUs, or a part of one, for each of them"
    )
    add_field(
        group,
        default,
        "hedge_after_s",
        "--hedge-after",
        "seconds after which an image that takes much longer than others is asked of a second one; 0: never",
    )
    add_field(group, default, "window", "--window", f"images on order{of} at a time")
    if ranks:
        add_field(group, default, "window_bytes", "--window-bytes", "bytes that these come to at most")
        add_switch(
            group,
            "spread_samplers",
            "--spread-samplers",
            "put these on any node, not that of their process",
        )
        add_field(
            group,
            default,
            "object_store_bytes",
            "--object-store-bytes",
            "object store of a cluster that is started here",
        )
    group.add_argument(
        "--address",
        default=argparse.SUPPRESS,
        help="a running Ray cluster (default: $RAY_ADDRESS, else one is started on this machine)",
    )


RAY_FIELDS = (
    "num_ranks",
    "min_ranks",
    "cpus_per_rank",
    "max_failures",
    "samplers_per_rank",
    "cpus_per_sampler",
    "gpus_per_rank",
    "gpus_per_sampler",
    "hedge_after_s",
    "spread_samplers",
    "window",
    "window_bytes",
    "object_store_bytes",
    "address",
)


def cluster_from(arguments: argparse.Namespace, **given: Any) -> ClusterConfig:
    """The cluster that the arguments ask for; InputError for an option that would have no effect."""
    from ats_stream.workers import ClusterConfig

    cluster = config_from(arguments, ClusterConfig, **given)
    unused = [name for name in RAY_FIELDS if hasattr(arguments, name)]
    if cluster.executor != "ray" and unused:
        raise InputError(f"{arguments.flags[unused[0]]} needs --executor ray")
    return cluster


def add_field(group: Any, default: Any, field: str, flag: str, text: str) -> None:
    """An option for a field of a configuration; the configuration itself holds the default."""
    value = getattr(default, field)
    shown = f"{value:g}" if isinstance(value, float) else value
    group.add_argument(
        flag,
        dest=field,
        type=type(value),
        default=argparse.SUPPRESS,
        metavar=_METAVAR[type(value)],
        help=f"{text} ({shown})",
    )


def add_choice(group: Any, default: Any, field: str, flag: str, choices: Collection[str], text: str) -> None:
    """The same for a field that holds one of a few names."""
    group.add_argument(
        flag,
        dest=field,
        choices=tuple(choices),
        default=argparse.SUPPRESS,
        help=f"{text} ({getattr(default, field)})",
    )


def add_switch(group: Any, field: str, flag: str, text: str) -> None:
    """An option that turns on a field that is off otherwise."""
    group.add_argument(flag, dest=field, action="store_true", default=argparse.SUPPRESS, help=text)


_METAVAR: dict[type, str] = {int: "N", float: "X", str: "NAME"}


def config_from(arguments: argparse.Namespace, config: type[Config], **given: Any) -> Config:
    """Build a configuration from the arguments that are named like its fields, and from ``given``.

    Raises InputError, naming the option instead of the field, for a value out of range.
    """
    names = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]  # all are dataclasses
    values = {name: value for name, value in vars(arguments).items() if name in names}
    try:
        return config(**{**values, **given})
    except ValueError as error:
        flags = getattr(arguments, "flags", {})
        message = re.sub(r"\b[a-z]+(_[a-z]+)*\b", lambda m: flags.get(m[0], m[0]), str(error), count=1)
        raise InputError(message) from error


def check_out(out: Path, *, empty: bool) -> None:
    """Raise TargetExistsError for an output folder that is a file, or, if it must be empty, is not."""
    if out.exists() and not out.is_dir():
        raise TargetExistsError(f"{out}: exists already and is not a folder")
    if empty and out.is_dir() and any(out.iterdir()):
        raise TargetExistsError(f"{out}: exists already and is not empty")


def progress(items: Any, *, total: int, unit: str) -> Any:
    """The items, counted by a bar if standard error is a terminal."""
    from tqdm import tqdm

    return tqdm(items, total=total, unit=unit, disable=not sys.stderr.isatty(), leave=False)
