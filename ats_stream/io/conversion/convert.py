"""Slides and arrays to OME-Zarr pyramids in one pass over their pixels.

Levels are halved until they fit in 256 pixels. Every shard is stored as a whole or not at all, and noted in a
manifest beside the target, so that a run that was interrupted goes on where it stood.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ats_stream.errors import InputError
from ats_stream.io import ngff
from ats_stream.io.conversion.config import ConvertConfig, ConvertFailure, ConvertSummary
from ats_stream.io.conversion.executors import make_executor
from ats_stream.io.conversion.run import run_jobs
from ats_stream.io.conversion.slides import ArraySlide
from ats_stream.io.conversion.state import ConvertJob
from ats_stream.io.conversion.targets import open_target

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

SUFFIX = ".ome.zarr"


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    config: ConvertConfig | None = None,
    *,
    workers: int = 1,
    storage_options: Mapping[str, Any] | None = None,
    target_options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> ConvertSummary:
    """Convert whatever ``open_pyramid`` reads, a slide file for instance, to an OME-Zarr 0.5 pyramid.

    ``source`` and ``target`` are paths or URLs; their options are those of ``open_pyramid``. Coarse levels
    are exact means of 2^D pixels of the level above, rounded half to even. Pixel size is kept; pictures of
    the label and all metadata that could identify a patient are left out. ``workers`` processes share the
    work, with the same result. ``progress`` shows a bar on standard error, by default if that is a terminal.

    Raises SlideError, and then there is nothing of the target; TargetExistsError; or StorageError, after
    which, as after Ctrl-C or a kill, the same call goes on where this one stood.
    """
    job = ConvertJob(
        source=os.fspath(source),
        target=os.fspath(target),
        config=config or ConvertConfig(),
        source_options=storage_options,
        target_options=target_options,
    )
    return _one(job, workers, progress)


def write_pyramid(
    array: Any,
    target: str | os.PathLike[str],
    config: ConvertConfig | None = None,
    *,
    axes: Sequence[str] | None = None,
    pixel_size_um: float | Sequence[float] | None = None,
    name: str | None = None,
    channels: Sequence[ngff.Channel | str] | None = None,
    workers: int = 1,
    scheduler: Any = None,
    target_options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> ConvertSummary:
    """Write an array (C, *space), numpy or dask, as a pyramid, in the same way as :func:`convert`.

    ``axes`` are by default (c, x), (c, y, x), (c, z, y, x) or (c, t, z, y, x); (c, t, y, x) is a video.
    ``pixel_size_um`` is one number or one for each space axis, NaN along time. Lazy arrays are computed
    shard by shard, in ``workers`` processes if these are more than one; they then travel there by pickle.
    With ``scheduler``, as ``dask.compute`` takes it (``"threads"``, ``ray.util.dask.ray_dask_get``), all of
    it is one dask graph instead, with the same bytes. InputError when both are given.
    """
    num_space = len(array.shape) - 1
    sizes = (pixel_size_um,) * num_space if isinstance(pixel_size_um, (int, float)) else pixel_size_um
    label = name or Path(os.fspath(target)).name.removesuffix(".zarr").removesuffix(".ome")
    slide = ArraySlide(array, axes=axes, name=label, pixel_size_um=sizes)
    job = ConvertJob(
        source=slide,
        target=os.fspath(target),
        config=config or ConvertConfig(),
        name=label,
        channels=None if channels is None else ngff.named_channels(channels, slide.shape[0]),
        target_options=target_options,
    )
    if scheduler is None:
        return _one(job, workers, progress)
    if workers != 1:
        raise InputError(f"workers={workers} and scheduler={scheduler!r}: give one of the two")
    from ats_stream.io.conversion.dask_graph import run_graph

    return run_graph(job, slide, scheduler)


def _one(job: ConvertJob, workers: int, progress: bool | None) -> ConvertSummary:
    (summary,) = run_jobs([job], make_executor(workers), is_strict=True, progress=progress)
    assert isinstance(summary, ConvertSummary)
    return summary


def target_path(slide: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> str:
    """Where :func:`preprocess` puts the pyramid of a slide: ``<out_dir>/<stem>.ome.zarr``.

    >>> target_path("slides/scan.ome.tif", "out"), target_path("a.ome.zarr", "s3://bucket/b/")
    ('out/scan.ome.zarr', 's3://bucket/b/a.ome.zarr')
    """
    name = Path(os.fspath(slide).rstrip("/")).stem.removesuffix(".ome").removesuffix(".zarr") + SUFFIX
    out = os.fspath(out_dir)
    return f"{out.rstrip('/')}/{name}" if "://" in out else str(Path(out, name))


def is_done(target: str | os.PathLike[str], *, target_options: Mapping[str, Any] | None = None) -> bool:
    """Whether a pyramid, or anything else, has the target's name; pyramids get it when they are whole."""
    return open_target(target, target_options).exists()


def preprocess(
    slides: Iterable[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    config: ConvertConfig | None = None,
    *,
    workers: int = 1,
    on_ray: bool = False,
    is_strict: bool = False,
    configs: Mapping[str, ConvertConfig] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    target_options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Iterator[ConvertSummary | ConvertFailure]:
    """Convert many slides, yielding one summary or failure per slide, in order.

    ``workers`` processes, or tasks of a running Ray cluster, share the work. A slide that cannot be converted
    is recorded with its reason and the rest goes on, unless ``is_strict``; a disk that is full or a folder
    that cannot be written ends it with StorageError. ``configs`` are for single slides. InputError when two
    slides would get the same target.
    """
    paths = [os.fspath(slide) for slide in slides]
    targets: dict[str, str] = {}
    for path in paths:
        other = targets.setdefault(target_path(path, out_dir), path)
        if other is not path:
            raise InputError(f"{other} and {path} would both become {target_path(path, out_dir)}")
    default = config or ConvertConfig()
    jobs = [
        ConvertJob(
            source=path,
            target=target_path(path, out_dir),
            config=(configs or {}).get(path, default),
            source_options=storage_options if "://" in path else None,
            target_options=target_options,
        )
        for path in paths
    ]
    return run_jobs(jobs, make_executor(workers, on_ray=on_ray), is_strict=is_strict, progress=progress)
