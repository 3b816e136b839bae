"""A pyramid as one dask graph: its tasks are those of any conversion, the pixels come from an array's graph.

A task makes the shards of one group, of the blocks that lie under them and after the tasks that come before
it: what lies under several groups is computed once, and dask, on any scheduler, decides when and where.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ats_stream.errors import AtsStreamError, SlideError, StorageError
from ats_stream.io.conversion.plan import Kind
from ats_stream.io.conversion.state import Making
from ats_stream.io.conversion.tree import ShardBuilder

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from ats_stream.io.conversion.config import ConvertSummary
    from ats_stream.io.conversion.manifest import ManifestEntry
    from ats_stream.io.conversion.plan import ConvertPlan, Shard, Task
    from ats_stream.io.conversion.slides import ArraySlide
    from ats_stream.io.conversion.state import ConvertJob
    from ats_stream.io.conversion.targets import Target

    Array = npt.NDArray[Any]
    Box = tuple[tuple[int, ...], tuple[int, ...]]


def run_graph(job: ConvertJob, slide: ArraySlide, scheduler: Any) -> ConvertSummary:
    """Make the pyramid of an array by one dask graph; ``scheduler`` is what ``dask.compute`` takes.

    Raises SlideError when the array cannot be computed, and otherwise what a conversion raises. What is
    stored is noted when the graph is done; after an interruption the shards that are there are found again.
    """
    making = Making(job, num_threads=1, in_process=False)
    making.start()
    error: BaseException | None = None
    try:
        summary = _computed(making, slide, scheduler)
    except BaseException as caught:
        error = caught
        raise
    finally:
        making.close(discard=isinstance(error, AtsStreamError) and not isinstance(error, StorageError))
    return summary


def _computed(making: Making, slide: ArraySlide, scheduler: Any) -> ConvertSummary:
    import dask.base
    from dask.delayed import delayed as untyped_delayed

    # dask has types in part
    delayed: Any = untyped_delayed
    compute: Any = dask.base.compute
    nodes: list[Any] = []
    # one key for all tasks: the plan of a large image is long
    shared = delayed((making.plan, making.target), traverse=False)
    write = delayed(_write, pure=False)
    for call, needs in making.build_calls():
        boxes = decoded_boxes(making.plan, call.task)
        regions = [slide.lazy(*box) for box in boxes]
        nodes.append(write(shared, call.task, boxes, regions, [nodes[n] for n in sorted(needs)]))
    try:
        done = compute(*nodes, scheduler=scheduler)
    except (AtsStreamError, KeyboardInterrupt):
        raise
    except Exception as error:  # whoever computes the array may raise anything
        reason = " ".join(f"cannot be computed: {type(error).__name__}: {error}".split())
        raise SlideError(slide.path, reason) from error
    for number, shards in enumerate(done):
        for shard, entry in shards:
            making.on_shard(shard, entry)
        making.on_end(number, None)
    found = making.next_call()
    assert found is not None
    number, finish = found
    making.on_end(number, finish.run(making.on_shard))
    assert making.summary is not None
    return making.summary


def decoded_boxes(plan: ConvertPlan, task: Task) -> list[Box]:
    """Where the pixels lie that a task needs of the source: start and stop over (C, *space)."""
    decoded = [shard for shard in task.shards if plan.levels[shard.level].kind == Kind.DECODED]
    return [plan.levels[shard.level].box(shard.place) for shard in decoded]


@dataclass(frozen=True)
class _Regions:
    """The pixels of some boxes, as a source of which nothing else is asked."""

    boxes: Sequence[Box]
    blocks: Sequence[Array]
    parts = None

    def read(self, start: Sequence[int], stop: Sequence[int], _out: Array | None = None) -> Array:
        """The block of one of the boxes."""
        return self.blocks[self.boxes.index((tuple(start), tuple(stop)))]


def _write(
    shared: tuple[ConvertPlan, Target],
    task: Task,
    boxes: list[Box],
    blocks: list[Array],
    _after: list[Any],
) -> list[tuple[Shard, ManifestEntry]]:
    """Make the shards of a task; this is what dask calls."""
    plan, target = shared
    source: Any = _Regions([(tuple(a), tuple(b)) for a, b in boxes], [np.asarray(block) for block in blocks])
    builder = ShardBuilder(plan, source, target, num_threads=1)
    done: list[tuple[Shard, ManifestEntry]] = []
    try:
        builder.build(task.shards, task.roots, lambda shard, entry: done.append((shard, entry)))
    finally:
        with suppress(Exception):
            builder.close()
    return done
