"""Memory stays flat over thousands of items: of samplers, of the rank, and of the object store."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from tiny import MODEL, SAMPLER, attention, table

from ats_stream.workers import Plan, Stream
from ats_stream.workers.ray_executor import RayExecutor

if TYPE_CHECKING:
    from types import ModuleType

    from ats_stream.io import Archive

NUM_ITEMS, NUM_WARM, BATCH_SIZE, WINDOW = 2400, 400, 8, 16
ALLOWED_BYTES = 8 << 20  # 8 MiB


@pytest.mark.slow
def test_two_thousand_items_leave_nothing_behind(archive: Archive, ray_local: ModuleType) -> None:
    executor = RayExecutor(*table(archive), MODEL, SAMPLER, num_samplers=2, cpus_per_sampler=0.1)
    plan = Plan(
        images=tuple(range(8)), batch_size=BATCH_SIZE, num_epochs=NUM_ITEMS // BATCH_SIZE, seed=1, lag=1
    )
    stream = Stream(plan, executor, window=WINDOW)
    stream.publish(0, attention(0))
    try:
        ids: list[Any] = [actor.__ray_call__.remote(lambda _: os.getpid()) for actor in executor._actors]
        processes = [psutil.Process(), *map(psutil.Process, ray_local.get(ids))]
        before: list[int] = []
        item_bytes = 0
        while stream.step < plan.num_steps:
            if stream.step == NUM_WARM // BATCH_SIZE:
                before = used_bytes(ray_local, processes)
            item_bytes += sum(item.num_bytes for item in stream.next_step())
            # weights of their own at each step, as in training
            stream.publish(stream.step, attention(stream.step))
        grown = [now - then for now, then in zip(used_bytes(ray_local, processes), before, strict=True)]
    finally:
        executor.close()
    assert item_bytes > 5 * ALLOWED_BYTES  # what stayed of every item would be seen
    assert max(grown) < ALLOWED_BYTES, grown


def used_bytes(ray: ModuleType, processes: list[psutil.Process]) -> list[int]:
    """Memory of each process that no other shares, and of the object store."""
    gc.collect()
    total = ray.cluster_resources()["object_store_memory"]
    free = ray.available_resources().get("object_store_memory", 0.0)
    return [*(process.memory_full_info().uss for process in processes), int(total - free)]
