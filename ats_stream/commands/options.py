"""Options that several commands share, and how options become configurations."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

from ats_stream.workers.config import EXECUTORS, ClusterConfig

if TYPE_CHECKING:
    import argparse

Config = TypeVar("Config")


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Where a command computes."""
    default = ClusterConfig()
    group = parser.add_argument_group("where it runs")
    group.add_argument(
        "--executor",
        choices=EXECUTORS,
        default=default.executor,
        help="serial: this process; ray: processes on a Ray cluster, this machine's or that of --address "
        "(%(default)s)",
    )
    add_field(group, default, "num_ranks", "--ranks", "training processes (ray)")
    add_field(group, default, "samplers_per_rank", "--samplers", "sampler actors of each rank (ray)")
    add_field(group, default, "cpus_per_rank", "--cpus-per-rank", "CPUs that Ray sets aside for a rank")
    add_field(group, default, "cpus_per_sampler", "--cpus-per-sampler", "CPUs set aside for a sampler")
    add_field(group, default, "window", "--window", "items that a rank has on order at a time")
    add_field(group, default, "max_failures", "--max-failures", "restarts after a rank died (ray)")
    group.add_argument("--gpu", dest="use_gpu", action="store_true", help="give each rank a GPU")
    group.add_argument(
        "--address", help="address of a Ray cluster (default: $RAY_ADDRESS, or start one here)"
    )


def add_field(group: Any, default: Any, field: str, flag: str, text: str) -> None:
    """An option for a field of a configuration, with the configuration's own default."""
    value = getattr(default, field)
    group.add_argument(
        flag,
        dest=field,
        type=type(value),
        default=value,
        metavar=_METAVAR[type(value)],
        help=f"{text} (%(default)s)",
    )


_METAVAR: dict[type, str] = {int: "N", float: "X", str: "NAME"}


def config_from(arguments: argparse.Namespace, config: type[Config], **given: Any) -> Config:
    """Build a configuration from the arguments that are named like its fields, and from ``given``."""
    names = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]  # all are dataclasses
    values = {name: value for name, value in vars(arguments).items() if name in names}
    return config(**{**values, **given})
