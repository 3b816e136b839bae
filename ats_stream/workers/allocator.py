"""Keep the memory that tensors give back inside the process.

By default glibc returns every large block to the system when it is freed and fetches it, page by page and
zeroed, for the next tensor. A training step on the CPU then spends a third of its time in page faults.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
LARGEST_KEPT_BYTES = 32 << 20  # 32 MiB, the most that glibc takes for blocks of its heap


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed blocks for the next tensors; False where it has no such setting.

    The process then stays at its highest memory until it ends.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES), (_M_TRIM_THRESHOLD, 16 * LARGEST_KEPT_BYTES))
    return all(mallopt(name, value) == 1 for name, value in settings)
