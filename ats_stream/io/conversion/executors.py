"""Who makes the calls of conversions: this process, processes of this machine, or tasks of a Ray cluster.

All of them give the same bytes. An executor is closed by the run that it was made for.
"""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from ats_stream.errors import AtsStreamError, ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

    from ats_stream.io.conversion.calls import Call
    from ats_stream.io.conversion.manifest import ManifestEntry
    from ats_stream.io.conversion.plan import Shard

    OnShard = Callable[[int, Shard, ManifestEntry], None]


class Executor(Protocol):
    """Makes calls; results come in any order."""

    num_workers: int
    is_in_process: bool
    threads_per_worker: int | None
    """Threads that decode and encode in a worker; None for as many as there are cores, at most 8."""

    def submit(self, number: int, call: Call) -> None:
        """Ask for a call."""

    def wait(self, on_shard: OnShard) -> list[tuple[int, Any]]:
        """Wait until calls have ended: their numbers, and their results or errors."""

    def close(self) -> None:
        """End the workers at once; calls that have not ended are given up."""


class SerialExecutor:
    """Makes the calls in this process, one after another: the reference."""

    num_workers = 1
    is_in_process = True
    threads_per_worker: int | None = None

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Call]] = deque()

    def submit(self, number: int, call: Call) -> None:
        """Remember it."""
        self._waiting.append((number, call))

    def wait(self, on_shard: OnShard) -> list[tuple[int, Any]]:
        """Make the oldest call."""
        number, call = self._waiting.popleft()
        try:
            return [(number, call.run(lambda shard, entry: on_shard(number, shard, entry)))]
        except AtsStreamError as error:
            return [(number, error)]

    def close(self) -> None:
        """Nothing to end."""
        self._waiting.clear()


class ProcessExecutor:
    """Processes of this machine. One that dies fails the call that it made, and another takes its place."""

    is_in_process = False
    threads_per_worker: int | None = 1

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._context = multiprocessing.get_context("spawn")
        self._waiting: deque[tuple[int, Call]] = deque()
        self._workers: list[_Worker] = []

    def submit(self, number: int, call: Call) -> None:
        """Hand it to a worker that is idle, or keep it until one is."""
        self._waiting.append((number, call))
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting:
            idle = next((w for w in self._workers if w.number is None), None)
            if idle is None:
                if len(self._workers) == self.num_workers:
                    return
                idle = _Worker(self._context)
                self._workers.append(idle)
            idle.give(*self._waiting.popleft())

    def wait(self, on_shard: OnShard) -> list[tuple[int, Any]]:
        """Listen to all workers until one of them has ended its call."""
        ended: list[tuple[int, Any]] = []
        while not ended:
            busy = {w.connection: w for w in self._workers if w.number is not None}
            for connection in multiprocessing.connection.wait(list(busy)):
                worker = busy[connection]
                ended += self._listen(worker, on_shard)
            self._hand_out()
        return ended

    def _listen(self, worker: _Worker, on_shard: OnShard) -> list[tuple[int, Any]]:
        number = worker.number
        assert number is not None
        try:
            kind, *content = worker.connection.recv()
        except (EOFError, OSError):
            self._workers.remove(worker)
            worker.process.join()
            reason = f"a worker process ended with exit code {worker.process.exitcode}"
            return [(number, ClusterError(reason))]
        if kind == "shard":
            on_shard(number, *content)
            return []
        worker.number = None
        return [(number, content[0])]

    def close(self) -> None:
        """Terminate the processes."""
        self._waiting.clear()
        for worker in self._workers:
            worker.process.terminate() if worker.number is not None else worker.connection.close()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers.clear()


class _Worker:
    """A process, and the call that it makes."""

    def __init__(self, context: Any) -> None:
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.number: int | None = None

    def give(self, number: int, call: Call) -> None:
        self.number = number
        try:
            self.connection.send(call)
        except (BrokenPipeError, ConnectionError):
            return  # it died; listening to it tells so


