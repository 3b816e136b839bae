"""Say what a training takes before it runs: storage, memory, network, and what will limit its speed.

  ats-stream plan archive.csv --prior tissue --patches 16 --patch-px 224 --ranks 8 --samplers 4 --nodes 2

The options are those of 'ats-stream train', with --nodes for the number of machines. Some images of the
archive are looked at: their shapes, how well they compress, and how long a sampler takes for them on this
machine. Memory and bytes are computed (the formulas are in ats_stream/workers/sizing.py); speeds of what is
not here are assumptions that options replace. Chunks are counted for attention that is spread evenly, which
is where training begins; attention that has learned reads fewer.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ats_stream.io import ArchiveRow
    from ats_stream.workers import ClusterConfig
    from ats_stream.workers.probe import Probe
    from ats_stream.workers.sizing import Rates, Shape, Sizes

USAGE = "ARCHIVE [options]"

ASSUMED_STORAGE_MB_PER_S = 1000.0
ASSUMED_LINK_GBIT_PER_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ats-stream plan``."""
    from ats_stream.commands.train import add_run_options

    parser.add_argument("archive", metavar="ARCHIVE", help="CSV table with columns slide, label, split")
    group = parser.add_argument_group("the plan")
    group.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (%(default)s)")
    group.add_argument(
        "--look-at", type=int, default=8, metavar="N", help="images that are looked at (%(default)s)"
    )
    group.add_argument(
        "--storage-mb-per-s",
        type=float,
        default=ASSUMED_STORAGE_MB_PER_S,
        metavar="X",
        help="megabytes a second from storage, all nodes together (assumed %(default)g)",
    )
    group.add_argument(
        "--link-gbit-per-s",
        type=float,
        default=ASSUMED_LINK_GBIT_PER_S,
        metavar="X",
        help="gigabits a second in or out of one node (assumed %(default)g)",
    )
    group.add_argument(
        "--sampler-s",
        type=float,
        metavar="X",
        help="seconds of a sampler for an image (default: measured here)",
    )
    group.add_argument(
        "--rank-s",
        type=float,
        metavar="X",
        help="seconds of a rank for an image of a training step (default: measured here, unless --gpu)",
    )
    group.add_argument("--json", dest="as_json", action="store_true", help="print one JSON object instead")
    add_run_options(parser)
    parser.set_defaults(executor="ray")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Look at some images, compute, and print."""
    from ats_stream.commands.train import read_run
    from ats_stream.errors import InputError
    from ats_stream.workers.config import check_world
    from ats_stream.workers.probe import probe
    from ats_stream.workers.sizing import Rates, Shape, limits, size_up

    for name in ("nodes", "look_at", "storage_mb_per_s", "link_gbit_per_s", "sampler_s", "rank_s"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name.replace('_', '-')} must be positive, got {value:g}")
    asked = read_run(arguments)
    archive, config, cluster = asked.archive, asked.config, asked.cluster
    check_world(config.trainer.batch_size, cluster.num_ranks)
    rows = archive.split(config.trainer.train_split)
    looked_at = _spread(rows.rows, arguments.look_at)
    per_rank = config.trainer.batch_size // cluster.num_ranks
    found = probe(
        looked_at,
        config,
        images_per_rank=per_rank,
        on_cpu=not cluster.use_gpu and arguments.rank_s is None,
        storage_options=asked.storage_options,
    )
    shape = Shape(
        num_images=len(rows),
        batch_size=config.trainer.batch_size,
        num_patches=config.sampler.num_patches,
        patch_px=config.sampler.patch_px,
        lag=config.trainer.lag,
        num_parameters=found.num_parameters,
        num_nodes=arguments.nodes,
        num_ranks=cluster.num_ranks,
        samplers_per_rank=cluster.samplers_per_rank,
        window=cluster.window,
        window_bytes=cluster.window_bytes,
        view_cache_bytes=config.sampler.cache_bytes,
        use_gpu=cluster.use_gpu,
        accumulate=config.trainer.accumulate,
        has_average=config.trainer.average_decay > 0,
    )
    rates = Rates(
        storage_bytes_per_s=arguments.storage_mb_per_s * 1e6,
        link_bytes_per_s=arguments.link_gbit_per_s * 1e9 / 8,
        sampler_s=arguments.sampler_s or found.sampler_s,
        rank_s=arguments.rank_s or found.rank_s,
    )
    sizes = size_up(found.images, config.model, shape)
    images_per_s = limits(sizes, shape, rates)
    if arguments.as_json:
        arguments.print_json = True
    else:
        print(describe(cluster, shape, found, sizes, rates, images_per_s), flush=True)
    return {
        "looked_at": [row.slide for row in looked_at],
        "sizes": dataclasses.asdict(sizes),
        "rates": dataclasses.asdict(rates),
        "images_per_s": images_per_s,
    }


def _spread(rows: Sequence[ArchiveRow], number: int) -> list[ArchiveRow]:
    """Some rows, from all over the table."""
    taken = min(number, len(rows))
    return [rows[place * len(rows) // taken] for place in range(taken)]


def describe(
    cluster: ClusterConfig,
    shape: Shape,
    found: Probe,
    sizes: Sizes,
    rates: Rates,
    images_per_s: dict[str, float],
) -> str:
    """The plan, for a terminal."""
    nodes = f"{shape.num_nodes} node{'s' * (shape.num_nodes != 1)}"
    head = (
        f"{shape.num_images} images, {len(found.images)} looked at; a step takes {shape.batch_size}: "
        f"{shape.images_per_rank} on each of {shape.num_ranks} ranks\n"
        f"on {nodes}, with {shape.num_ranks * shape.samplers_per_rank} samplers in all"
    )
    sections = {
        "from storage": storage_rows(found, sizes),
        "memory": memory_rows(shape, sizes),
        "speed": speed_rows(rates, found, images_per_s),
    }
    lines = [head]
    for title, rows in sections.items():
        lines += [title, *(f"  {name:<14} {text}" for name, text in rows.items())]
    name, speed = next(iter(images_per_s.items()))
    lines.append(f"the limit: {name}, {speed:,.1f} images/s, an epoch in {shape.num_images / speed:,.1f} s")
    if cluster.address is None and sizes.store_bytes > cluster.object_store_bytes:
        have = _bytes(cluster.object_store_bytes)
        lines.append(
            f"a cluster that training starts by itself has an object store of {have}, and smaller windows: "
            "give --object-store-bytes"
        )
    return "\n".join(lines)


def storage_rows(found: Probe, sizes: Sizes) -> dict[str, str]:
    """What is fetched."""
    first = _bytes(sizes.stored_bytes + sizes.view_bytes_first)
    later, step = _bytes(sizes.stored_bytes + sizes.view_bytes_later), _bytes(sizes.step_bytes_later)
    return {
        "an image": f"{later}, in the first epoch {first} with its view",
        "": f"{mean_chunks(found):.1f} chunks that decode to {_bytes(sizes.decoded_bytes)}",
        "a step": f"{step}, in the first epoch {_bytes(sizes.step_bytes_first)}",
    }


def memory_rows(shape: Shape, sizes: Sizes) -> dict[str, str]:
    """What is held, and where."""
    step = _bytes(sizes.step_work_bytes)
    where = f"and {step} on its GPU, beside what CUDA takes" if shape.use_gpu else f"{step} of it for a step"
    window = _bytes(sizes.store_bytes / 2 / shape.ranks_per_node)
    held = f"half of it for {shape.ranks_per_node} x {window}, items of {_bytes(sizes.item_bytes)}"
    work = f"{_bytes(sizes.sampler_work_bytes)} of it for an image's attention and patches"
    return {
        "a sampler": f"{_bytes(sizes.sampler_bytes)}, {work}",
        "a rank": f"{_bytes(sizes.rank_bytes)}, {where}",
        "object store": f"{_bytes(sizes.store_bytes)} on a node, {held}",
        "a node": f"{_bytes(sizes.node_bytes)} in all, with the driver on the first",
    }


def speed_rows(rates: Rates, found: Probe, images_per_s: dict[str, float]) -> dict[str, str]:
    """How many images a second each part allows, and why."""
    sampler, rank = f"{1e3 * rates.sampler_s:.1f} ms", f"{1e3 * (rates.rank_s or 0):.1f} ms"
    reasons = {
        "storage": f"{_bytes(rates.storage_bytes_per_s)} a second",
        "link": f"{_bytes(rates.link_bytes_per_s)} a second in or out of a node",
        "samplers": f"{sampler} an image; {1e3 * found.reading_s:.1f} ms were reading, as measured here",
        "ranks": f"{rank} an image",
        "in turn": f"lag 0: {sampler} of a sampler, then {rank} of a rank for an image",
    }
    rows = {name: f"{speed:,.1f} images/s: {reasons[name]}" for name, speed in images_per_s.items()}
    if rates.rank_s is None:
        rows["ranks"] = "not known: give --rank-s as measured on such a GPU"
    return rows


def mean_chunks(found: Probe) -> float:
    """Chunks of an image's patches, over the images looked at."""
    return sum(image.num_chunks for image in found.images) / len(found.images)


def _bytes(number: float) -> str:
    from ats_stream.commands.info import bytes_text

    return bytes_text(round(number))
