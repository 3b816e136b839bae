"""Modules of functions that numba compiles: imported when first needed, if numba can be used at all."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType


@functools.cache
def compiled_module(name: str) -> ModuleType | None:
    """The module, imported at the first call; None where numba cannot be used.

    Every one has a plain way beside it that gives the same, so what keeps numba from working is no error.
    """
    try:
        return importlib.import_module(name)
    except Exception:  # whatever it is
        return None
