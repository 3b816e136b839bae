"""Memory stays flat over 2,000 items: of the rank that trains on them, and of its sampler."""

from __future__ import annotations

import dataclasses
import gc
import os
from typing import TYPE_CHECKING

import psutil
import pytest
from tiny import make_job, run_config

from ats_stream.workers.ranks import Alone
from ats_stream.workers.ray_executor import RayExecutor
from ats_stream.workers.trainer import RankTrainer

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from ats_stream.io import Archive

NUM_ITEMS = 2000
BATCH_SIZE = 4
# by then all images are open, every view is kept, and allocators have taken what a step needs
WARM_ITEMS = 400
MAX_GROWTH_BYTES = 8 << 20  # 8 MiB: 5 kB an item, of some 170 kB that each brings


def resident_bytes(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


@pytest.mark.torture
def test_memory_is_flat_over_two_thousand_items(
    archive: Archive, ray_local: ModuleType, tmp_path: Path
) -> None:
    steps_per_epoch = 2
    config = run_config(num_epochs=NUM_ITEMS // BATCH_SIZE // steps_per_epoch, batch_size=BATCH_SIZE, lag=2)
    # more than 100 kB an item, so that Ray puts it into the object store
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, num_patches=24))
    job = make_job(archive, tmp_path / "run", config)
    executor = RayExecutor(
        job.slides, job.labels, config.model, config.sampler, num_samplers=1, cpus_per_sampler=0.5
    )
    try:
        sampler = ray_local.get(executor._actors[0].__ray_call__.remote(lambda _: os.getpid()))
        trainer = RankTrainer(job, Alone(), executor)
        seen: list[tuple[int, int]] = []
        while trainer.stream.step < trainer.plan.num_steps:
            trainer.totals.add(trainer.step())  # each makes a version of the attention, which travels too
            if trainer.stream.step % 16 == 0:
                trainer.ledger.flush()
            if trainer.stream.step * BATCH_SIZE % WARM_ITEMS == 0:
                gc.collect()
                seen.append((resident_bytes(sampler), resident_bytes(os.getpid())))
        assert trainer.stream.step * BATCH_SIZE == NUM_ITEMS
    finally:
        executor.close()
    growth = [seen[-1][part] - seen[0][part] for part in range(2)]
    assert growth[0] < MAX_GROWTH_BYTES, f"the sampler: {seen}"
    assert growth[1] < MAX_GROWTH_BYTES, f"the rank: {seen}"
