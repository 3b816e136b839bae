"""How a mask of the tissue is found: by the function named in the configuration.

A method is a function (image_CYX, pixel_size_um) -> mask_YX: the view of about 8 um per pixel as it is
stored, the size (y, x) of its pixels or None, and a mask of its shape, bool or integers that are 0 outside.
It is called ``otsu`` (:func:`ats_stream.io.tissue.tissue_mask`), or by its place, ``module:function``, so
that workers of other processes and machines find it, and a conversion that is taken up again knows it.
Shape letters: C channels, Y rows, X columns.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ats_stream.io.tissue import tissue_mask

Array = npt.NDArray[Any]
TissueMethod = Callable[[Array, "Sequence[float] | None"], Array]
OTSU = "otsu"


def find_method(name: str) -> TissueMethod:
    """The method of a name; ValueError when it names none.

    >>> find_method("otsu")(np.zeros((3, 2, 2), np.uint8), None).any()
    np.False_
    """
    if name == OTSU:
        return lambda image_CYX, _: tissue_mask(image_CYX)
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"{name!r} is neither {OTSU!r} nor 'module:function'")
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing runs whatever the module does
        raise ValueError(f"{name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"{name!r} is no function but {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def method_name(method: str | TissueMethod) -> str:
    """The name of a method that is given itself; ValueError unless it is found again under its name.

    >>> method_name("otsu")
    'otsu'
    """
    if isinstance(method, str):
        find_method(method)
        return method
    name = f"{getattr(method, '__module__', None)}:{getattr(method, '__qualname__', None)}"
    try:
        is_found = find_method(name) is method
    except ValueError:
        is_found = False
    if not is_found:
        raise ValueError(f"{method!r} is not found under its name {name!r}: define it in a module")
    return name


def mask_by(name: str, image_CYX: Array, pixel_size_um: Sequence[float] | None) -> npt.NDArray[np.bool_]:
    """The mask (Y, X) that a method finds; ValueError, naming it, when it fails or gives something else."""
    method = find_method(name)
    try:
        mask_YX = np.asarray(method(image_CYX, pixel_size_um))
    except Exception as error:  # it is the user's
        raise ValueError(f"tissue method {name!r} failed: {type(error).__name__}: {error}") from error
    if mask_YX.shape != image_CYX.shape[1:] or mask_YX.dtype.kind not in "biu":
        raise ValueError(
            f"tissue method {name!r} must give a mask {image_CYX.shape[1:]} of bool or integers, "
            f"got {mask_YX.dtype} {mask_YX.shape}"
        )
    return mask_YX.astype(bool)
