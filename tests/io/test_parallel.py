from __future__ import annotations

import threading

import pytest

from ats_stream.errors import ReadCancelledError
from ats_stream.io.parallel import run_all


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("num_parts", [0, 1, 4, 50])
def test_every_part_is_done_once(num_threads, num_parts):
    done = []
    run_all([lambda n=n: done.append(n) for n in range(num_parts)], num_threads)
    assert sorted(done) == list(range(num_parts))


def test_the_first_failure_in_order_is_raised_and_nothing_runs_after(monkeypatch):
    second_failed, done = threading.Event(), []

    def first():
        assert second_failed.wait(10)
        raise ValueError("first")

    def second():
        second_failed.set()
        raise ValueError("second")

    with pytest.raises(ValueError, match="first"):
        run_all([first, second, lambda: done.append(3)], 2)
    assert done == []


def test_parts_run_at_the_same_time():
    barrier = threading.Barrier(3, timeout=10)
    run_all([barrier.wait] * 3, 3)


def test_whoever_waits_for_the_end_waits_for_all_parts():
    begun, go_on, done = threading.Event(), threading.Event(), []
    caller = threading.get_ident()

    def part():
        if threading.get_ident() == caller:
            assert begun.wait(10)
            threading.Timer(0.01, go_on.set).start()
            raise KeyboardInterrupt
        begun.set()
        assert go_on.wait(10)
        done.append(1)

    with pytest.raises(KeyboardInterrupt):
        run_all([part, part], 2)
    assert done == [1]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_no_part_begins_once_cancelled(num_threads):
    cancel, done = threading.Event(), []

    def part():
        done.append(1)
        cancel.set()

    with pytest.raises(ReadCancelledError):
        run_all([part] * 100, num_threads, cancel)
    assert len(done) <= num_threads


def test_parts_may_run_parts_of_their_own():
    done = []
    run_all([lambda: run_all([lambda: done.append(1)] * 3, 2)] * 4, 2)
    assert len(done) == 12
