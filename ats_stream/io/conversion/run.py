"""Running conversions: which call goes to which worker when, and what happens when one fails."""

from __future__ import annotations

import sys
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

from ats_stream.errors import AtsStreamError, StorageError
from ats_stream.io.conversion.config import ConvertFailure, ConvertSummary
from ats_stream.io.conversion.inputs import is_remote_file
from ats_stream.io.conversion.state import Fetching, Making

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ats_stream.io.conversion.calls import Call
    from ats_stream.io.conversion.executors import Executor
    from ats_stream.io.conversion.manifest import ManifestEntry
    from ats_stream.io.conversion.plan import Shard
    from ats_stream.io.conversion.state import ConvertJob

# calls under way or waiting, per worker: one that runs and one that follows
CALLS_PER_WORKER = 2


def run_jobs(
    jobs: Iterable[ConvertJob], executor: Executor, *, is_strict: bool = False, progress: bool | None = None
) -> Iterator[ConvertSummary | ConvertFailure]:
    """Make pyramids, yielding one summary or failure for each job, in order.

    A job that fails is recorded and the rest goes on, unless ``is_strict``. StorageError (the disk is full,
    the target cannot be written) ends it; what is there stays, and another run goes on from it, as after
    KeyboardInterrupt.
    """
    with ExitStack() as stack:
        run = _Run(list(jobs), executor, is_strict, stack.enter_context(_progress_bar(progress)))
        stack.callback(run.close)
        # before the locks are given back, nobody writes any more
        stack.callback(executor.close)
        yield from run.results()


class _Run:
    def __init__(self, jobs: list[ConvertJob], executor: Executor, is_strict: bool, bar: Any) -> None:
        self.jobs, self.executor, self.is_strict, self.bar = jobs, executor, is_strict, bar
        self.next_job = 0
        self.open: dict[int, Making | Fetching] = {}
        self.calls: dict[int, tuple[int, int]] = {}
        """Number of a call in flight -> number of its job, and of the call in it."""
        self.num_calls = 0
        self.ended: dict[int, ConvertSummary | ConvertFailure] = {}
        self.shown_px = 0

    def results(self) -> Iterator[ConvertSummary | ConvertFailure]:
        """Results in the order of the jobs."""
        for number in range(len(self.jobs)):
            while number not in self.ended:
                self._fill()
                if number not in self.ended:
                    self._wait()
            yield self.ended.pop(number)

    def close(self) -> None:
        """Give back what is open; it can be resumed."""
        for making in self.open.values():
            making.close()
        self.open.clear()

    def _fill(self) -> None:
        """Keep the workers busy: with the pyramids that are open, oldest first, else with the next one."""
        while len(self.calls) < CALLS_PER_WORKER * self.executor.num_workers:
            found = self._next_call()
            if found is None:
                if self.next_job == len(self.jobs):
                    return
                self._open_next()
                continue
            job, number, call = found
            self.calls[self.num_calls] = (job, number)
            self.executor.submit(self.num_calls, call)
            self.num_calls += 1

    def _next_call(self) -> tuple[int, int, Call] | None:
        for job, making in self.open.items():
            found = making.next_call()
            if found is not None:
                return job, *found
        return None

    def _open_next(self) -> None:
        number, job = self.next_job, self.jobs[self.next_job]
        self.next_job += 1
        num_threads = job.config.num_threads or self.executor.threads_per_worker
        making: Making | Fetching
        if isinstance(job.source, str) and is_remote_file(job.source):
            making = Fetching(job, num_threads)
        else:
            making = Making(job, num_threads=num_threads, in_process=self.executor.is_in_process)
        try:
            making.start()
        except AtsStreamError as error:
            self._fail(number, error)
            return
        self.open[number] = making
        if self.bar is not None:
            self.bar.total = (self.bar.total or 0) + making.num_px
            self.bar.set_description(making.name)
            self.bar.update(making.done_px)

    def _wait(self) -> None:
        """Take in what workers have done since."""
        for call, result in self.executor.wait(self._on_shard):
            job, number = self.calls.pop(call)
            making = self.open[job]
            making.on_end(number, result)
            if not making.has_ended:
                continue
            error, summary = making.error, making.summary
            if error is not None and not isinstance(error, AtsStreamError):
                raise error
            del self.open[job]
            making.close(discard=error is not None and not isinstance(error, StorageError))
            if isinstance(error, AtsStreamError):
                self._fail(job, error)
            elif summary is not None:
                self.ended[job] = summary

    def _on_shard(self, call: int, shard: Shard, entry: ManifestEntry) -> None:
        making = self.open[self.calls[call][0]]
        before = making.done_px
        making.on_shard(shard, entry)
        if self.bar is not None:
            self.bar.update(making.done_px - before)

    def _fail(self, job: int, error: AtsStreamError) -> None:
        if self.is_strict or isinstance(error, StorageError):
            raise error
        self.ended[job] = ConvertFailure(source=self.jobs[job].shown, reason=str(error))


def _progress_bar(progress: bool | None) -> Any:
    """A bar over the pixels that come from the sources, or a context of None."""
    shown = sys.stderr.isatty() if progress is None else progress
    if not shown:
        return nullcontext(None)
    from tqdm import tqdm

    return tqdm(total=0, unit="px", unit_scale=True, leave=False, file=sys.stderr)
