"""From a source and a configuration to a plan."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ats_stream.errors import SlideError
from ats_stream.io.conversion.layout import level_shapes
from ats_stream.io.conversion.plan import (
    ConvertPlan,
    LevelPlan,
    build_levels,
    group_attributes,
    view_level,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ats_stream.io.conversion.config import ConvertConfig
    from ats_stream.io.conversion.slides import SlideSource
    from ats_stream.io.ngff import Channel

# stored bytes per byte of pixels, by which shards of a given size are cut: tissue from a JPEG slide
TYPICAL_RATIO = {"zstd": 0.5, "lz4": 0.7, "raw": 1.0}
# sizes that differ by less are the same
SAME_SIZE = 0.01


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A plan, and what the user should know of it."""

    plan: ConvertPlan
    notes: tuple[str, ...]


def make_plan(
    source: SlideSource,
    config: ConvertConfig,
    *,
    name: str | None = None,
    channels: Sequence[Channel] | None = None,
) -> Setup:
    """The plan of a conversion; SlideError for pixels that have no exact mean here."""
    if source.dtype.kind not in "iuf" or (source.dtype.kind != "f" and source.dtype.itemsize > 4):
        raise SlideError(
            source.path, f"pixels of dtype {source.dtype} cannot be averaged, integers of up to 32 bits can"
        )
    notes: list[str] = []
    space = source.axes[1:]
    levels: tuple[LevelPlan, ...] | None = None
    if config.profile == "pass":
        from ats_stream.io.conversion.pass_levels import pass_levels

        try:
            levels, about = pass_levels(source, config)
            notes += about
        except ValueError as error:
            notes.append(f"decoded and stored losslessly, because {error}")
            config = replace(config, profile="lossless")
    if levels is None:
        levels = build_levels(
            level_shapes(source.shape, config.coarsest_px, config.levels),
            space,
            source.dtype,
            config,
            bytes_per_px=_bytes_per_px(source, config),
        )
    sizes, note = _pixel_size(source, config)
    notes += [note] if note else []
    looked_at = None
    if config.tissue and space == ("y", "x"):
        pair = (sizes[0], sizes[1]) if sizes is not None else None
        shapes = [level.shape for level in levels]
        scales = [level.downsample[-1] for level in levels]
        looked_at = view_level(shapes, scales, pair, source.dtype.itemsize)
    plan = ConvertPlan(
        levels=levels,
        attributes=group_attributes(
            name=name if name is not None else source.name,
            levels=levels,
            pixel_size_um=sizes,
            channels=tuple(channels) if channels is not None else source.channels,
            metadata=source.metadata,
        ),
        profile=config.profile,
        pixel_size_um=sizes,
        tissue_level=looked_at,
        tissue_method=str(config.tissue_method),
        associated_names=tuple(source.associated_names) if config.keep_associated else (),
    )
    return Setup(plan=plan, notes=tuple(notes))


def _bytes_per_px(source: SlideSource, config: ConvertConfig) -> float:
    from ats_stream.io.conversion.config import PROFILE_CODECS

    ratio = TYPICAL_RATIO[PROFILE_CODECS[config.profile]]
    return source.shape[0] * source.dtype.itemsize * ratio


def _pixel_size(source: SlideSource, config: ConvertConfig) -> tuple[tuple[float, ...] | None, str | None]:
    """The pixel size that is stored, and a note when the source states another one."""
    stated, given = source.pixel_size_um, config.pixel_size_um
    if given is None:
        return stated, None
    sizes = tuple(math.nan if axis == "t" else given for axis in source.axes[1:])
    known = [s for s in stated or () if s > 0]
    if any(abs(s / given - 1) > SAME_SIZE for s in known):
        shown = " x ".join(f"{s:.4g}" for s in known)
        return sizes, f"pixel size {given:.4g} um was given, the slide states {shown} um"
    return sizes, None
