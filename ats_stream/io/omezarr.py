"""Opening an OME-Zarr image, version 0.4 or 0.5, that lies in a store."""

from __future__ import annotations

import json
import math
from hashlib import sha256
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from ats_stream.io import ngff
from ats_stream.io.axis_map import AxisMap
from ats_stream.io.layout import parse_array_json
from ats_stream.io.layout_v2 import parse_array_v2
from ats_stream.io.pyramid import Pyramid
from ats_stream.io.pyramid_info import Level, PyramidInfo, axis_downsample
from ats_stream.io.sources import ChunkSource, StoreSource
from ats_stream.io.storage.documents import Metadata, attributes_of, is_inside
from ats_stream.io.storage.store_error import StoreError
from ats_stream.io.stored_pictures import StoredPictures
from ats_stream.io.zarr_source import ZarrSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ats_stream.io.storage.stores import Store

MAX_AXES = 8


def open_image(store: Store, prefix: str, *, cache_bytes: int, num_threads: int) -> Pyramid:
    """Open the image group at ``prefix`` (empty, or ending in ``/``); ValueError or StoreError say why not.

    A remote store is asked twice: for the group and its labels, then for all levels, each time at once.
    """
    metadata = Metadata(store)
    metadata.prefetch(f"{prefix}{group}{file}" for group in ("", "labels/") for file in GROUP_FILES)
    attributes = attributes_of(metadata, prefix)
    if attributes.get("bioformats2raw.layout") == 3 and "multiscales" not in attributes:
        prefix += "0/"
        attributes = attributes_of(metadata, prefix)
    image = ngff.parse_image(attributes)
    for dataset in image.datasets:
        if not is_inside(dataset.path):
            raise ValueError(f"level {dataset.path!r} leads out of the folder")
    folders = [f"{prefix}{dataset.path.strip('/')}/".replace("//", "/") for dataset in image.datasets]
    labels = [name for name in _label_names(metadata, prefix) if is_inside(name)]
    metadata.prefetch(f"{folder}{file}" for folder in folders for file in ARRAY_FILES)
    axis_map = _axis_map(image, _stored_shape(metadata, folders[0], image.datasets[0].path))
    sources = [
        _open_level(metadata, folder, dataset.path, axis_map)
        for folder, dataset in zip(folders, image.datasets, strict=True)
    ]
    _check_levels(sources)
    slide = store.place(prefix.rstrip("/"))
    info = PyramidInfo(
        slide=slide,
        name=image.name.strip("/") or PurePosixPath(slide).name,
        axes=("c", *(image.axes[a] for a in axis_map.keep[1:] if a is not None)),
        channels=image.channels,
        levels=tuple(_level(i, image, sources, axis_map) for i in range(len(sources))),
        metadata=image.metadata,
        labels=tuple((name, f"{prefix}labels/{name}/") for name in labels),
        associated=StoredPictures(store, prefix),
    )
    return Pyramid(info, sources, cache_bytes=cache_bytes, num_threads=num_threads, store=store)


GROUP_FILES = ("zarr.json", ".zattrs")
ARRAY_FILES = ("zarr.json", ".zarray")


def _array_meta(metadata: Metadata, folder: str, name: str) -> dict[str, Any]:
    for file in ARRAY_FILES:
        meta = metadata.get(folder + file)
        if meta is not None:
            return meta
    raise ValueError(f"level {name!r} is missing: no zarr.json or .zarray in its folder")


def _stored_shape(metadata: Metadata, folder: str, name: str) -> tuple[int, ...]:
    shape = _array_meta(metadata, folder, name).get("shape")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"level {name!r}: broken array metadata: shape {shape}")
    return tuple(shape)


def _open_level(metadata: Metadata, folder: str, name: str, axes: AxisMap) -> ChunkSource:
    shape = _stored_shape(metadata, folder, name)
    if len(shape) != axes.ndim:
        raise ValueError(f"level {name!r}: array has shape {shape}, the image {axes.ndim} axes")
    try:
        meta = _array_meta(metadata, folder, name)
        zarr_format, layout = meta.get("zarr_format"), None
        if zarr_format in (2, 3):
            layout = parse_array_json(meta) if zarr_format == 3 else parse_array_v2(meta)
        digest = sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
        if layout is None:
            return ZarrSource.open(metadata.store, folder, axes, digest)
        return StoreSource(metadata.store, folder, layout, axes, digest)
    except ValueError as error:
        raise ValueError(f"level {name!r}: {error}") from error


def _label_names(metadata: Metadata, prefix: str) -> tuple[str, ...]:
    try:
        names = ngff.parse_labels(attributes_of(metadata, f"{prefix}labels/"))
    except (ValueError, StoreError):
        return ()
    metadata.prefetch(f"{prefix}labels/{name}/{file}" for name in names for file in GROUP_FILES)
    return tuple(
        name for name in names if is_inside(name) and _has_group(metadata, f"{prefix}labels/{name}/")
    )


def _has_group(metadata: Metadata, prefix: str) -> bool:
    try:
        return any(metadata.get(prefix + file) is not None for file in GROUP_FILES)
    except (ValueError, StoreError):
        return True  # it is there and broken, as opening it will tell


def _axis_map(image: ngff.Multiscale, shape: Sequence[int]) -> AxisMap:
    if len(shape) != len(image.axes):
        raise ValueError(f"array has shape {tuple(shape)}, the image axes {''.join(image.axes)}")
    channel = [i for i, t in enumerate(image.axis_types) if t == "channel"]
    planes = [i for i, t in enumerate(image.axis_types) if t == "space"]
    if len(channel) > 1 or len(planes) < 2 or len(shape) > MAX_AXES:
        raise ValueError(
            f"axes {''.join(image.axes)} need two space axes, at most one channel axis, {MAX_AXES} in all"
        )
    dropped = {i for i in range(len(shape)) if i not in channel and i not in planes[-2:] and shape[i] == 1}
    others = [i for i in range(len(shape)) if i not in channel and i not in dropped]
    return AxisMap((channel[0] if channel else None, *others), len(shape))


def _check_levels(sources: Sequence[ChunkSource]) -> None:
    first = sources[0]
    for i, source in enumerate(sources):
        if source.shape[0] != first.shape[0] or source.dtype != first.dtype:
            raise ValueError(
                f"level {i} is {source.dtype} {source.shape}, level 0 {first.dtype} {first.shape}"
            )
        if any(a < b for a, b in zip(sources[max(0, i - 1)].shape, source.shape, strict=True)):
            raise ValueError(f"level {i} {source.shape} is larger than the level before it")


def _level(index: int, image: ngff.Multiscale, sources: Sequence[ChunkSource], axes: AxisMap) -> Level:
    source, dataset = sources[index], image.datasets[index]
    space = [a for a in axes.keep[1:] if a is not None]
    factors = []
    for i, axis in enumerate(space, start=1):
        stated = dataset.scale[axis] / image.datasets[0].scale[axis]
        factors.append(axis_downsample(sources[0].shape[i], source.shape[i], stated))
    is_time = [image.axis_types[a] == "time" for a in space]
    lengths = ngff.pixel_size_um(image, dataset, [a for a, t in zip(space, is_time, strict=True) if not t])
    sizes = None
    if lengths is not None:
        values = iter(lengths)
        sizes = tuple(math.nan if t else next(values) for t in is_time)
    return Level(
        index=index,
        shape=source.shape,
        dtype=source.dtype,
        downsample=tuple(factors),
        pixel_size_um=sizes,
        chunk_shape=source.chunk_shape,
    )
