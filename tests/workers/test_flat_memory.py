"""Memory stays flat over thousands of items: of samplers, of the rank, and of the object store."""

from __future__ import annotations

import dataclasses
import gc
import os
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from tiny import MODEL, SAMPLER, attention, make_job, run_config, table

from ats_stream.workers import Plan, Stream
from ats_stream.workers.ranks import Alone
from ats_stream.workers.ray_executor import RayExecutor
from ats_stream.workers.trainer import RankTrainer

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from ats_stream.io import Archive

# by then all images are open, every view is kept, and allocators have taken what a step needs
NUM_WARM = 400
ALLOWED_BYTES = 8 << 20  # 8 MiB: 4 kB an item, of some 100 kB or more that each brings


class Used:
    """Memory of this process, of the samplers, and of the object store."""

    def __init__(self, ray: ModuleType, executor: RayExecutor) -> None:
        self._ray = ray
        ids: list[Any] = [actor.__ray_call__.remote(lambda _: os.getpid()) for actor in executor._actors]
        self._processes = [psutil.Process(), *map(psutil.Process, ray.get(ids))]

    def now(self) -> dict[str, int]:
        """Bytes that each process has in memory, those of them that are no file's, and those of the store.

        Pages of files, the libraries, become a process's own when the last other one that maps them ends.
        """
        gc.collect()
        total = self._ray.cluster_resources()["object_store_memory"]
        used = {"object store": int(total - self._ray.available_resources().get("object_store_memory", 0.0))}
        for number, process in enumerate(self._processes):
            name = f"sampler {number}" if number else "rank"
            anonymous = sum(one.anonymous for one in process.memory_maps())
            used |= {f"{name}, resident": process.memory_info().rss, f"{name}, anonymous": anonymous}
        return used


def check_flat(seen: list[dict[str, int]], *kinds: str) -> None:
    """The last is hardly more than the first, whatever of these kinds is looked at."""
    grown = {name: seen[-1][name] - seen[0][name] for name in seen[0] if name.endswith(kinds)}
    assert max(grown.values()) < ALLOWED_BYTES, (grown, seen)


@pytest.mark.slow
def test_a_stream_of_two_thousand_items_leaves_nothing_behind(
    archive: Archive, ray_local: ModuleType
) -> None:
    num_items, batch_size = 2400, 8
    executor = RayExecutor(*table(archive), MODEL, SAMPLER, num_samplers=2, cpus_per_sampler=0.1)
    plan = Plan(
        images=tuple(range(8)), batch_size=batch_size, num_epochs=num_items // batch_size, seed=1, lag=1
    )
    stream = Stream(plan, executor, window=16)
    stream.publish(0, attention(0))
    try:
        used = Used(ray_local, executor)
        seen: list[dict[str, int]] = []
        item_bytes = 0
        while stream.step < plan.num_steps:
            if stream.step == NUM_WARM // batch_size:
                seen.append(used.now())
            item_bytes += sum(item.num_bytes for item in stream.next_step())
            # weights of their own at each step, as in training
            stream.publish(stream.step, attention(stream.step))
        seen.append(used.now())
    finally:
        executor.close()
    assert item_bytes > 5 * ALLOWED_BYTES  # what stayed of every item would be seen
    # pages of the store that a process has seen are no memory of its own
    check_flat(seen, "anonymous", "store")


@pytest.mark.torture
def test_training_on_two_thousand_items_leaves_nothing_behind(
    archive: Archive, ray_local: ModuleType, tmp_path: Path
) -> None:
    num_items, batch_size, steps_per_epoch = 2000, 4, 2
    config = run_config(num_epochs=num_items // batch_size // steps_per_epoch, batch_size=batch_size, lag=2)
    # more than 100 kB an item, so that Ray puts it into the object store
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, num_patches=24))
    job = make_job(archive, tmp_path / "run", config)
    executor = RayExecutor(
        job.slides, job.labels, config.model, config.sampler, num_samplers=1, cpus_per_sampler=0.5
    )
    try:
        used = Used(ray_local, executor)
        trainer = RankTrainer(job, Alone(), executor)
        seen: list[dict[str, int]] = []
        while trainer.stream.step < trainer.plan.num_steps:
            trainer.totals.add(trainer.step())  # each makes a version of the attention, which travels too
            if trainer.stream.step % 16 == 0:
                trainer.ledger.flush()
            if trainer.stream.step * batch_size % NUM_WARM == 0:
                seen.append(used.now())
        assert trainer.stream.step * batch_size == num_items
    finally:
        executor.close()
    check_flat(seen, "anonymous", "store", "resident")