def _serve(connection: Connection) -> None:
    """Make the calls that come until the other side closes."""
    # Ctrl-C is for the process that started this one, and which ends it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    while True:
        try:
            call = connection.recv()
        except (EOFError, OSError):
            return
        try:
            result: Any = call.run(lambda shard, entry: _send(connection, ("shard", shard, entry)))
        except Exception as error:
            result = error
        _send(connection, ("end", result))


def _send(connection: Connection, content: Any) -> None:
    """Tell the process that started this one; without it there is nothing left to do."""
    try:
        connection.send(content)
    except OSError:
        os._exit(1)


def _end_with_parent() -> None:
    """End when the process that started this one does, which gives the lock of the target back."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class RayExecutor:
    """Tasks of a Ray cluster, which must be running, spread over its nodes."""

    is_in_process = False
    threads_per_worker: int | None = 1

    def __init__(self, num_workers: int) -> None:
        import ray

        self.num_workers = num_workers
        # a node that is lost does not cost the slide, a slide that kills its worker does in the end
        self._task = ray.remote(
            num_cpus=1, max_retries=2, num_returns="streaming", scheduling_strategy="SPREAD"
        )(_tell_of_shards)
        self._reports: dict[Any, int] = {}
        """What each task tells, and the number of its call."""

    def submit(self, number: int, call: Call) -> None:
        """Start a task."""
        self._reports[self._task.remote(call)] = number

    def wait(self, on_shard: OnShard) -> list[tuple[int, Any]]:
        """Listen to all tasks until one of them has ended."""
        import ray

        ended: list[tuple[int, Any]] = []
        while not ended:
            ready, _ = ray.wait(list(self._reports), fetch_local=False)
            for reports in ready:
                number = self._reports[reports]
                kind, *content = self._next(reports)
                if kind == "shard":
                    on_shard(number, *content)
                else:
                    del self._reports[reports]
                    ended.append((number, content[0]))
        return ended

    def _next(self, reports: Any) -> tuple[Any, ...]:
        """The next thing that a task tells; what became of its worker, if that ended it."""
        import ray

        try:
            told: tuple[Any, ...] = ray.get(next(reports))
        except ray.exceptions.WorkerCrashedError as error:
            return "end", ClusterError(f"its Ray worker died: {_first_line(error)}")
        except ray.exceptions.RayTaskError as error:
            # our own errors come as results, so this is a bug, which keeps the worker's traceback
            return "end", error
        except ray.exceptions.RayError as error:
            return "end", ClusterError(_first_line(error))
        return told

    def close(self) -> None:
        """Cancel what has not ended."""
        import ray

        ends = [reports.completed() for reports in self._reports]
        for reports in self._reports:
            ray.cancel(reports, force=True)
        if ends:
            ray.wait(ends, num_returns=len(ends))
        self._reports.clear()


def _tell_of_shards(call: Call) -> Iterator[tuple[Any, ...]]:
    """Make a call, and tell of each shard as it is stored, at last of the result or our own error.

    What is told of is not made again after an end of any kind.
    """
    told: SimpleQueue[tuple[Any, ...]] = SimpleQueue()

    def work() -> None:
        try:
            result: Any = call.run(lambda shard, entry: told.put(("shard", shard, entry)))
        except AtsStreamError as error:
            result = error
        except BaseException as error:
            told.put(("raise", error))
            return
        told.put(("end", result))

    _thread_of_calls().put(work)
    while True:
        kind, *content = told.get()
        if kind == "raise":
            raise content[0]
        yield kind, *content
        if kind == "end":
            return


@functools.cache
def _thread_of_calls() -> SimpleQueue[Callable[[], None]]:
    """Feeds the thread in which a Ray worker makes its calls: one, for threads keep memory to use again."""
    given: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def serve() -> None:
        while True:
            given.get()()

    threading.Thread(target=serve, name="ats-convert", daemon=True).start()
    return given


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]


def make_executor(num_workers: int, *, on_ray: bool = False) -> Executor:
    """Tasks of Ray, or processes of this machine, or for one worker this process."""
    if on_ray:
        return RayExecutor(num_workers)
    return ProcessExecutor(num_workers) if num_workers > 1 else SerialExecutor()
