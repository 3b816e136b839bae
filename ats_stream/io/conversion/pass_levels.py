"""Levels of a pyramid that take their tiles from a slide as they are, and those made for what it lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ats_stream.io.codecs import ChunkCodec
from ats_stream.io.conversion.layout import MAX_SHARD_BYTES, level_shapes
from ats_stream.io.conversion.pass_layout import ShardSize
from ats_stream.io.conversion.passthrough import PassPlan, plan_pass
from ats_stream.io.conversion.plan import Kind, LevelPlan, axes_of, level_spec

if TYPE_CHECKING:
    from ats_stream.io.conversion.config import ConvertConfig
    from ats_stream.io.conversion.slides import SlideSource
    from ats_stream.io.jpeg import JpegFormat

SHARD_BYTES = 16 << 20  # 16 MiB


def pass_levels(source: SlideSource, config: ConvertConfig) -> tuple[tuple[LevelPlan, ...], tuple[str, ...]]:
    """Levels that are copied, then halves of the last of them as JPEG; and what the user should know.

    ValueError says why nothing can be copied.
    """
    if source.parts is None:
        raise ValueError("not a slide file")
    found = plan_pass(
        source.parts,
        ShardSize(nbytes=config.shard_bytes or SHARD_BYTES, side_px=config.shard_px),
        max_levels=config.levels,
        max_base_values=MAX_SHARD_BYTES,
    )
    space = source.axes[1:]
    axes = axes_of(space)[1]
    copied = [
        LevelPlan(kind=Kind.COPIED, spec=v.spec, axes=axes, downsample=v.downsample, source_level=v.level)
        for v in found.levels
    ]
    base = copied[-1]
    codec = ChunkCodec(name="jpeg", jpeg=found.coarse)
    left = None if config.levels is None else config.levels - len(copied) + 1
    shapes = level_shapes(base.shape, config.coarsest_px, left)
    built = [
        LevelPlan(
            kind=Kind.BUILT,
            spec=level_spec(
                shape,
                space,
                dtype=source.dtype,
                chunk=base.spec.chunk,
                shard=base.spec.shard,
                fill_value=base.spec.fill_value,
                codec=codec,
            ),
            axes=axes,
            downsample=tuple(
                f * 2.0**number if n > 1 else f for f, n in zip(base.downsample, base.shape[1:], strict=True)
            ),
        )
        for number, shape in enumerate(shapes[1:], start=1)
    ]
    return (*copied, *built), _notes(found, len(built), config)


def _notes(found: PassPlan, num_built: int, config: ConvertConfig) -> tuple[str, ...]:
    """Which levels were copied, which were not and why, how the others are stored."""
    numbers = [level.level for level in found.levels]
    notes = [f"{_levels(numbers)} of the slide copied as stored"]
    notes += [f"{_levels([number])} of the slide left out: {why}" for number, why in found.left_out.items()]
    if num_built:
        made = range(len(numbers), len(numbers) + num_built)
        notes.append(f"{_levels(made)} of the pyramid made from the last of them, {_shown(found.coarse)}")
    if config.chunk_px is not None:
        height, width = found.levels[0].spec.chunk[-2:]
        notes.append(f"chunks are the slide's tiles, {width} x {height}: chunk_px was not used")
    return tuple(notes)


def _levels(numbers: range | list[int]) -> str:
    """Words for levels.

    >>> _levels([0]), _levels([0, 2]), _levels(range(1, 5))
    ('level 0', 'levels 0, 2', 'levels 1 to 4')
    """
    found = list(numbers)
    if len(found) == 1:
        return f"level {found[0]}"
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"levels {found[0]} to {found[-1]}"
    return f"levels {', '.join(map(str, found))}"


def _shown(form: JpegFormat) -> str:
    parts = [f"JPEG of quality {form.level}"]
    parts += [form.colorspace_jpeg] if form.colorspace_jpeg is not None else []
    parts += [form.subsampling] if form.subsampling is not None else []
    return " ".join(parts)
