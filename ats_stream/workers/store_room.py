"""Whether the object store of a node holds what its ranks have on order, and what that leaves for windows."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ats_stream.errors import ClusterError, SlideError
from ats_stream.workers.quarantine import FAIL
from ats_stream.workers.sampler import read_levels
from ats_stream.workers.sizing import STORE_SHARE, ImageFacts, item_bytes

if TYPE_CHECKING:
    from ats_stream.workers.trainer import TrainJob

NUM_LOOKED_AT = 8
"""Images that are opened for one that can be read, where those that cannot are left out."""


def window_within(store_bytes: int, *, window_bytes: int, step_bytes: int, ranks_on_node: int) -> int:
    """Bytes that the window of each rank may come to: what was asked for, or all that the store has room for.

    A rank holds a step's items while it copies them and has at least the next step's on order, ``step_bytes``
    each; windows fill half of a store at most. ClusterError for a store that is too small even so.

    >>> window_within(400, window_bytes=90, step_bytes=20, ranks_on_node=2)
    90
    >>> window_within(200, window_bytes=90, step_bytes=20, ranks_on_node=2)
    50
    """
    needed = 2 * step_bytes * ranks_on_node
    if store_bytes < needed:
        raise ClusterError(
            f"a node's object store has {store_bytes >> 20} MiB, and two steps of its {ranks_on_node} "
            f"rank{'s' * (ranks_on_node != 1)} take {-(-needed >> 20)} MiB: "
            "give it more, or lower --batch-size, --patches or --patch-px"
        )
    return min(window_bytes, max(int(STORE_SHARE * store_bytes) // ranks_on_node, 1))


def first_item_bytes(job: TrainJob) -> int | None:
    """Bytes of an item of the first image, by its shapes; None if the first ones cannot be read.

    Raises SlideError for the first where an image that cannot be read ends the run.
    """
    sampler = job.config.sampler
    for row in job.train_rows[:NUM_LOOKED_AT]:
        try:
            pyramid = job.storage_options.open(job.slides[row])
            channels, *space = read_levels(pyramid, job.sampler_of(row))[1].shape
        except SlideError:
            if job.config.trainer.on_bad_image == FAIL:
                raise
            continue
        facts = ImageFacts(
            view_shape=(channels, space[-2], space[-1]),
            pixel_bytes=pyramid.levels[0].dtype.itemsize,
            has_prior=sampler.prior_label is not None,
            num_chunks=0.0,
            chunk_bytes=0,
            stored_share=0.0,
            view_stored_bytes=0.0,
        )
        return item_bytes(facts, sampler.num_patches + job.config.trainer.extra_patches, sampler.patch_px)
    return None


def with_room(job: TrainJob) -> TrainJob:
    """The job with windows that fit into the object stores of the Ray cluster that this process is in.

    Raises ClusterError for stores that are too small, and what :func:`first_item_bytes` raises.
    """
    import ray

    item = first_item_bytes(job)
    stores = [
        int(node["Resources"].get("object_store_memory", 0))
        for node in ray.nodes()  # type: ignore[no-untyped-call]  # Ray types it partly
        if node["Alive"] and node["Resources"].get("CPU", 0) > 0
    ]
    if item is None or not stores:
        return job
    cluster = job.cluster
    window_bytes = window_within(
        min(stores),
        window_bytes=cluster.window_bytes,
        step_bytes=item * job.config.trainer.batch_size // cluster.num_ranks,
        ranks_on_node=-(-cluster.num_ranks // len(stores)),
    )
    return dataclasses.replace(job, cluster=dataclasses.replace(cluster, window_bytes=window_bytes))
