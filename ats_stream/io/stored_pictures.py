"""The pictures that a conversion kept beside an image in its store: groups ``associated/<name>``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from ats_stream.errors import SlideError
from ats_stream.io import ngff
from ats_stream.io.formats.parts import check_picture_size
from ats_stream.io.storage.documents import Metadata, attributes_of, is_inside
from ats_stream.io.storage.store_error import DeniedError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ats_stream.io.storage.stores import Store

Array = npt.NDArray[Any]
FOLDER = "associated/"


class StoredPictures(Mapping[str, "Callable[[], Array]"]):
    """Reader of each picture by name. Nothing is asked of the store before somebody wants to know."""

    def __init__(self, store: Store, prefix: str) -> None:
        """``prefix`` is that of the image."""
        self._store, self._prefix = store, prefix + FOLDER
        self._found: tuple[str, ...] | None = None

    @property
    def _names(self) -> tuple[str, ...]:
        if self._found is None:
            self._found = self._find()
        return self._found

    def _find(self) -> tuple[str, ...]:
        metadata = Metadata(self._store)
        try:
            if metadata.get(f"{self._prefix}zarr.json") is None:
                return ()
            names = ngff.parse_associated(attributes_of(metadata, self._prefix))
        except DeniedError:
            return ()  # a service that lists nobody its objects says so of an absent key, too
        except (StoreError, ValueError) as error:
            raise SlideError(self._store.place(self._prefix.rstrip("/")), str(error)) from error
        return tuple(name for name in names if is_inside(name))

    def __getitem__(self, name: str) -> Callable[[], Array]:
        if name not in self._names:
            raise KeyError(name)
        return partial(read_picture, self._store, f"{self._prefix}{name}/")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_picture(store: Store, folder: str) -> Array:
    """The pixels (C, y, x) of one picture; SlideError when it is broken or too large to be read whole."""
    from ats_stream.io.opening import open_inside

    pyramid = open_inside(store, folder, cache_bytes=0, num_threads=1)
    top = pyramid.levels[0]
    check_picture_size(pyramid.slide, "the picture", top.shape[-1], math.prod(top.shape[1:-1]))
    return pyramid.read(top)
