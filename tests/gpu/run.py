"""Run the tests of this folder with numpy, torch and CuPy alone: no pytest. Exit code 1 if any fails.

python tests/gpu/run.py            all
python tests/gpu/run.py gather     modules whose name holds a word
python tests/gpu/run.py --small    what compute-sanitizer can go through in minutes
"""

from __future__ import annotations

import importlib
import inspect
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "kernels"), str(HERE.parent.parent)]


def main() -> int:
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    is_small = "--small" in sys.argv[1:]
    num_failed = 0
    for path in sorted(HERE.glob("test_*.py")):
        if words and not any(word in path.stem for word in words):
            continue
        module = importlib.import_module(path.stem)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if not name.startswith("test_") or (is_small and name not in getattr(module, "SMALL", ())):
                continue
            start_s = time.perf_counter()
            try:
                function()
                outcome = "ok"
            except Exception:
                traceback.print_exc()
                outcome, num_failed = "FAILED", num_failed + 1
            print(f"{outcome:7} {time.perf_counter() - start_s:6.1f} s  {path.stem}.{name}", flush=True)
    print("all passed" if not num_failed else f"{num_failed} failed")
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
