"""Opening a source as a pyramid: OME-Zarr stores (0.4 and 0.5), slide files in place, arrays."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ats_stream.errors import InputError, SlideError
from ats_stream.io.omezarr import open_image
from ats_stream.io.storage.store_error import StoreError
from ats_stream.io.storage.stores import LocalStore
from ats_stream.io.storage.zip_store import ZipStore

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ats_stream.io.pyramid import Pyramid
    from ats_stream.io.storage.stores import Store


def open_pyramid(
    source: str | os.PathLike[str] | Any,
    *,
    storage_options: Mapping[str, Any] | None = None,
    cache_bytes: int = 0,
    num_threads: int = 1,
    axes: Sequence[str] | None = None,
    pixel_size_um: Sequence[float] | None = None,
) -> Pyramid:
    """Open an OME-Zarr image, version 0.4 or 0.5, a slide or picture file read in place, or an array.

    An OME-Zarr image is a folder, a ``.zip`` file, or either of them behind a URL of ``s3://``, ``gs://``,
    ``az://`` or ``http(s)://``. ``storage_options`` are then what obstore takes for the service, such as
    ``endpoint`` and ``region``, and ``timeout_s`` and ``max_retries``; they travel with a pickled pyramid and
    are never shown.

    ``cache_bytes`` is the size of the cache of decoded chunks, 0 switches it off. ``num_threads`` decode
    large requests: more than one shortens the wait but costs more processor time in all. Axes of length 1
    other than channel, y and x are dropped. Raises SlideError, naming the source without credentials, for
    what cannot be read.

    An array is (C, y, x), (C, z, y, x) or (C, t, z, y, x), of numpy, dask or zarr; a list of arrays is the
    levels, finest first. For arrays alone, ``axes`` names the axes otherwise, as ``("c", "t", "y", "x")``,
    and ``pixel_size_um`` is the size of the finest pixels along each axis after ``c``.

    >>> import numpy as np
    >>> pyramid = open_pyramid(np.zeros((3, 40, 60), np.uint8))
    >>> pyramid.read_patches(0, [[-4, 50]], (8, 16)).shape
    (1, 3, 8, 16)
    """
    if cache_bytes < 0 or num_threads < 1:
        raise InputError(
            f"cache_bytes must be 0 or more, num_threads 1 or more, got {cache_bytes}, {num_threads}"
        )
    options = {"cache_bytes": cache_bytes, "num_threads": num_threads}
    from ats_stream.io.array_pyramid import is_array, open_array

    if is_array(source):
        return open_array(source, axes=axes, pixel_size_um=pixel_size_um, **options)
    if axes is not None or pixel_size_um is not None:
        raise InputError("axes and pixel_size_um are for arrays; files state their own")
    text = os.fspath(source)
    is_file = "://" not in text and Path(text).is_file() and not _is_zip(text)
    if is_file and not storage_options:
        from ats_stream.io.formats.slide_pyramid import open_file

        return open_file(Path(text), cache_bytes=cache_bytes, num_threads=num_threads)
    return open_inside(open_store(text, storage_options), "", **options)


def open_store(place: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Store:
    """A folder, zip file or URL as a store of keys; SlideError for anything else."""
    text = os.fspath(place)
    if "://" in text:
        return _remote_store(text, storage_options)
    if storage_options:
        raise SlideError(text, "storage options are for URLs, got a path")
    path = Path(text)
    if not path.exists():
        raise SlideError(text, "no such file or folder")
    if path.is_file() and _is_zip(text):
        return _zip_store(LocalStore(path.parent), path.name, text)
    if not path.is_dir():
        raise SlideError(text, "neither an OME-Zarr folder nor a file that can be read")
    return LocalStore(path)


def _is_zip(name: str) -> bool:
    return name.lower().endswith(".zip")


def open_inside(store: Store, prefix: str, *, cache_bytes: int, num_threads: int) -> Pyramid:
    """Open the OME-Zarr image at a prefix of a store; SlideError, naming the place, says why it cannot be."""
    try:
        return open_image(store, prefix, cache_bytes=cache_bytes, num_threads=num_threads)
    except (ValueError, StoreError) as error:
        # what the store holds may stand in the message, line breaks and all
        raise SlideError(store.place(prefix.rstrip("/")), " ".join(str(error).split())) from error


def _remote_store(url: str, storage_options: Mapping[str, Any] | None) -> Store:
    """The store of a URL; one that ends in ``.zip`` is a zip file in it."""
    from ats_stream.io.storage.remote import ObjectStore, shown

    outer, _, name = url.rstrip("/").rpartition("/")
    is_zip = _is_zip(name)
    try:
        store = ObjectStore(outer if is_zip else url, storage_options)
    except (InputError, ValueError) as error:
        raise SlideError(shown(url), " ".join(str(error).split())) from error
    return _zip_store(store, name, shown(url)) if is_zip else store


def _zip_store(outer: Store, name: str, slide: str) -> Store:
    try:
        return ZipStore(outer, name)
    except StoreError as error:
        raise SlideError(slide, str(error)) from error
