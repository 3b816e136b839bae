"""Doing many things in threads, few at a time."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Result = TypeVar("Result")
Task = TypeVar("Task")


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
