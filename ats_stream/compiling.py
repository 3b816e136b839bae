# mypy: ignore-errors
# numba infers types by its own rules
"""How functions are compiled by numba; imported by modules of such functions alone."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numba

if TYPE_CHECKING:
    from collections.abc import Callable

jit = functools.partial(numba.njit, nogil=True, error_model="numpy")


def cached(function: Callable[..., Any]) -> Any:
    """Compile with a cache on disk, if there is a folder that can be written."""
    try:
        return jit(cache=True)(function)
    except (RuntimeError, OSError):
        return jit()(function)
