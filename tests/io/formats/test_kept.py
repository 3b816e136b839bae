from __future__ import annotations

import subprocess
import sys
import threading

from ats_stream.io.formats.kept import Kept


def test_the_things_used_last_stay():
    made = []

    def make(name):
        made.append(name)
        return name

    kept = Kept(6, len)
    for name in ("aa", "bb", "cc", "aa", "dd"):
        assert kept.get(name, lambda name=name: make(name)) == name
    assert made == ["aa", "bb", "cc", "dd"]
    kept.get("aa", lambda: make("aa"))
    kept.get("bb", lambda: make("bb"))
    assert made == ["aa", "bb", "cc", "dd", "bb"]
    kept.drop("aa")
    kept.drop("never seen")
    kept.get("aa", lambda: make("aa"))
    assert made[-1] == "aa"


def test_one_larger_than_the_bound_stays_alone():
    kept = Kept(3, len)
    kept.get("a", lambda: "a")
    assert kept.get("large", lambda: "x" * 10) == "x" * 10
    assert kept.get("large", lambda: "made again") == "x" * 10
    assert kept.get("a", lambda: "made again") == "made again"


def test_threads_make_a_thing_once():
    kept = Kept(9)
    made = []
    start = threading.Barrier(8)

    def use():
        start.wait()
        kept.get("a", lambda: made.append(1))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]


FORK = """
import os, sys
from ats_stream.io.formats.kept import Kept
kept = Kept(9)
kept.get("a", lambda: os.getpid())
child = os.fork()
if child == 0:
    os._exit(0 if kept.get("a", os.getpid) == os.getpid() else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.exit(status or kept.get("a", lambda: 0) != os.getpid())
"""


def test_a_forked_child_opens_its_own():
    assert subprocess.run([sys.executable, "-c", FORK], check=False).returncode == 0
