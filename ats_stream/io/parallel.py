"""Doing many things in threads of this process."""

from __future__ import annotations

import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar

from ats_stream.errors import ReadCancelledError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Result = TypeVar("Result")
Task = TypeVar("Task")
_pools: dict[tuple[int, str, int], ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def in_threads(action: Callable[[Task], Result], tasks: Iterable[Task], num_threads: int) -> Iterator[Result]:
    """The results in the order of the tasks, which are taken as needed: memory is that of a few of them.

    >>> list(in_threads(abs, range(-3, 0), 2))
    [3, 2, 1]
    """
    if num_threads == 1:
        yield from map(action, tasks)
        return
    with ThreadPoolExecutor(num_threads, thread_name_prefix="ats-io") as pool:
        waiting: deque[Any] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(action, task))
                if len(waiting) >= 2 * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for one in waiting:
                one.cancel()


def thread_pool(name: str, num_threads: int) -> ThreadPoolExecutor:
    """One pool per name, size and process: threads do not survive a fork, so a child makes its own."""
    key = (os.getpid(), name, num_threads)
    with _pools_lock:
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        return _pools[key]


def check_cancelled(cancel: threading.Event | None) -> None:
    """ReadCancelledError once ``cancel`` is set."""
    if cancel is not None and cancel.is_set():
        raise ReadCancelledError("reading was cancelled")


def run_all(
    parts: Iterable[Callable[[], None]], num_threads: int, cancel: threading.Event | None = None
) -> None:
    """Do all parts, in the caller and in ``num_threads - 1`` threads that help it, each taking the next one.

    After a failure, or once ``cancel`` is set, no other part begins. Raises, when none is under way any more,
    what the first part that failed did, in the order given: the same as one thread would.

    >>> done = []
    >>> run_all([lambda: done.append(1), lambda: done.append(2)], 1)
    >>> done
    [1, 2]
    """
    waiting = iter(parts)
    if num_threads == 1:
        for part in waiting:
            check_cancelled(cancel)
            part()
        return
    lock = threading.Lock()
    failed: list[tuple[int, BaseException]] = []
    begun = 0
    is_over = False

    def work() -> None:
        nonlocal begun
        while True:
            with lock:
                part = None if is_over or failed else next(waiting, None)
                number = begun
                begun += 1
            if part is None:
                return
            try:
                check_cancelled(cancel)
                part()
            except BaseException as error:
                with lock:
                    failed.append((number, error))

    pool = thread_pool("ats-decode", num_threads)
    helpers = [pool.submit(work) for _ in range(num_threads - 1)]
    try:
        work()
    finally:
        # an interrupt may end the caller's share: helpers must still not write when this is left
        is_over = True
        wait([helper for helper in helpers if not helper.cancel()])
    if failed:
        raise min(failed, key=lambda one: one[0])[1]
